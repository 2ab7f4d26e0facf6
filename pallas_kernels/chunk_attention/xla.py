"""Attention of a chunk in plain XLA, for any device: tiles of scores, a softmax as it goes.

Only the keys that some query of a stripe sees are read, however many there is room for.

Extra shape letters:
  C queries of a stripe   X keys of a tile   G = H // K
"""

import jax
import jax.numpy as jnp

from pallas_kernels.chunk_attention.problem import Problem

# Score elements (float32) of a tile.
TILE_ELEMENTS = 2**26
# Queries of a stripe at most.
MOST_QUERIES = 1024


def chunk_attention(problem: Problem, window: int | None) -> jax.Array:
  q_BTHD, k_BSKD, v_BSKD, offset, key_bias_BSK = problem
  (b, t, h, d), (_, s, k, _) = q_BTHD.shape, k_BSKD.shape
  num_queries = max(1, min(t, MOST_QUERIES, TILE_ELEMENTS // (b * h)))
  num_keys = max(1, min(s, TILE_ELEMENTS // (b * h * num_queries)))
  q_BTKGD = q_BTHD.reshape(b, t, k, h // k, d)

  def stripe(start):
    q_BCKGD = jax.lax.dynamic_slice_in_dim(q_BTKGD, start, num_queries, axis=1)
    first = offset + start
    position_C1 = first + jnp.arange(num_queries)[:, None]

    def add(number, sums):
      most_BKGC, total_BKGC, out_BKGCD = sums
      # The last tile overlaps the one before it rather than run over the end.
      begin = jnp.minimum(number * num_keys, s - num_keys)
      k_BXKD, v_BXKD = (
        jax.lax.dynamic_slice_in_dim(x, begin, num_keys, axis=1) for x in (k_BSKD, v_BSKD)
      )
      logits_BKGCX = d**-0.5 * jnp.einsum(
        "bckgd,bxkd->bkgcx", q_BCKGD, k_BXKD, preferred_element_type=jnp.float32
      )
      if key_bias_BSK is not None:
        bias_BXK = jax.lax.dynamic_slice_in_dim(key_bias_BSK, begin, num_keys, axis=1)
        logits_BKGCX += bias_BXK.astype(jnp.float32).transpose(0, 2, 1)[:, :, None, None]
      key_1X = begin + jnp.arange(num_keys)[None]
      is_seen_CX = (key_1X <= position_C1) & (key_1X >= number * num_keys)
      if window is not None:
        is_seen_CX &= position_C1 - key_1X < window
      logits_BKGCX = jnp.where(is_seen_CX[None, None, None], logits_BKGCX, -jnp.inf)
      after_BKGC = jnp.maximum(most_BKGC, logits_BKGCX.max(-1))
      # Nothing may have been seen yet.
      shift_BKGC = jnp.where(jnp.isneginf(after_BKGC), 0.0, after_BKGC)
      weights_BKGCX = jnp.exp(logits_BKGCX - shift_BKGC[..., None])
      keep_BKGC = jnp.exp(most_BKGC - shift_BKGC)
      added_BKGCD = jnp.einsum(
        "bkgcx,bxkd->bkgcd",
        weights_BKGCX.astype(v_BXKD.dtype),
        v_BXKD,
        preferred_element_type=jnp.float32,
      )
      total_BKGC = total_BKGC * keep_BKGC + weights_BKGCX.sum(-1)
      return after_BKGC, total_BKGC, out_BKGCD * keep_BKGC[..., None] + added_BKGCD

    oldest = 0 if window is None else jnp.maximum(first - window + 1, 0) // num_keys
    end = (first + num_queries - 1) // num_keys + 1
    shape = b, k, h // k, num_queries
    empty = jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, d))
    _, total_BKGC, out_BKGCD = jax.lax.fori_loop(oldest, end, add, empty)
    out_BKGCD /= total_BKGC[..., None]
    return out_BKGCD.transpose(0, 3, 1, 2, 4).reshape(b, num_queries, h, d).astype(q_BTHD.dtype)

  if num_queries == t:
    return stripe(jnp.int32(0))
  starts = jnp.minimum(jnp.arange(0, t, num_queries), t - num_queries)
  outs = jax.lax.map(stripe, starts).swapaxes(0, 1)
  body = outs[:, :-1].reshape(b, -1, h, d)
  rest = t - body.shape[1]
  return jnp.concatenate([body, outs[:, -1, num_queries - rest :]], axis=1)
