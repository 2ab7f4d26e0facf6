"""Lists of single tokens in plain XLA, for any device."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_selection import by_key, plan, xla
from pallas_kernels.block_selection import pooling as poolings
from pallas_kernels.block_selection.problem import Rules


def lists(
  window_BKGW: jax.Array | None,
  window_score_BKW: jax.Array | None,
  position_B: jax.Array,
  rules: Rules,
  num_blocks: int,
  num_heads: int,
) -> jax.Array:
  """Lists [B, K, M]: forced blocks, then those chosen by query and by key, best first.

  Args:
    window_BKGW: float32 probabilities of windows for each query head of a key head, 0 for
      those that are not seen; None where queries choose nothing freely.
    window_score_BKW: float32 means of keys' scores over windows, with `rules.num_by_query`
      below M.
    position_B: of each row's token.
    rules: of the call.
    num_blocks: that a row has.
    num_heads: K.
  """
  position_B1 = position_B[:, None]
  bounds = plan.bounds_at(position_B1, jnp.zeros_like(position_B1), rules)
  spans, scores, counts = plan.spans(bounds, rules), [], []
  if window_BKGW is not None:
    score_BKN = poolings.scores_of_blocks(
      window_BKGW.sum(2), rules.pooling, rules.per_block, num_blocks
    )
    scores = [xla.within(score_BKN[:, None], span) for span in spans]
    counts = [min(span.slots, num_blocks) for span in spans]
  if window_score_BKW is not None:
    scores_BKN = by_key.scores_of_blocks(window_score_BKW, rules, num_blocks)
    scores.append(by_key.of_seen(scores_BKN, bounds.own_block, bounds.first_block, rules))
    counts.append(min(rules.num_blocks, num_blocks))
  best = _top(scores, counts)
  if window_BKGW is not None:
    chosen = [xla.chosen(*best.pop(0), span) for span in spans]
  else:
    chosen = [jnp.zeros((len(position_B), 1, num_heads, 0), jnp.int32) for _ in spans]
  lists_B1KM = plan.assemble(chosen, bounds, rules)
  if window_score_BKW is not None:
    candidates = by_key.known(*best.pop())
    lists_B1KM = by_key.fill_with(lists_B1KM, candidates, rules, bounds)
  return lists_B1KM[:, 0]


def _top(scores: list[jax.Array], counts: list[int]) -> list[tuple[jax.Array, jax.Array]]:
  """As `jax.lax.top_k` of each, by sorting all of them together.

  For a few rows that takes a GPU a fifth of the time of XLA's kernel for up to 16, and for
  twice as many rows as long as for one half of them.
  """
  if not scores:
    return []
  x = jnp.stack(scores)
  numbers = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
  largest, numbers = jax.lax.sort((-x, numbers), num_keys=1, is_stable=True)
  return [(-largest[i, ..., :count], numbers[i, ..., :count]) for i, count in enumerate(counts)]
