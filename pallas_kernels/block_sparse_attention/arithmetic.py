"""What the XLA implementations share: head layouts, and a softmax that allows for nothing."""

import jax.numpy as jnp


def softmax(logits):
  """Exponentials, their sum and its logarithm over the last axis.

  The weights are `exponentials / total`; dividing after the product with the values saves a
  pass over the scores. All -inf gives zeros, a total of 1 and -inf.
  """
  largest = finite(logits.max(-1))
  exponentials = jnp.exp(logits - largest[..., None])
  total = exponentials.sum(-1)
  is_any = total > 0
  total = jnp.where(is_any, total, 1.0)
  return exponentials, total, jnp.where(is_any, largest + jnp.log(total), -jnp.inf)


def weigh(equation, exponentials, total_BKGC, values):
  """The mean of the values under softmax weights, in their dtype, [B, C, K, G, D]."""
  out_BCKGD = einsum_f32(equation, exponentials.astype(values.dtype), values)
  return (out_BCKGD / total_BKGC.transpose(0, 3, 1, 2)[..., None]).astype(values.dtype)


def softmax_gradient(weights, dweights, dlse):
  """Gradient of the scores: p (dp - sum(p dp) + dlse).

  The sum is taken from the float32 weights. The usual sum(dout out), from an output that
  was rounded to bfloat16, is twice as far off.
  """
  delta = (weights * dweights).sum(-1) - dlse
  return weights * (dweights - delta[..., None])


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


def at_positions(x_BS, position_C):
  """The columns of `x` at positions, which may be beyond the end where a stripe is padded."""
  return x_BS[:, jnp.minimum(position_C, x_BS.shape[1] - 1)]
