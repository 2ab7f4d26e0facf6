"""InfLLM-V2 (arXiv:2509.24663): blocks at the beginning, near by, and the best of the rest.

There are no parameters of its own, and one softmax over everything that is read. Blocks are
scored in two steps. Means of short windows of keys give each query head a softmax, summed
over the heads of a group: S = sum_heads softmax(q K_C1^T). The largest of the windows that
lie over a block is its score. What differs between the paper and the code that it and NOSA
(arXiv:2510.13602) released is an option each: see `method.InfllmV2Options`.
"""

from typing import Any

import pallas_kernels
from sparsejax.attention import block_sparse, method

# Windows that the coarse normaliser averages are so many times as long, and as far apart.
_COARSER = 4


class InfllmV2(block_sparse.BlockSparse):
  """Forced blocks and the best others; rows below `dense_length` are read whole."""

  @classmethod
  def num_by_query(cls, options: method.Options) -> int | None:
    """Blocks that are forced or chosen by the query; None where keys choose none."""
    del options

  @classmethod
  def selection(cls, options: method.Options, length: int) -> dict[str, Any]:
    num_listed, forced = options.num_listed(length), options.infllmv2
    if num_listed * options.block_size >= length:
      # Every block is read, so that there is nothing to score.
      return dict(num_local=num_listed)
    rules = dict(num_initial=forced.num_initial, num_local=forced.num_local_blocks)
    rules["pooling"] = windows = pallas_kernels.Pooling(
      size=forced.window_size,
      stride=forced.window_stride,
      first=-1 if forced.first_window == "released" else 0,
      count=forced.num_windows,
    )
    if forced.normalizer == "coarse":
      rules["normalizer"] = windows.coarser(_COARSER)
    num_by_query = cls.num_by_query(options)
    if num_by_query is not None:
      rules["num_by_query"] = num_by_query
    return rules

  @classmethod
  def scores_per_key(cls, options: method.Options) -> float:
    if cls.num_by_query(options) == options.infllmv2.num_forced:
      return 0.0
    coarse = 1 / _COARSER if options.infllmv2.normalizer == "coarse" else 0.0
    return (1.0 + coarse) / options.infllmv2.window_stride

  @classmethod
  def least_blocks(cls, options: method.Options) -> int:
    return cls.num_by_query(options) or options.infllmv2.num_forced

  @classmethod
  def dense_length(cls, options: method.Options) -> int:
    return options.infllmv2.dense_length
