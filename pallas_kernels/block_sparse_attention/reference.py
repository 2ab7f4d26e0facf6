"""The definition. Dense, float32, no cleverness: implementations are judged by this file."""

import jax
import jax.numpy as jnp


def block_sparse_attention(
  q_BTHD, k_BSKD, v_BSKD, blocks_BTKM, segments_BT, *, block_size, scale
):
  (b, t, h, d), (_, s, k, _) = q_BTHD.shape, k_BSKD.shape
  q_BTKGD = q_BTHD.reshape(b, t, k, h // k, d)
  logits_BTKGS = scale * _einsum_f32("btkgd,bskd->btkgs", q_BTKGD, k_BSKD)

  # one_hot of -1, or of a block that is not there, is all zeros: it lists nothing.
  num_blocks = -(-s // block_size)
  listed_BTKN = jax.nn.one_hot(blocks_BTKM, num_blocks, dtype=bool).any(-2)
  seen_BTKS = jnp.repeat(listed_BTKN, block_size, axis=-1)[..., :s]
  seen_BTKS &= jnp.tri(t, s, dtype=bool)[None, :, None, :]
  if segments_BT is not None:
    seen_BTKS &= (segments_BT[:, :, None] == segments_BT[:, None, :])[:, :, None, :]
  logits_BTKGS = jnp.where(seen_BTKS[:, :, :, None], logits_BTKGS, -jnp.inf)

  lse_BTKG = jax.nn.logsumexp(logits_BTKGS, axis=-1)
  # Where nothing is seen lse is -inf; shifting by 0 instead keeps exp(-inf) = 0.
  shift_BTKG = jnp.where(jnp.isneginf(lse_BTKG), 0.0, lse_BTKG)
  weights_BTKGS = jnp.exp(logits_BTKGS - shift_BTKG[..., None])
  out_BTKGD = _einsum_f32("btkgs,bskd->btkgd", weights_BTKGS, v_BSKD)
  return out_BTKGD.reshape(b, t, h, d).astype(q_BTHD.dtype), lse_BTKG.reshape(b, t, h)


def _einsum_f32(equation, *operands):
  return jnp.einsum(equation, *(x.astype(jnp.float32) for x in operands), precision="highest")
