"""The definition. Dense, float32, no cleverness: implementations are judged by this file."""

import jax
import jax.numpy as jnp

from pallas_kernels.chunk_attention.problem import Problem


def chunk_attention(problem: Problem, window: int | None) -> jax.Array:
  q_BTHD, k_BSKD, v_BSKD, offset, key_bias_BSK = problem
  (b, t, h, d), (_, s, k, _) = q_BTHD.shape, k_BSKD.shape
  q_BTKGD = q_BTHD.reshape(b, t, k, h // k, d)
  logits_BKGTS = d**-0.5 * _einsum_f32("btkgd,bskd->bkgts", q_BTKGD, k_BSKD)
  if key_bias_BSK is not None:
    bias_BKS = key_bias_BSK.astype(jnp.float32).transpose(0, 2, 1)
    logits_BKGTS += bias_BKS[:, :, None, None]
  age_TS = offset + jnp.arange(t)[:, None] - jnp.arange(s)[None]
  seen_TS = age_TS >= 0
  if window is not None:
    seen_TS &= age_TS < window
  logits_BKGTS = jnp.where(seen_TS[None, None, None], logits_BKGTS, -jnp.inf)
  weights_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1)
  out_BTKGD = _einsum_f32("bkgts,bskd->btkgd", weights_BKGTS, v_BSKD)
  return out_BTKGD.reshape(b, t, h, d).astype(q_BTHD.dtype)


def _einsum_f32(equation, *operands):
  return jnp.einsum(equation, *(x.astype(jnp.float32) for x in operands), precision="highest")
