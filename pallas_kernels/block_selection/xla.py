"""Block selection in plain XLA, for any device; a stripe of queries at a time.

Extra shape letter:
  C queries of a stripe
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_selection import plan
from pallas_kernels.block_selection import pooling as poolings
from pallas_kernels.block_selection.problem import Problem, Rules

# Scores (float32, of every query head) that exist at the same time.
SCORE_ELEMENTS = 2**26


def choose(
  problem: Problem, rules: Rules, bounds: plan.Bounds, spans: list[plan.Span]
) -> list[jax.Array]:
  """The best blocks of every span, [B, T, K, slots], -1 behind them."""
  b, t, h, _ = problem.q_BTHD.shape
  keys_BWKD = problem.keys_of_windows(rules.pooling)
  num_blocks = -(-problem.k_BSKD.shape[1] // rules.block_size)
  coarse = _coarse(problem, rules)
  size = max(1, min(t, SCORE_ELEMENTS // (b * h * max(1, keys_BWKD.shape[1]))))

  def stripe(part):
    q_BCHD, bounds, spans, coarse_bounds = part
    lse_BCKG1 = None
    if coarse is not None:
      lse_BCKG1 = log_normalizer(q_BCHD, coarse.keys_BWKD, coarse_bounds, rules.scale)
    score_BCKN = scores(q_BCHD, keys_BWKD, bounds, rules, num_blocks, lse_BCKG1)
    return [
      best(score_BCKN, plan.Span(*span, own.slots))
      for span, own in zip(spans, whole, strict=True)
    ]

  whole = spans
  ranges = [span[:3] for span in spans]
  arrays = problem.q_BTHD, bounds, ranges, None if coarse is None else coarse.bounds
  if size == t:
    return stripe(arrays)
  parts = jax.tree.map(lambda x: _to_stripes(x, size), arrays)
  chosen = jax.lax.map(stripe, parts)
  return [x.swapaxes(0, 1).reshape(b, -1, *x.shape[3:])[:, :t] for x in chosen]


def scores(q_BCHD, keys_BWKD, bounds, rules, num_blocks, lse_BCKG1=None):
  """Scores of blocks from their windows' probabilities, which are added up over heads."""
  b, c, _, _ = q_BCHD.shape
  w, k = keys_BWKD.shape[1:3]
  if w == 0:
    return jnp.zeros((b, c, k, num_blocks), jnp.float32)
  window_BCKGW = probabilities(q_BCHD, keys_BWKD, bounds, rules, lse_BCKG1)
  window_BCKW = window_BCKGW.sum(-2)
  return poolings.scores_of_blocks(window_BCKW, rules.pooling, rules.per_block, num_blocks)


def probabilities(q_BCHD, keys_BWKD, bounds, rules, lse_BCKG1=None):
  """Probabilities of windows, 0 for those that are not seen.

  `lse_BCKG1` is the logarithm of what they are normalised by, -inf for their own sum; None
  is -inf everywhere.
  """
  logits_BCKGW = _logits(q_BCHD, keys_BWKD, bounds, rules.scale)
  largest_BCKG1 = logits_BCKGW.max(-1, keepdims=True)
  largest_BCKG1 = jnp.where(jnp.isneginf(largest_BCKG1), 0.0, largest_BCKG1)
  weights_BCKGW = jnp.exp(logits_BCKGW - largest_BCKG1)
  total_BCKG1 = jnp.maximum(weights_BCKGW.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
  window_BCKGW = weights_BCKGW / total_BCKG1
  if lse_BCKG1 is None:
    return window_BCKGW
  by_coarse_BCKGW = jnp.exp(logits_BCKGW - lse_BCKG1)
  return jnp.where(jnp.isneginf(lse_BCKG1), window_BCKGW, by_coarse_BCKGW)


class _Coarse(NamedTuple):
  """Windows that scores are normalised over, and what queries see of them."""

  keys_BWKD: jax.Array
  bounds: plan.Bounds


def _coarse(problem: Problem, rules: Rules) -> _Coarse | None:
  """None where there are no such windows, or where no query could see one."""
  normalizer, k_BSKD = rules.normalizer, problem.k_BSKD
  if normalizer is None or not normalizer.num_windows(k_BSKD.shape[1]):
    return None
  keys_BWKD = poolings.mean_windows(k_BSKD, problem.segments_BS, normalizer)
  bounds = plan.bounds(problem, dataclasses.replace(rules, pooling=normalizer))
  return _Coarse(keys_BWKD.astype(k_BSKD.dtype), bounds)


def log_normalizer(q_BCHD, keys_BWKD, bounds, scale):
  """The logarithm of the sum of exponentials over windows; -inf where none is seen."""
  logits_BCKGW = _logits(q_BCHD, keys_BWKD, bounds, scale)
  return jax.nn.logsumexp(logits_BCKGW, axis=-1, keepdims=True)


def _logits(q_BCHD, keys_BWKD, bounds, scale):
  """Scaled products of queries with windows, -inf where a window is not seen."""
  (b, c, h, d), (w, k) = q_BCHD.shape, keys_BWKD.shape[1:3]
  number_11W = jnp.arange(w)[None, None]
  is_seen_BCW = (number_11W >= bounds.first_window[..., None]) & (
    number_11W < bounds.end_window[..., None]
  )
  q_BCKGD = q_BCHD.reshape(b, c, k, h // k, d)
  if c == 1:
    # A query's scores side by side: XLA has one kernel that takes the softmax of such, and
    # makes four of what an einsum would give it.
    logits_BKCGW = jax.lax.dot_general(
      q_BCKGD,
      keys_BWKD,
      (((4,), (3,)), ((0, 2), (0, 2))),
      preferred_element_type=jnp.float32,
    )
    logits_BCKGW = scale * logits_BKCGW.swapaxes(1, 2)
  else:
    logits_BCKGW = scale * jnp.einsum(
      "bckgd,bwkd->bckgw", q_BCKGD, keys_BWKD, preferred_element_type=jnp.float32
    )
  return jnp.where(is_seen_BCW[:, :, None, None], logits_BCKGW, -jnp.inf)


def best(score_BCKN, span: plan.Span):
  """Numbers of the best blocks of a range, lower ones first among equals; then -1."""
  score_BCKN = within(score_BCKN, span)
  return chosen(*jax.lax.top_k(score_BCKN, min(span.slots, score_BCKN.shape[-1])), span)


def within(score_BCKN, span: plan.Span):
  """The scores of a range, and -inf elsewhere."""
  number_11N = jnp.arange(score_BCKN.shape[-1])[None, None]
  is_in_BCN = (number_11N >= span.begin[..., None]) & (number_11N < span.end[..., None])
  return jnp.where(is_in_BCN[:, :, None], score_BCKN, -jnp.inf)


def chosen(score_BCKX, blocks_BCKX, span: plan.Span):
  """What of the best blocks of a range, best first, a list has; -1 behind them.

  Args:
    score_BCKX, blocks_BCKX: scores and numbers of as many blocks as the range has slots, or
      of all there are.
    span: the range.
  """
  x = blocks_BCKX.shape[-1]
  is_wanted_BCX = jnp.arange(x)[None, None] < span.wanted[..., None]
  is_chosen_BCKX = is_wanted_BCX[:, :, None] & ~jnp.isneginf(score_BCKX)
  blocks_BCKX = jnp.where(is_chosen_BCKX, blocks_BCKX, -1).astype(jnp.int32)
  return jnp.pad(blocks_BCKX, [(0, 0)] * 3 + [(0, span.slots - x)], constant_values=-1)


def _to_stripes(x_BT, size):
  b, t, *rest = x_BT.shape
  x_BT = jnp.pad(x_BT, [(0, 0), (0, -t % size)] + [(0, 0)] * len(rest))
  return x_BT.reshape(b, -1, size, *rest).swapaxes(0, 1)
