"""Block selection in plain XLA, for any device; a stripe of queries at a time.

Extra shape letter:
  C queries of a stripe
"""

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
  size = max(1, min(t, SCORE_ELEMENTS // (b * h * max(1, keys_BWKD.shape[1]))))

  def stripe(part):
    q_BCHD, bounds, spans = part
    score_BCKN = scores(q_BCHD, keys_BWKD, bounds, rules, num_blocks)
    return [
      _best(score_BCKN, *span, slots.slots) for span, slots in zip(spans, whole, strict=True)
    ]

  whole = spans
  ranges = [span[:3] for span in spans]
  if size == t:
    return stripe((problem.q_BTHD, bounds, ranges))
  parts = jax.tree.map(lambda x: _to_stripes(x, size), (problem.q_BTHD, bounds, ranges))
  chosen = jax.lax.map(stripe, parts)
  return [x.swapaxes(0, 1).reshape(b, -1, *x.shape[3:])[:, :t] for x in chosen]


def scores(q_BCHD, keys_BWKD, bounds, rules, num_blocks):
  """Scores of blocks from their windows' probabilities, which are added up over heads."""
  b, c, h, d = q_BCHD.shape
  w, k = keys_BWKD.shape[1:3]
  if w == 0:
    return jnp.zeros((b, c, k, num_blocks), jnp.float32)
  number_11W = jnp.arange(w)[None, None]
  is_seen_BCW = (number_11W >= bounds.first_window[..., None]) & (
    number_11W < bounds.end_window[..., None]
  )
  q_BCKGD = q_BCHD.reshape(b, c, k, h // k, d)
  logits_BCKGW = rules.scale * jnp.einsum(
    "bckgd,bwkd->bckgw", q_BCKGD, keys_BWKD, preferred_element_type=jnp.float32
  )
  logits_BCKGW = jnp.where(is_seen_BCW[:, :, None, None], logits_BCKGW, -jnp.inf)
  largest_BCKG1 = logits_BCKGW.max(-1, keepdims=True)
  largest_BCKG1 = jnp.where(jnp.isneginf(largest_BCKG1), 0.0, largest_BCKG1)
  weights_BCKGW = jnp.exp(logits_BCKGW - largest_BCKG1)
  total_BCKG1 = jnp.maximum(weights_BCKGW.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
  window_BCKW = (weights_BCKGW / total_BCKG1).sum(-2)
  per_block = rules.block_size // rules.pooling.stride
  return poolings.scores_of_blocks(window_BCKW, rules.pooling, per_block, num_blocks)


def _best(score_BCKN, begin_BC, end_BC, wanted_BC, slots):
  """Numbers of the best blocks of a range, lower ones first among equals; then -1."""
  n = score_BCKN.shape[-1]
  number_11N = jnp.arange(n)[None, None]
  is_in_BCN = (number_11N >= begin_BC[..., None]) & (number_11N < end_BC[..., None])
  score_BCKN = jnp.where(is_in_BCN[:, :, None], score_BCKN, -jnp.inf)
  best_BCKX, blocks_BCKX = jax.lax.top_k(score_BCKN, min(slots, n))
  is_wanted_BCX = jnp.arange(min(slots, n))[None, None] < wanted_BC[..., None]
  is_chosen_BCKX = is_wanted_BCX[:, :, None] & ~jnp.isneginf(best_BCKX)
  blocks_BCKX = jnp.where(is_chosen_BCKX, blocks_BCKX, -1).astype(jnp.int32)
  return jnp.pad(
    blocks_BCKX, [(0, 0), (0, 0), (0, 0), (0, max(0, slots - n))], constant_values=-1
  )


def _to_stripes(x_BT, size):
  b, t, *rest = x_BT.shape
  x_BT = jnp.pad(x_BT, [(0, 0), (0, -t % size)] + [(0, 0)] * len(rest))
  return x_BT.reshape(b, -1, size, *rest).swapaxes(0, 1)
