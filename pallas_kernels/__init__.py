"""The front door of the kernels; nothing behind it is imported from outside."""

from pallas_kernels.block_selection.api import select_blocks
from pallas_kernels.block_sparse_attention.api import block_sparse_attention

__all__ = ["block_sparse_attention", "select_blocks"]
