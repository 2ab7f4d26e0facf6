"""Full attention in plain XLA, for any device, without holding all scores at once."""

import jax
import jax.numpy as jnp

# Score elements (float32) per stripe of queries.
STRIPE_ELEMENTS = 2**26
# A stripe of a sliding window has at least so many queries: very short ones take longer.
LEAST_STRIPE = 128


def full_attention(q_BTHD, k_BTKD, v_BTKD, segments_BT, max_documents, window, key_bias_BTK):
  """Stripes of queries against the keys they may see; recomputed in the backward pass.

  Those are all keys or, where there is a window, as many as the stripe and the window before
  it have; keys that are not there, before the first, are hidden.
  """
  del max_documents  # any number
  b, t, h, _ = q_BTHD.shape
  if segments_BT is None:
    segments_BT = jnp.ones((b, t), jnp.int32)
  if window is None:
    before, size = 0, min(t, max(1, STRIPE_ELEMENTS // (b * h * t)))
    num_keys = t
  else:
    before, most = window - 1, max(window, LEAST_STRIPE)
    size = min(t, most, max(1, STRIPE_ELEMENTS // (b * h * 2 * most)))
    num_keys = size + before

  def pad(x):
    return jnp.pad(x, [(0, 0), (before, 0)] + [(0, 0)] * (x.ndim - 2))

  k_BSKD, v_BSKD, segments_BS = pad(k_BTKD), pad(v_BTKD), pad(segments_BT)
  bias_BSK = None if key_bias_BTK is None else pad(key_bias_BTK.astype(jnp.float32))

  @jax.checkpoint
  def stripe(start):
    def cut(x, length):
      begin = start if length < x.shape[1] else 0
      return jax.lax.dynamic_slice_in_dim(x, begin, length, axis=1)

    first_key = 0 if window is None else start - before
    position_C1 = start + jnp.arange(size)[:, None]
    position_1X = first_key + jnp.arange(num_keys)[None, :]
    is_seen_CX = (position_C1 >= position_1X) & (position_1X >= 0)
    if window is not None:
      is_seen_CX &= position_C1 - position_1X < window
    own_BC, of_key_BX = cut(segments_BT, size), cut(segments_BS, num_keys)
    is_same_BCX = own_BC[:, :, None] == of_key_BX[:, None, :]
    bias_BH1X = None
    if bias_BSK is not None:
      # One number per key: XLA spreads it over the queries of a stripe as it adds it.
      bias_BKX = cut(bias_BSK, num_keys).transpose(0, 2, 1)
      bias_BH1X = jnp.repeat(bias_BKX, h // bias_BKX.shape[1], axis=1)[:, :, None]
    return jax.nn.dot_product_attention(
      cut(q_BTHD, size),
      cut(k_BSKD, num_keys),
      cut(v_BSKD, num_keys),
      bias=bias_BH1X,
      mask=(is_same_BCX & is_seen_CX[None])[:, None],
    )

  if size == t:
    return stripe(0)
  # The last stripe overlaps the one before it rather than run over the end.
  starts = jnp.minimum(jnp.arange(0, t, size), t - size)
  outs = jax.lax.map(stripe, starts).swapaxes(0, 1)
  body = outs[:, :-1].reshape(b, -1, *q_BTHD.shape[2:])
  rest = t - body.shape[1]
  return jnp.concatenate([body, outs[:, -1, size - rest :]], axis=1)
