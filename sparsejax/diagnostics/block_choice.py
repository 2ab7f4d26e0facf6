"""How queries choose blocks: what stays from one to the next, and what was never a choice.

Lists are int32 [B, T, K, M], -1 for empty slots, without repeats. Letters: B batch, T queries,
K key/value heads, M blocks listed, X tiles of queries.
"""

import jax
import jax.numpy as jnp


def overlap(blocks_BTKM) -> jax.Array:
  """NOSA's locality (arXiv:2510.13602), of every query but the first, [B, T - 1, K].

    gamma(t) = |list(t) and list(t - 1)| / |list(t)|

  What a cache that holds the blocks of step t - 1 need not load at step t. 1 where a query
  lists nothing.
  """
  now, before = blocks_BTKM[:, 1:], blocks_BTKM[:, :-1]
  is_listed = now >= 0
  # Row by row: slots are compared with slots.
  stays = jax.lax.map(
    lambda pair: (pair[0][..., :, None] == pair[1][..., None, :]).any(-1), (now, before)
  )
  num = is_listed.sum(-1)
  return jnp.where(num > 0, (stays & is_listed).sum(-1) / jnp.maximum(num, 1), 1.0)


def forced_share(
  blocks_BTKM, first_BT, *, block_size: int, num_initial: int, num_local: int
) -> jax.Array:
  """The share of a list that is forced, whatever the scores, [B, T, K]; the rest is free.

    forced(t) = |{b in list(t): b < first(t) + I or own(t) - L < b <= own(t)}| / |list(t)|

  with I initial and L local blocks, first(t) the block in which the query's document begins
  and own(t) its own. 0 where it lists nothing.

  Args:
    blocks_BTKM: the lists.
    first_BT: the key with which the document of each query begins.
    block_size: keys per block.
    num_initial, num_local: I and L.
  """
  own_T = jnp.arange(blocks_BTKM.shape[1]) // block_size
  own, first = own_T[None, :, None, None], first_BT[..., None, None] // block_size
  is_listed = blocks_BTKM >= 0
  is_forced = (blocks_BTKM < first + num_initial) | (
    (blocks_BTKM > own - num_local) & (blocks_BTKM <= own)
  )
  return (is_forced & is_listed).sum(-1) / jnp.maximum(is_listed.sum(-1), 1)


def union_size(blocks_BTKM, tile: int) -> jax.Array:
  """Blocks that a tile of neighbouring queries lists together, [B, X, K], of whole tiles.

    union(x) = |list(x tile) or ... or list(x tile + tile - 1)|

  What a kernel loads once for all queries of a tile: the less, the faster.
  """
  b, t, k, m = blocks_BTKM.shape
  num_tiles = t // tile
  lists = blocks_BTKM[:, : num_tiles * tile].reshape(b, num_tiles, tile, k, m)
  lists = jnp.sort(lists.transpose(0, 1, 3, 2, 4).reshape(b, num_tiles, k, tile * m), axis=-1)
  is_new = jnp.concatenate(
    [jnp.ones_like(lists[..., :1], bool), lists[..., 1:] != lists[..., :-1]], axis=-1
  )
  return (is_new & (lists >= 0)).sum(-1)
