"""Full attention in plain XLA, for any device, without holding all scores at once."""

import jax
import jax.numpy as jnp

# Score elements (float32) per stripe of queries.
STRIPE_ELEMENTS = 2**26


def full_attention(q_BTHD, k_BTKD, v_BTKD, segments_BT, max_documents, key_bias_BTK):
  """Stripes of queries against all keys; each is recomputed in the backward pass."""
  del max_documents  # any number
  b, t, h, _ = q_BTHD.shape
  size = min(t, max(1, STRIPE_ELEMENTS // (b * h * t)))
  if segments_BT is None:
    segments_BT = jnp.ones((b, t), jnp.int32)
  bias_BH1S = None
  if key_bias_BTK is not None:
    # One number per key: XLA spreads it over the queries of a stripe as it adds it.
    bias_BKS = key_bias_BTK.astype(jnp.float32).transpose(0, 2, 1)
    bias_BH1S = jnp.repeat(bias_BKS, h // k_BTKD.shape[2], axis=1)[:, :, None]

  @jax.checkpoint
  def stripe(start):
    def cut(x):
      return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

    is_earlier_CS = start + jnp.arange(size)[:, None] >= jnp.arange(t)[None, :]
    is_same_BCS = cut(segments_BT)[:, :, None] == segments_BT[:, None, :]
    return jax.nn.dot_product_attention(
      cut(q_BTHD),
      k_BTKD,
      v_BTKD,
      bias=bias_BH1S,
      mask=(is_same_BCS & is_earlier_CS[None])[:, None],
    )

  if size == t:
    return stripe(0)
  # The last stripe overlaps the one before it rather than run over the end.
  starts = jnp.minimum(jnp.arange(0, t, size), t - size)
  outs = jax.lax.map(stripe, starts).swapaxes(0, 1)
  body = outs[:, :-1].reshape(b, -1, *q_BTHD.shape[2:])
  rest = t - body.shape[1]
  return jnp.concatenate([body, outs[:, -1, size - rest :]], axis=1)
