"""Block selection in plain XLA, for any device; a stripe of queries at a time.

Extra shape letter:
  C queries of a stripe
"""

import jax
import jax.numpy as jnp

from pallas_kernels.block_selection import ranking

# Scores (float32, of every query head) that exist at the same time.
SCORE_ELEMENTS = 2**26


def select_blocks(q_BTHD, k_BTKD, segments_BT, *, block_size, num_blocks, scale, rule):
  b, t, h, _ = q_BTHD.shape
  keys_BNKD, last_segment_BN = pool_keys(k_BTKD, segments_BT, block_size)
  size = max(1, min(t, SCORE_ELEMENTS // (b * h * keys_BNKD.shape[1])))

  def stripe(part):
    q_BCHD, position_C, segments_BC = part
    score_BCKN = _scores(
      q_BCHD, keys_BNKD, position_C, segments_BC, last_segment_BN, block_size, scale
    )
    own_C = position_C // block_size
    return ranking.choose(score_BCKN, own_C, num_blocks=num_blocks, rule=rule)

  if size == t:
    return stripe((q_BTHD, jnp.arange(t), segments_BT))
  segments = None if segments_BT is None else _to_stripes(segments_BT, size)
  parts = (
    _to_stripes(q_BTHD, size),
    _to_stripes(jnp.arange(t)[None], size)[:, 0],
    segments,
  )
  blocks = jax.lax.map(stripe, parts)
  return blocks.swapaxes(0, 1).reshape(b, -1, *blocks.shape[3:])[:, :t]


def pool_keys(k_BTKD, segments_BT, block_size):
  """Mean key of every block, over the document of its last key, and that document."""
  b, t, k, d = k_BTKD.shape
  pad = -t % block_size
  k_BNXKD = jnp.pad(k_BTKD, [(0, 0), (0, pad), (0, 0), (0, 0)]).reshape(b, -1, block_size, k, d)
  n = k_BNXKD.shape[1]
  if segments_BT is None:
    segments_BT = jnp.zeros((b, t), jnp.int32)
  # The last block may be cut short: its last key is the last there is.
  last_N = jnp.minimum(jnp.arange(1, n + 1) * block_size, t) - 1
  last_segment_BN = segments_BT[:, last_N]
  segments_BNX = jnp.pad(segments_BT, [(0, 0), (0, pad)]).reshape(b, n, block_size)
  is_there_NX = jnp.arange(n * block_size).reshape(n, block_size) < t
  is_pooled_BNX = (segments_BNX == last_segment_BN[..., None]) & is_there_NX[None]
  k_BNXKD = jnp.where(is_pooled_BNX[..., None, None], k_BNXKD, 0).astype(jnp.float32)
  keys_BNKD = k_BNXKD.sum(2) / is_pooled_BNX.sum(2)[..., None, None]
  return keys_BNKD.astype(k_BTKD.dtype), last_segment_BN


def _scores(q_BCHD, keys_BNKD, position_C, segments_BC, last_segment_BN, block_size, scale):
  """Summed probabilities of the blocks before the query's own; +inf for its own."""
  b, c, h, d = q_BCHD.shape
  n, k = keys_BNKD.shape[1:3]
  number_N = jnp.arange(n)
  own_C1 = (position_C // block_size)[:, None]
  is_complete_BCN = (number_N[None] < (position_C[:, None] + 1) // block_size)[None]
  is_past_BCN = (number_N[None] < own_C1)[None]
  if segments_BC is not None:
    is_same_BCN = segments_BC[:, :, None] == last_segment_BN[:, None, :]
    is_complete_BCN = is_complete_BCN & is_same_BCN
    is_past_BCN = is_past_BCN & is_same_BCN

  q_BCKGD = q_BCHD.reshape(b, c, k, h // k, d)
  logits_BCKGN = scale * jnp.einsum(
    "bckgd,bnkd->bckgn", q_BCKGD, keys_BNKD, preferred_element_type=jnp.float32
  )
  logits_BCKGN = jnp.where(is_complete_BCN[:, :, None, None], logits_BCKGN, -jnp.inf)
  largest_BCKG1 = logits_BCKGN.max(-1, keepdims=True)
  largest_BCKG1 = jnp.where(jnp.isneginf(largest_BCKG1), 0.0, largest_BCKG1)
  weights_BCKGN = jnp.exp(logits_BCKGN - largest_BCKG1)
  total_BCKG1 = jnp.maximum(weights_BCKGN.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
  score_BCKN = (weights_BCKGN / total_BCKG1).sum(-2)

  score_BCKN = jnp.where(is_past_BCN[:, :, None], score_BCKN, -jnp.inf)
  return jnp.where((number_N[None] == own_C1)[None, :, None], jnp.inf, score_BCKN)


def _to_stripes(x_BT, size):
  b, t, *rest = x_BT.shape
  x_BT = jnp.pad(x_BT, [(0, 0), (0, -t % size)] + [(0, 0)] * len(rest))
  return x_BT.reshape(b, -1, size, *rest).swapaxes(0, 1)
