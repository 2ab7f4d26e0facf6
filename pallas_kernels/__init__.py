"""The front door of the kernels; nothing behind it is imported from outside."""

from pallas_kernels.block_selection.api import choose_block_selection, select_blocks
from pallas_kernels.block_selection.of_token import (
  choose_select_blocks_of_token,
  select_blocks_of_token,
)
from pallas_kernels.block_selection.pooling import Pooling, mean_windows, nsa_windows
from pallas_kernels.block_sparse_attention.api import (
  block_sparse_attention,
  choose_block_sparse_attention,
)
from pallas_kernels.chunk_attention.api import choose_chunk_attention, chunk_attention
from pallas_kernels.decode_attention.api import choose_decode_attention, decode_attention
from pallas_kernels.dispatch import CannotRunError, Choice
from pallas_kernels.dual_path_attention.api import (
  choose_dual_path_attention,
  dual_path_attention,
)
from pallas_kernels.fetch_pages.api import (
  choose_fetch_pages,
  choose_write_pages,
  fetch_pages,
  write_pages,
)
from pallas_kernels.full_attention.api import choose_full_attention, full_attention
from pallas_kernels.page_slots.api import choose_plan_slots, plan_slots, release_slots
from pallas_kernels.page_slots.problem import Slots

__all__ = [
  "CannotRunError",
  "Choice",
  "Pooling",
  "Slots",
  "block_sparse_attention",
  "choose_block_selection",
  "choose_block_sparse_attention",
  "choose_chunk_attention",
  "choose_decode_attention",
  "choose_dual_path_attention",
  "choose_fetch_pages",
  "choose_full_attention",
  "choose_plan_slots",
  "choose_select_blocks_of_token",
  "choose_write_pages",
  "chunk_attention",
  "decode_attention",
  "dual_path_attention",
  "fetch_pages",
  "full_attention",
  "mean_windows",
  "nsa_windows",
  "plan_slots",
  "release_slots",
  "select_blocks",
  "select_blocks_of_token",
  "write_pages",
]
