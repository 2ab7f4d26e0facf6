"""The definition. Dense, float32, no cleverness: implementations are judged by this file."""

import jax
import jax.numpy as jnp


def block_sparse_attention(problem, known_offset, block_size, scale):
  del known_offset  # the same number as the problem's
  q_BTHD, k_BSKD, v_BSKD, blocks_BTKM, query_offset, segments_BS, key_bias_BSK = problem
  (b, t, h, d), (_, s, k, _) = q_BTHD.shape, k_BSKD.shape
  q_BTKGD = q_BTHD.reshape(b, t, k, h // k, d)
  logits_BTKGS = scale * _einsum_f32("btkgd,bskd->btkgs", q_BTKGD, k_BSKD)
  if key_bias_BSK is not None:
    bias_BKS = key_bias_BSK.astype(jnp.float32).transpose(0, 2, 1)
    logits_BTKGS += bias_BKS[:, None, :, None]

  # one_hot of -1, or of a block that is not there, is all zeros: it lists nothing.
  num_blocks = -(-s // block_size)
  listed_BTKN = jax.nn.one_hot(blocks_BTKM, num_blocks, dtype=bool).any(-2)
  seen_BTKS = jnp.repeat(listed_BTKN, block_size, axis=-1)[..., :s]
  position_T = query_offset + jnp.arange(t)
  seen_BTKS &= (position_T[:, None] >= jnp.arange(s)[None, :])[None, :, None]
  if segments_BS is not None:
    own_BT = segments_BS[:, position_T]
    seen_BTKS &= (own_BT[:, :, None] == segments_BS[:, None, :])[:, :, None]
  logits_BTKGS = jnp.where(seen_BTKS[:, :, :, None], logits_BTKGS, -jnp.inf)

  lse_BTKG = jax.nn.logsumexp(logits_BTKGS, axis=-1)
  # Where nothing is seen lse is -inf; shifting by 0 instead keeps exp(-inf) = 0.
  shift_BTKG = jnp.where(jnp.isneginf(lse_BTKG), 0.0, lse_BTKG)
  weights_BTKGS = jnp.exp(logits_BTKGS - shift_BTKG[..., None])
  out_BTKGD = _einsum_f32("btkgs,bskd->btkgd", weights_BTKGS, v_BSKD)
  return out_BTKGD.reshape(b, t, h, d).astype(q_BTHD.dtype), lse_BTKG.reshape(b, t, h)


def _einsum_f32(equation, *operands):
  return jnp.einsum(equation, *(x.astype(jnp.float32) for x in operands), precision="highest")
