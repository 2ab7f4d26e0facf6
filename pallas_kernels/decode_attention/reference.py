"""The definition. Dense, float32, no cleverness: implementations are judged by this file."""

import jax
import jax.numpy as jnp


def decode_attention(problem, scale):
  q_BHD, k_PXD, v_PXD, pages_BKM, begin_BKM, end_BKM, key_bias_PX = problem
  (b, h, d), (p, x, _), (_, k, m) = q_BHD.shape, k_PXD.shape, pages_BKM.shape
  key_111X = jnp.arange(x)[None, None, None]
  is_read_BKMX = (begin_BKM[..., None] <= key_111X) & (key_111X < end_BKM[..., None])
  is_read_BKMX &= ((pages_BKM >= 0) & (pages_BKM < p))[..., None]

  def gather(array):
    """Of every slot's keys, in one line S; what is not read counts as 0."""
    taken = jnp.take(array.astype(jnp.float32), pages_BKM, axis=0, mode="clip")
    is_read = is_read_BKMX.reshape(b, k, m, x, *[1] * (array.ndim - 2))
    return jnp.where(is_read, taken, 0.0).reshape(b, k, m * x, *array.shape[2:])

  q_BKGD = q_BHD.reshape(b, k, h // k, d)
  logits_BKGS = scale * _einsum_f32("bkgd,bksd->bkgs", q_BKGD, gather(k_PXD))
  if key_bias_PX is not None:
    logits_BKGS += gather(key_bias_PX)[:, :, None]
  logits_BKGS = jnp.where(is_read_BKMX.reshape(b, k, 1, m * x), logits_BKGS, -jnp.inf)

  lse_BKG = jax.nn.logsumexp(logits_BKGS, axis=-1)
  # Where nothing is read lse is -inf; shifting by 0 instead keeps exp(-inf) = 0.
  shift_BKG = jnp.where(jnp.isneginf(lse_BKG), 0.0, lse_BKG)
  weights_BKGS = jnp.exp(logits_BKGS - shift_BKG[..., None])
  out_BKGD = _einsum_f32("bkgs,bksd->bkgd", weights_BKGS, gather(v_PXD))
  return out_BKGD.reshape(b, h, d).astype(q_BHD.dtype), lse_BKG.reshape(b, h)


def _einsum_f32(equation, *operands):
  return jnp.einsum(equation, *(x.astype(jnp.float32) for x in operands), precision="highest")
