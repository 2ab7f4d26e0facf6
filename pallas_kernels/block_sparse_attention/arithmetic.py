"""What the XLA implementations share: head layouts, and a softmax that allows for nothing."""

import jax.numpy as jnp


def softmax(logits):
  """Weights and log-normaliser over the last axis; all -inf gives zeros and -inf."""
  largest = finite(logits.max(-1))
  weights = jnp.exp(logits - largest[..., None])
  total = weights.sum(-1)
  lse = jnp.where(total > 0, largest + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
  return weights / jnp.where(total > 0, total, 1.0)[..., None], lse


def softmax_gradient(weights, dweights, dlse, scale):
  """Gradient of the unscaled scores: p (dp - sum(p dp) + dlse).

  The sum is taken from the float32 weights. The usual sum(dout out), from an output that
  was rounded to bfloat16, is twice as far off.
  """
  delta = (weights * dweights).sum(-1) - dlse
  return scale * weights * (dweights - delta[..., None])


def finite(x):
  return jnp.where(jnp.isneginf(x), 0.0, x)


def split_heads(x_BTHD, num_kv_heads):
  b, t, h, d = x_BTHD.shape
  return x_BTHD.reshape(b, t, num_kv_heads, h // num_kv_heads, d)


def join_heads(x_BTKGD):
  b, t, k, g, d = x_BTKGD.shape
  return x_BTKGD.reshape(b, t, k * g, d)


def heads_first(x_BTH, num_kv_heads):
  b, t, h = x_BTH.shape
  return x_BTH.reshape(b, t, num_kv_heads, h // num_kv_heads).transpose(0, 2, 3, 1)


def einsum_f32(equation, *operands):
  return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)
