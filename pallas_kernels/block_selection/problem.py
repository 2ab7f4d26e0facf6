"""One call as every implementation takes it: its arrays, and its rules."""

import dataclasses
from typing import NamedTuple

import jax

from pallas_kernels.block_selection import pooling as poolings


class Problem(NamedTuple):
  """What `api.select_blocks` was given, checked; optional arrays may be None.

  `query_offset` is a scalar int32 array; `window_keys_BWKD` stand for windows of keys in place
  of their means.
  """

  q_BTHD: jax.Array
  k_BSKD: jax.Array
  query_offset: jax.Array
  segments_BS: jax.Array | None
  key_score_BSK: jax.Array | None
  window_keys_BWKD: jax.Array | None = None

  def keys_of_windows(self, pooling: poolings.Pooling) -> jax.Array:
    """What queries are compared with [B, W, K, D], in the dtype of the keys."""
    keys_BWKD = self.window_keys_BWKD
    if keys_BWKD is None:
      keys_BWKD = poolings.mean_windows(self.k_BSKD, self.segments_BS, pooling)
    return keys_BWKD.astype(self.k_BSKD.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """What is chosen; see `api.select_blocks`.

  Attributes:
    block_size: keys per block.
    num_blocks: M, length of the lists.
    num_by_query: how many of those the queries choose, forced blocks among them; the rest
      is chosen by key scores. M where there are none.
    num_initial, num_local: forced blocks.
    pooling: windows that represent blocks.
    normalizer: windows that the softmax is normalised over; None is those of `pooling`.
    rule: `exact` or `half_local`.
    scale: factor on the scores.
  """

  block_size: int
  num_blocks: int
  num_by_query: int
  num_initial: int
  num_local: int
  pooling: poolings.Pooling
  rule: str
  scale: float
  normalizer: poolings.Pooling | None = None

  @property
  def num_free(self) -> int:
    """Blocks that queries choose freely, where there are enough to choose from."""
    return max(0, self.num_by_query - self.num_initial - self.num_local)
