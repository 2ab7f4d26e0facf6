"""The definition. Dense, float32, no cleverness: implementations are judged by this file."""

import jax
import jax.numpy as jnp


def full_attention(q_BTHD, k_BTKD, v_BTKD, segments_BT, max_documents, window, key_bias_BTK):
  del max_documents  # any number
  (b, t, h, d), k = q_BTHD.shape, k_BTKD.shape[2]
  q_BTKGD = q_BTHD.reshape(b, t, k, h // k, d)
  logits_BKGTS = d**-0.5 * _einsum_f32("btkgd,bskd->bkgts", q_BTKGD, k_BTKD)
  if key_bias_BTK is not None:
    bias_BKS = key_bias_BTK.astype(jnp.float32).transpose(0, 2, 1)
    logits_BKGTS += bias_BKS[:, :, None, None]
  seen_BTS = jnp.tri(t, dtype=bool)[None]
  if window is not None:
    seen_BTS = seen_BTS & ~jnp.tri(t, k=-window, dtype=bool)[None]
  if segments_BT is not None:
    seen_BTS = seen_BTS & (segments_BT[:, :, None] == segments_BT[:, None, :])
  logits_BKGTS = jnp.where(seen_BTS[:, None, None], logits_BKGTS, -jnp.inf)
  weights_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1)
  out_BTKGD = _einsum_f32("bkgts,bskd->btkgd", weights_BKGTS, v_BTKD)
  return out_BTKGD.reshape(b, t, h, d).astype(q_BTHD.dtype)


def _einsum_f32(equation, *operands):
  return jnp.einsum(equation, *(x.astype(jnp.float32) for x in operands), precision="highest")
