"""Full causal attention within documents, on cuDNN where it runs and in XLA elsewhere."""

from flax import linen as nn
import jax
import jax.numpy as jnp

from sparsejax import errors, sharding
from sparsejax.attention import method

# Score elements (float32) per stripe of queries on the XLA path.
_STRIPE_ELEMENTS = 2**26


class Full(nn.Module):
  """Full attention; run sparse, it reads the blocks that `sparse` selects."""

  options: method.Options
  sparse: nn.Module

  def __call__(self, q_BTHD, k_BTKD, v_BTKD, tokens, stream) -> method.Attended:
    if stream == "sparse":
      return self.sparse(q_BTHD, k_BTKD, v_BTKD, tokens, stream)
    out_BTHD = full_stream(q_BTHD, k_BTKD, v_BTKD, tokens, self.options)
    return method.Attended(out_BTHD, jnp.float32(0))


def full_stream(q_BTHD, k_BTKD, v_BTKD, tokens: method.Tokens, options: method.Options):
  """The full stream of every method that scores keys by their product with the query."""
  stops = options.document_mask in ("both", "full")
  return full_attention(
    q_BTHD,
    k_BTKD,
    v_BTKD,
    tokens.segments_BT if stops else None,
    max_documents=options.max_documents,
    implementation=options.full_implementation,
  )


def full_attention(
  q_BTHD, k_BTKD, v_BTKD, segments_BT, *, max_documents: int, implementation: str = "auto"
) -> jax.Array:
  """Causal softmax attention, [B, T, H, D].

  Args:
    q_BTHD, k_BTKD, v_BTKD: of one dtype.
    segments_BT: document of each token, in runs; tokens of different documents do not see
      each other. None is one document.
    max_documents: documents a row may hold. A row with more comes out as NaN on cuDNN,
      rather than with borders missing.
    implementation: `cudnn`, `xla`, or `auto` (see `choose`).

  Raises:
    ConfigError: cuDNN is asked for and cannot run here.
  """
  chosen, why = choose(
    implementation, q_BTHD.dtype, q_BTHD.shape[-1], has_documents=segments_BT is not None
  )
  if implementation not in ("auto", chosen):
    raise errors.ConfigError(
      f"attention.full_implementation={implementation!r} cannot run: {why}. Set it to 'auto'."
    )
  if chosen == "xla":

    def run(q, k, v, segments):
      return _xla(q, k, v, segments)
  else:

    def run(q, k, v, segments):
      return _cudnn(q, k, v, segments, max_documents)

  heads, kv_heads = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
  segments = None if segments_BT is None else ("batch", None)
  return sharding.per_device(run, (heads, kv_heads, kv_heads, segments), heads)(
    q_BTHD, k_BTKD, v_BTKD, segments_BT
  )


def choose(
  implementation: str, dtype, head_dim: int, *, has_documents: bool
) -> tuple[str, str]:
  """The backend for a shape on the first device, and the reason in words."""
  device = jax.devices()[0]
  if implementation == "xla":
    return "xla", "asked for"
  if device.platform != "gpu":
    return "xla", f"cuDNN needs an NVIDIA GPU, this is {device.device_kind}"
  capability = float(device.compute_capability)
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
    return "xla", f"cuDNN attention takes bfloat16 or float16, not {jnp.dtype(dtype).name}"
  if capability < 8.0:
    return (
      "xla",
      f"cuDNN attention needs compute capability 8.0, {device.device_kind} has less",
    )
  limit = 256 if capability >= 9.0 else 128
  if head_dim % 8 or head_dim > limit:
    return "xla", f"cuDNN takes head sizes up to {limit} in steps of 8, not {head_dim}"
  if has_documents and capability < 9.0:
    return "xla", "cuDNN separates packed documents from compute capability 9.0 on"
  return "cudnn", f"{device.device_kind}, {jnp.dtype(dtype).name}, head size {head_dim}"


def _xla(q_BTHD, k_BTKD, v_BTKD, segments_BT):
  """Stripes of queries against all keys; each is recomputed in the backward pass."""
  b, t, h, _ = q_BTHD.shape
  size = min(t, max(1, _STRIPE_ELEMENTS // (b * h * t)))
  if segments_BT is None:
    segments_BT = jnp.ones((b, t), jnp.int32)

  @jax.checkpoint
  def stripe(start):
    def cut(x):
      return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

    is_earlier_CS = start + jnp.arange(size)[:, None] >= jnp.arange(t)[None, :]
    is_same_BCS = cut(segments_BT)[:, :, None] == segments_BT[:, None, :]
    return jax.nn.dot_product_attention(
      cut(q_BTHD), k_BTKD, v_BTKD, mask=(is_same_BCS & is_earlier_CS[None])[:, None]
    )

  if size == t:
    return stripe(0)
  # The last stripe overlaps the one before it rather than run over the end.
  starts = jnp.minimum(jnp.arange(0, t, size), t - size)
  outs = jax.lax.map(stripe, starts).swapaxes(0, 1)
  body = outs[:, :-1].reshape(b, -1, *q_BTHD.shape[2:])
  rest = t - body.shape[1]
  return jnp.concatenate([body, outs[:, -1, size - rest :]], axis=1)


def _cudnn(q_BTHD, k_BTKD, v_BTKD, segments_BT, max_documents: int):
  if segments_BT is None or max_documents == 1:
    return jax.nn.dot_product_attention(
      q_BTHD, k_BTKD, v_BTKD, is_causal=True, implementation="cudnn"
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
    scale=q_BTHD.shape[-1] ** -0.5,
    mask_type=cudnn.MaskType.PADDING_CAUSAL,
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
