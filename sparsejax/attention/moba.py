"""MoBA (arXiv:2502.13189) as SSA trains it: read your own block and the best earlier ones.

Blocks are scored by softmax-normalised products with mean keys, summed over the query heads
of a group, which share one list (arXiv:2511.20102, section 4.1 and released code).
"""

from sparsejax.attention import block_sparse


class Moba(block_sparse.BlockSparse):
  """Block-sparse attention; run full, it reads every earlier key."""
