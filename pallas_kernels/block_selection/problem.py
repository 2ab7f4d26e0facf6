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

  @property
  def ranks_by_query(self) -> bool:
    """Whether queries choose anything freely."""
    return self.rule == "half_local" or self.num_free > 0

  @property
  def per_block(self) -> int:
    """Windows that begin in a block."""
    return self.block_size // self.pooling.stride


def make_rules(
  *,
  block_size: int,
  num_blocks: int,
  num_by_query: int | None,
  pooling: poolings.Pooling | None,
  **others,
) -> Rules:
  """The rules of a call, in which None stands for what is usual; see `api.select_blocks`."""
  return Rules(
    block_size=block_size,
    num_blocks=num_blocks,
    num_by_query=num_blocks if num_by_query is None else num_by_query,
    pooling=poolings.whole_blocks(block_size) if pooling is None else pooling,
    **others,
  )


def check_rules(rules: Rules, num_by_query: int | None, *, has_key_scores: bool) -> None:
  """Raises the errors of `api.select_blocks` that have to do with rules alone.

  `num_by_query` is what the call was given.
  """
  size, m, pooling = rules.block_size, rules.num_blocks, rules.pooling
  if size < 1 or m < 1 or rules.num_local < 1 or rules.num_initial < 0:
    raise ValueError(
      f"block_size={size}, num_blocks={m} and num_local={rules.num_local} must be at least "
      f"1, num_initial={rules.num_initial} at least 0"
    )
  forced = rules.num_initial + rules.num_local
  if forced > rules.num_by_query or rules.num_by_query > m:
    raise ValueError(
      f"{forced} forced blocks, {rules.num_by_query} that queries choose (forced ones among "
      f"them) and {m} in all must not descend"
    )
  if min(pooling.size, pooling.stride, pooling.count) < 1 or size % pooling.stride:
    raise ValueError(f"windows {pooling} do not divide blocks of {size} keys into strides")
  normalizer = rules.normalizer
  if normalizer is not None and min(normalizer.size, normalizer.stride) < 1:
    raise ValueError(f"windows {normalizer} to normalise over have no size or no stride")
  if has_key_scores and pooling.reach() > rules.num_local * size + 1:
    raise ValueError(
      f"windows {pooling} reach {pooling.reach()} keys from the beginning of a block, beyond "
      f"what a query can see of one that is not forced; raise num_local={rules.num_local}"
    )
  if rules.rule not in ("exact", "half_local"):
    raise KeyError(f"no selection rule {rules.rule!r}: exact or half_local")
  if rules.rule == "half_local":
    if m % 2:
      raise ValueError(f"num_blocks={m} must be even for rule='half_local'")
    if rules.num_initial or rules.num_local > 1 or has_key_scores:
      raise ValueError(
        "rule='half_local' takes neither num_initial, num_local above 1, nor scores of keys"
      )
  if has_key_scores != (num_by_query is not None):
    raise ValueError("key_score and num_by_query belong together; give both or neither")
