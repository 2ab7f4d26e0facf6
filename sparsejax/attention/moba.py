"""MoBA (arXiv:2502.13189) as SSA trains it: read your own block and the best earlier ones.

Blocks are scored by softmax-normalised products with mean keys, summed over the query heads
of a group, which share one list (arXiv:2511.20102, section 4.1 and released code).
"""

from typing import Any

from sparsejax.attention import block_sparse, method


class Moba(block_sparse.BlockSparse):
  """Block-sparse attention; run full, it reads every earlier key."""

  @classmethod
  def selection(cls, options: method.Options, length: int) -> dict[str, Any]:
    del length
    return dict(rule=options.selection)

  @classmethod
  def scores_per_key(cls, options: method.Options) -> float:
    return 1 / options.block_size
