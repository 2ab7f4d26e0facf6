"""Full attention by cuDNN, on NVIDIA GPUs from Ampere on.

cuDNN takes a bias in JAX as one number per query and key, which does not fit in memory where
rows are long. Biases of keys come as further channels instead: of keys, the bias; of queries,
1 (see `fold`).
"""

import jax
import jax.numpy as jnp

# Head sizes come in steps of so many; biases take one step.
_STEP = 8


def why_not(dtype, head_dim: int, *, has_documents: bool, has_bias: bool = False) -> str | None:
  """Why cuDNN cannot run here with these; None if it can."""
  device, dtype = jax.devices()[0], jnp.dtype(dtype)
  if device.platform != "gpu":
    return f"needs an NVIDIA GPU, this is {device.device_kind}"
  capability = float(device.compute_capability)
  if capability < 8.0:
    return f"needs compute capability 8.0, {device.device_kind} has {capability}"
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f"takes bfloat16 or float16, not {dtype.name}"
  limit = 256 if capability >= 9.0 else 128
  if has_bias:
    limit -= _STEP
  if head_dim % _STEP or head_dim > limit:
    those = "head sizes, with biases of keys," if has_bias else "head sizes"
    return f"takes {those} up to {limit} in steps of {_STEP}, not {head_dim}"
  if has_documents and capability < 9.0:
    return (
      "separates packed documents from compute capability 9.0 on, "
      f"{device.device_kind} has {capability}"
    )
  return None


def full_attention(q_BTHD, k_BTKD, v_BTKD, segments_BT, max_documents, window, key_bias_BTK):
  t, d = q_BTHD.shape[1], q_BTHD.shape[-1]
  scale, qkv = d**-0.5, (q_BTHD, k_BTKD, v_BTKD)
  if key_bias_BTK is not None:
    qkv = fold(*qkv, key_bias_BTK, scale)
  # JAX refuses to differentiate rows of an odd length. No query sees what comes after it.
  qkv = [_make_even(x) for x in qkv]
  if segments_BT is not None:
    segments_BT = _make_even(segments_BT, mode="edge")
  return _attend(*qkv, segments_BT, max_documents, window, scale)[:, :t, :, :d]


def _make_even(x_BT, mode: str = "constant"):
  """One position more where their number is odd."""
  padding = [(0, 0), (0, x_BT.shape[1] % 2)] + [(0, 0)] * (x_BT.ndim - 2)
  return jnp.pad(x_BT, padding, mode=mode)


def fold(q_BTHD, k_BTKD, v_BTKD, key_bias_BTK, scale: float):
  """Queries, keys and values of more channels, whose scaled products include the bias.

  A bias is the sum of three numbers of the keys' dtype: all 24 bits that float32 has, in
  bfloat16 as well, because the products are added up in float32. Its gradient is that of the
  first, rounded to the keys' dtype like theirs. The values' further channels are 0.
  """
  dtype = k_BTKD.dtype
  rest = key_bias_BTK.astype(jnp.float32) / scale
  parts = []
  for _ in range(3):
    # A cast to and fro, which XLA is free to leave out, would leave nothing for the others.
    part = jax.lax.reduce_precision(rest, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)
    parts.append(part.astype(dtype))
    rest = jax.lax.stop_gradient(rest - part)

  def widen(x, channels):
    channels = jnp.stack(channels, axis=-1).astype(x.dtype)
    empty = jnp.zeros((*x.shape[:-1], _STEP - channels.shape[-1]), x.dtype)
    return jnp.concatenate([x, channels, empty], axis=-1)

  one_BTH, zero_BTK = jnp.ones(q_BTHD.shape[:-1]), jnp.zeros(v_BTKD.shape[:-1])
  return widen(q_BTHD, [one_BTH] * 3), widen(k_BTKD, parts), widen(v_BTKD, [zero_BTK])


def _attend(q_BTHD, k_BTKD, v_BTKD, segments_BT, max_documents, window, scale):
  if segments_BT is None or max_documents == 1:
    return jax.nn.dot_product_attention(
      q_BTHD,
      k_BTKD,
      v_BTKD,
      is_causal=True,
      scale=scale,
      # Keys to the left and to the right of a query's own.
      local_window_size=None if window is None else (window - 1, 0),
      implementation="cudnn",
    )
  # jax.nn has no argument for packed documents; its own cuDNN call does.
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  lengths_BM, offsets_BM, has_room_B = document_offsets(segments_BT, max_documents)
  out_BTHD = cudnn.dot_product_attention(
    q_BTHD,
    k_BTKD,
    v_BTKD,
    q_seqlen=lengths_BM,
    kv_seqlen=lengths_BM,
    q_offsets=offsets_BM,
    kv_offsets=offsets_BM,
    scale=scale,
    mask_type=cudnn.MaskType.PADDING_CAUSAL,
    sliding_window_length=window,
  )
  return jnp.where(has_room_B[:, None, None, None], out_BTHD, jnp.nan)


def document_offsets(segments_BT, max_documents: int):
  """Where runs of equal segments lie, as cuDNN's packed form wants it.

  Returns:
    lengths [B, M] of the runs, their starts [B, M + 1] (no end among them), both -1 where
    there is no run, and whether a row has no more runs than fit, bool [B].
  """
  t = segments_BT.shape[1]
  begins_BT = jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1] - 1) != 0
  find = jax.vmap(lambda row: jnp.nonzero(row, size=max_documents + 1, fill_value=t)[0])
  starts_BM = find(begins_BT).astype(jnp.int32)
  lengths_BM = jnp.diff(starts_BM, axis=1)
  has_room_B = starts_BM[:, -1] == t
  offsets_BM = jnp.where(starts_BM < t, starts_BM, -1)
  return jnp.where(lengths_BM > 0, lengths_BM, -1), offsets_BM, has_room_B
