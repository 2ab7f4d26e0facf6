"""From scores to lists; the one part that every implementation in XLA shares."""

import jax
import jax.numpy as jnp


def choose(score_BTKN, own_T, *, num_blocks, rule):
  """Returns the lists [B, T, K, M] under a rule of `api.select_blocks`.

  Args:
    score_BTKN: -inf for blocks that may not be chosen, +inf for those that must be.
    own_T: number of the block that each query is in.
    num_blocks: M.
    rule: `exact` or `half_local`.
  """
  if rule == "exact":
    return top_blocks(score_BTKN, num_blocks)
  # The run of num_blocks blocks that the query's own block is in, and all before it.
  run_starts_T1 = (own_T // num_blocks * num_blocks)[:, None]
  is_near_TN = jnp.arange(score_BTKN.shape[-1])[None, :] >= run_starts_T1
  near_BTKN = jnp.where(is_near_TN[None, :, None], score_BTKN, -jnp.inf)
  far_BTKN = jnp.where(is_near_TN[None, :, None], -jnp.inf, score_BTKN)
  halves_BTKM = jnp.concatenate(
    [top_blocks(part, num_blocks // 2) for part in (near_BTKN, far_BTKN)], axis=-1
  )
  # Nothing lies before the first run; there every slot goes to the near blocks.
  is_first_T = own_T < num_blocks
  return jnp.where(
    is_first_T[None, :, None, None], top_blocks(near_BTKN, num_blocks), halves_BTKM
  )


def top_blocks(score_BTKN, num_blocks):
  """Numbers of the best blocks, lower ones first among equals; -1 where the score is -inf."""
  n = score_BTKN.shape[-1]
  best_BTKM, blocks_BTKM = jax.lax.top_k(score_BTKN, min(num_blocks, n))
  blocks_BTKM = jnp.where(jnp.isneginf(best_BTKM), -1, blocks_BTKM).astype(jnp.int32)
  empty = [(0, 0)] * (blocks_BTKM.ndim - 1) + [(0, max(0, num_blocks - n))]
  return jnp.pad(blocks_BTKM, empty, constant_values=-1)
