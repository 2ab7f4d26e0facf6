"""Attention of a chunk by cuDNN, on NVIDIA GPUs from Ampere on.

cuDNN's causal mask begins at the first query and the first key. So the keys of the chunk are
read with that mask, those before it with none and as long as they are; the two softmaxes are
one by their normalisers. Where there is a window, queries that nobody asked for stand for the
keys before the chunk, which are few.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.chunk_attention.problem import Problem
from pallas_kernels.full_attention import cudnn


def chunk_attention(problem: Problem, window: int | None) -> jax.Array:
  b, t, _, d = problem.q_BTHD.shape
  if problem.is_whole:
    return _causal(problem, window)
  if window is not None:
    return _in_window(problem, window)
  scale, qkv = d**-0.5, problem[:3]
  if problem.key_bias_BSK is not None:
    qkv = cudnn.fold(*qkv, problem.key_bias_BSK, scale)
  q_BTHD, k_BSKD, v_BSKD = qkv
  offset = problem.offset
  k_BTKD, v_BTKD = (_cut(x, offset, t) for x in (k_BSKD, v_BSKD))
  own_BTHD, own_lse_BTH = _attend(q_BTHD, k_BTKD, v_BTKD, scale)
  # A row of no keys has no softmax: where there is nothing before, one key is read for naught.
  lengths_B = jnp.broadcast_to(jnp.maximum(offset, 1), (b,))
  before_BTHD, before_lse_BTH = _attend(q_BTHD, k_BSKD, v_BSKD, scale, lengths_B)
  return merge(own_BTHD[..., :d], own_lse_BTH, before_BTHD[..., :d], before_lse_BTH, offset > 0)


def merge(own_BTHD, own_lse_BTH, before_BTHD, before_lse_BTH, is_there) -> jax.Array:
  """One softmax of two, by the logarithms of their normalisers; of the first if not there."""
  share_BTH1 = jax.nn.sigmoid(before_lse_BTH - own_lse_BTH)[..., None]
  own_f32, before_f32 = own_BTHD.astype(jnp.float32), before_BTHD.astype(jnp.float32)
  both_BTHD = own_f32 + share_BTH1 * (before_f32 - own_f32)
  return jnp.where(is_there, both_BTHD.astype(own_BTHD.dtype), own_BTHD)


def _causal(problem: Problem, window: int | None):
  q_BTHD, k_BTKD, v_BTKD, _, bias_BTK = problem
  return cudnn.full_attention(q_BTHD, k_BTKD, v_BTKD, None, None, window, bias_BTK)


def _in_window(problem: Problem, window: int):
  """Causal attention from `window - 1` keys before the chunk on, and of as many queries."""
  q_BTHD, k_BSKD, v_BSKD, offset, bias_BSK = problem
  t, s = q_BTHD.shape[1], k_BSKD.shape[1]
  n = min(s, t + window - 1)
  begin = jnp.maximum(offset - (n - t), 0)
  k_BNKD, v_BNKD = (_cut(x, begin, n) for x in (k_BSKD, v_BSKD))
  bias_BNK = None if bias_BSK is None else _cut(bias_BSK, begin, n)
  nobody_BNHD = jnp.zeros((q_BTHD.shape[0], n, *q_BTHD.shape[2:]), q_BTHD.dtype)
  place = offset - begin
  q_BNHD = jax.lax.dynamic_update_slice_in_dim(nobody_BNHD, q_BTHD, place, axis=1)
  part = Problem(q_BNHD, k_BNKD, v_BNKD, jnp.int32(0), bias_BNK)
  return _cut(_causal(part, window), place, t)


def _cut(x_BS, begin, length: int):
  return jax.lax.dynamic_slice_in_dim(x_BS, begin, length, axis=1)


def _attend(q_BTHD, k_BSKD, v_BSKD, scale, lengths_B=None):
  """Output, and the logarithm of the normaliser, float32 [B, T, H].

  Causal, or with lengths the keys of each row before its length.
  """
  # jax.nn.dot_product_attention rounds the logarithm to the dtype of the output.
  from jax._src.cudnn import fused_attention_stablehlo

  b, t = q_BTHD.shape[:2]
  masks, has_lengths = fused_attention_stablehlo.MaskType, lengths_B is not None
  out_BTHD, lse_BHT = fused_attention_stablehlo.dot_product_attention(
    q_BTHD,
    k_BSKD,
    v_BSKD,
    q_seqlen=jnp.full((b,), t, jnp.int32) if has_lengths else None,
    kv_seqlen=lengths_B,
    scale=scale,
    mask_type=masks.PADDING if has_lengths else masks.CAUSAL,
    return_residual=True,
  )
  return out_BTHD, lse_BHT.transpose(0, 2, 1)
