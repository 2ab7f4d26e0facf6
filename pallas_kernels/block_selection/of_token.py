"""The list of one token per row, from what a cache knows of the windows of earlier keys.

While a model decodes, rows stand at positions of their own, and means of windows have been
taken when the windows were complete. The rules are those of `api.select_blocks`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.block_selection import by_key, plan, xla
from pallas_kernels.block_selection.pooling import Pooling
from pallas_kernels.block_selection.problem import check_rules, make_rules


def select_blocks_of_token(
  q_BHD: Float[Array, "B H D"],
  window_keys_BWKD: Float[Array, "B W K D"],
  position_B: Int[Array, "B"],
  *,
  num_keys: int,
  block_size: int,
  num_blocks: int,
  rule: str = "exact",
  num_initial: int = 0,
  num_local: int = 1,
  pooling: Pooling | None = None,
  normalizer: Pooling | None = None,
  coarse_keys_BWKD: Float[Array, "B V K D"] | None = None,
  window_score_BWK: Float[Array, "B W K"] | None = None,
  num_by_query: int | None = None,
) -> Int[Array, "B K M"]:
  """Returns what `select_blocks` lists for a query at `position_B` of a single document.

  Runs in XLA: one query reads every window once, whatever multiplies.

  Args:
    q_BHD: queries, positions encoded.
    window_keys_BWKD: what they are compared with, one for each window that `num_keys` keys
      complete, or more; of those that are not complete at a query's position, anything.
    position_B: of each query; what lies there and before is its document.
    num_keys: that a row has room for.
    block_size, num_blocks, rule, num_initial, num_local, pooling, normalizer, num_by_query:
      see `select_blocks`.
    coarse_keys_BWKD: means over the windows of the normaliser.
    window_score_BWK: with `num_by_query`, means of the scores of keys over the windows.

  Raises:
    ValueError: numbers that do not fit together, or fewer windows than `num_keys` keys
      complete; the message names them.
    KeyError: no such rule.
  """
  rules = make_rules(
    block_size=block_size,
    num_blocks=num_blocks,
    num_by_query=num_by_query,
    num_initial=num_initial,
    num_local=num_local,
    pooling=pooling,
    rule=rule,
    scale=q_BHD.shape[-1] ** -0.5,
    normalizer=normalizer,
  )
  check_rules(rules, num_by_query, has_key_scores=window_score_BWK is not None)
  _check_windows("keys", rules.pooling, window_keys_BWKD, num_keys)
  if window_score_BWK is not None:
    _check_windows("scores", rules.pooling, window_score_BWK, num_keys)
  q_B1HD, position_B1 = q_BHD[:, None], position_B[:, None]
  first_B1 = jnp.zeros_like(position_B1)
  bounds = plan.bounds_at(position_B1, first_B1, rules)
  n = -(-num_keys // block_size)

  lse = None
  if normalizer is not None:
    _check_windows("coarse keys", normalizer, coarse_keys_BWKD, num_keys)
    if coarse_keys_BWKD.shape[1]:
      coarse = dataclasses.replace(rules, pooling=normalizer)
      seen = plan.bounds_at(position_B1, first_B1, coarse)
      lse = xla.log_normalizer(q_B1HD, coarse_keys_BWKD, seen, rules.scale)
  spans, counts = plan.spans(bounds, rules), []
  ranks_by_query = any(span.slots for span in spans)
  scores = []
  if ranks_by_query:
    score_B1KN = xla.scores(q_B1HD, window_keys_BWKD, bounds, rules, n, lse)
    scores = [xla.within(score_B1KN, span) for span in spans]
    counts = [min(span.slots, n) for span in spans]
  if window_score_BWK is not None:
    scores_BKN = by_key.scores_of_blocks(window_score_BWK.transpose(0, 2, 1), rules, n)
    scores.append(by_key.of_seen(scores_BKN, bounds.own_block, bounds.first_block, rules))
    counts.append(min(num_blocks, n))
  best = _top(scores, counts)
  if ranks_by_query:
    chosen = [xla.chosen(*best.pop(0), span) for span in spans]
  else:
    (b, _, k, _) = window_keys_BWKD.shape
    chosen = [jnp.zeros((b, 1, k, 0), jnp.int32) for _ in spans]
  lists_B1KQ = plan.assemble(chosen, bounds, rules)
  if window_score_BWK is not None:
    candidates = by_key.known(*best.pop())
    lists_B1KQ = by_key.fill_with(lists_B1KQ, candidates, rules, bounds)
  return lists_B1KQ[:, 0]


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


def _check_windows(what: str, pooling: Pooling, x_BW: jax.Array | None, num_keys: int) -> None:
  wanted, found = pooling.num_windows(num_keys), 0 if x_BW is None else x_BW.shape[1]
  if found < wanted:
    raise ValueError(
      f"{num_keys} keys complete {wanted} windows {pooling}, got {what} of {found}"
    )
