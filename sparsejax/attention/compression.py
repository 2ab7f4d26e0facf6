"""Keys and values of whole windows made one each, and attention to them (NSA's first branch).

After arXiv:2502.11089, section 3.3.1. Window w covers tokens `w stride` to `w stride + size -
1`; only complete ones exist. A query sees those that are complete at its position and end in
its document; keys of other documents in them count as absent.

Letters: B batch, T tokens, W windows, X tokens of a window, H query heads, K key/value heads,
D head size, F width within the MLP; of attention, C queries that see the same windows, G query
heads of a key head, L = K C G heads of what is left.
"""

from collections.abc import Callable

from flax import linen as nn
import jax
import jax.numpy as jnp

import pallas_kernels


class Mlp(nn.Module):
  """The learned map from the tokens of a window to one, with positions within the window.

  The paper gives neither its depth nor its width: here one hidden layer as wide as a head,
  its own for every key/value head.
  """

  size: int
  stride: int
  kernel_init: nn.initializers.Initializer

  @nn.compact
  def __call__(self, x_BTKD, segments_BT) -> jax.Array:
    """One vector for every complete window, [B, W, K, D]."""
    x, (k, d), f = self.size, x_BTKD.shape[2:], x_BTKD.shape[3]
    dtype = x_BTKD.dtype

    def weight(name, shape, axes):
      init = nn.with_logical_partitioning(self.kernel_init, axes)
      return self.param(name, init, shape).astype(dtype)

    position_XKD = weight("position", (x, k, d), (None, "kv_heads", None))
    up_XKDF = weight("up", (x, k, d, f), (None, "kv_heads", None, None))
    down_KFD = weight("down", (k, f, d), ("kv_heads", None, None))
    windows_BWXKD = windows(x_BTKD, self.size, self.stride) + position_XKD[None, None]
    if segments_BT is not None:
      is_own_BWX = _is_own(segments_BT, self.size, self.stride)
      windows_BWXKD = jnp.where(is_own_BWX[..., None, None], windows_BWXKD, 0)
    hidden_BWKF = nn.silu(jnp.einsum("bwxkd,xkdf->bwkf", windows_BWXKD, up_XKDF))
    return jnp.einsum("bwkf,kfd->bwkd", hidden_BWKF, down_KFD)


def mean(x_BTKD, segments_BT, *, size: int, stride: int) -> jax.Array:
  """The mean of every complete window [B, W, K, D], as SSA's NSA baseline compresses."""
  windows_BWXKD = windows(x_BTKD, size, stride).astype(jnp.float32)
  if segments_BT is None:
    return windows_BWXKD.mean(2).astype(x_BTKD.dtype)
  is_own_BWX11 = _is_own(segments_BT, size, stride)[..., None, None]
  total_BWKD = jnp.where(is_own_BWX11, windows_BWXKD, 0).sum(2)
  return (total_BWKD / is_own_BWX11.sum(2)).astype(x_BTKD.dtype)


def windows(x_BT, size: int, stride: int) -> jax.Array:
  """The tokens of every complete window, [B, W, X, ...]; the stride divides the size."""
  b, t, *rest = x_BT.shape
  num_windows, parts = max(0, (t - size) // stride + 1), size // stride
  if num_windows == 0:
    return jnp.zeros((b, 0, size, *rest), x_BT.dtype)
  # Windows are runs of strides: slices, where a gather would not be divided over a mesh.
  used = (num_windows + parts - 1) * stride
  strides = x_BT[:, :used].reshape(b, -1, stride, *rest)
  return jnp.concatenate([strides[:, i : i + num_windows] for i in range(parts)], axis=2)


def _is_own(segments_BT, size: int, stride: int) -> jax.Array:
  """Which tokens of a window are of the document of its last one, bool [B, W, X]."""
  segments_BWX = windows(segments_BT, size, stride)
  return segments_BWX == segments_BWX[..., -1:]


def attend(
  q_BTHD,
  keys_BWKD,
  values_BWKD,
  segments_BT,
  *,
  size: int,
  stride: int,
  max_documents: int | None = None,
  implementation: str = "auto",
) -> jax.Array:
  """Attention [B, T, H, D] to the windows that a query sees; 0 where it sees none.

  Scores are scaled by D ** -0.5. A window is complete for `stride` queries at the same time.
  Such queries see the same windows, but where a document begins among them, whose windows
  all end later. They become query heads of a single position: what is left is causal
  attention of as many positions as there are windows.

  Args:
    q_BTHD: queries.
    keys_BWKD, values_BWKD: of windows.
    segments_BT: document of each token; None is one.
    size, stride: of windows.
    max_documents, implementation: see `pallas_kernels.full_attention`.
  """
  (b, t, h, d), (w, k) = q_BTHD.shape, keys_BWKD.shape[1:3]
  if w == 0:
    return jnp.zeros_like(q_BTHD)
  first, g = size - 1, h // k

  def group(x_BT):
    """What belongs to the tokens from the first complete window on, [B, W, C, ...]."""
    x_BT = x_BT[:, first:]
    missing = w * stride - x_BT.shape[1]
    x_BT = jnp.pad(x_BT, [(0, 0), (0, missing)] + [(0, 0)] * (x_BT.ndim - 2))
    return x_BT.reshape(b, w, stride, *x_BT.shape[2:])

  q_BWCKGD = group(q_BTHD).reshape(b, w, stride, k, g, d)
  q_BWKCGD = q_BWCKGD.transpose(0, 1, 3, 2, 4, 5)
  segments_BW = None if segments_BT is None else windows(segments_BT, size, stride)[..., -1]
  out_BWLD = pallas_kernels.full_attention(
    q_BWKCGD.reshape(b, w, k * stride * g, d),
    keys_BWKD,
    values_BWKD,
    segments_BT=segments_BW,
    max_documents=max_documents,
    implementation=implementation,
  )
  out_BWCKGD = out_BWLD.reshape(b, w, k, stride, g, d).transpose(0, 1, 3, 2, 4, 5)
  if segments_BT is not None:
    is_own_BWC = group(segments_BT) == segments_BW[:, :, None]
    out_BWCKGD = jnp.where(is_own_BWC[..., None, None, None], out_BWCKGD, 0)
  out_BTHD = out_BWCKGD.reshape(b, w * stride, h, d)[:, : t - first]
  return jnp.pad(out_BTHD, [(0, 0), (first, 0), (0, 0), (0, 0)])


def attend_of_chunk(
  q_BTHD,
  keys_BWKD,
  values_BWKD,
  offset,
  *,
  size: int,
  stride: int,
  implementation: str = "auto",
) -> jax.Array:
  """The same of a chunk of queries of a single document, [B, T, H, D].

  Args:
    q_BTHD: queries.
    keys_BWKD, values_BWKD: of windows; those that end behind the chunk may be anything.
    offset: position of the first query, a multiple of the stride.
    size, stride: of windows.
    implementation: see `pallas_kernels.chunk_attention`.
  """
  (b, t, h, d), (w, k) = q_BTHD.shape, keys_BWKD.shape[1:3]
  g, most = h // k, size // stride
  # The first query belongs to a window that is complete for one query before the chunk already,
  # unless windows begin at every token.
  early = (1 - size) % stride
  n = -(-(early + t) // stride)
  first = (offset + 1 - size - early) // stride
  # Queries that see no window are left out, so that the first one left sees the first window.
  num_blind = jnp.maximum(-first, 0)
  behind = n * stride - early - t + most * stride
  q_BXHD = jnp.pad(q_BTHD, [(0, 0), (early, behind), (0, 0), (0, 0)])
  q_BXHD = jax.lax.dynamic_slice_in_dim(q_BXHD, num_blind * stride, n * stride, axis=1)
  q_BNCKGD = q_BXHD.reshape(b, n, stride, k, g, d)
  missing = [(0, 0), (0, max(0, n - w)), (0, 0), (0, 0)]
  out_BNLD = pallas_kernels.chunk_attention(
    q_BNCKGD.transpose(0, 1, 3, 2, 4, 5).reshape(b, n, k * stride * g, d),
    jnp.pad(keys_BWKD, missing),
    jnp.pad(values_BWKD, missing),
    jnp.maximum(first, 0),
    implementation=implementation,
  )
  out_BNCKGD = out_BNLD.reshape(b, n, k, stride, g, d).transpose(0, 1, 3, 2, 4, 5)
  blind = [(0, 0), (most * stride, 0), (0, 0), (0, 0)]
  out_BXHD = jnp.pad(out_BNCKGD.reshape(b, n * stride, h, d), blind)
  begin = (most - num_blind) * stride + early
  return jax.lax.dynamic_slice_in_dim(out_BXHD, begin, t, axis=1)


def attend_of_token(
  q_BHD, keys_BWKD, values_BWKD, position_B, *, size: int, stride: int
) -> jax.Array:
  """The same of one query per row, [B, H, D]; windows that are not complete may be anything."""
  is_seen_BW = (jnp.arange(keys_BWKD.shape[1]) * stride + size - 1)[None] <= position_B[:, None]
  values_BWKD = jnp.where(is_seen_BW[..., None, None], values_BWKD, 0)
  out_B1HD = jax.nn.dot_product_attention(
    q_BHD[:, None], keys_BWKD, values_BWKD, mask=is_seen_BW[:, None, None]
  )
  return jnp.where(is_seen_BW.any(-1)[:, None, None], out_B1HD[:, 0], 0)


def choose(
  q_BTHD: jax.ShapeDtypeStruct,
  k_BTKD: jax.ShapeDtypeStruct,
  *,
  size: int,
  stride: int,
  has_documents: bool,
  max_documents: int,
  implementation: str,
) -> pallas_kernels.Choice:
  """What `attend` runs on for queries and keys like these, and why.

  Raises:
    CannotRunError: what was asked for cannot run.
  """
  (b, t, h, d), k = q_BTHD.shape, k_BTKD.shape[2]
  w = max(0, (t - size) // stride + 1)
  segments_BW = jax.ShapeDtypeStruct((b, w), jnp.int32) if has_documents else None
  return _choose(
    pallas_kernels.choose_full_attention,
    "compressed_attention",
    jax.ShapeDtypeStruct((b, w, stride * h, d), q_BTHD.dtype),
    *[jax.ShapeDtypeStruct((b, w, k, d), k_BTKD.dtype)] * 2,
    segments_BT=segments_BW,
    max_documents=max_documents,
    implementation=implementation,
  )


def choose_chunk(
  q_BTHD: jax.ShapeDtypeStruct,
  k_BSKD: jax.ShapeDtypeStruct,
  *,
  size: int,
  stride: int,
  implementation: str,
) -> pallas_kernels.Choice:
  """The same of `attend_of_chunk`, for a chunk of queries and all keys."""
  (b, t, h, d), (_, s, k, _) = q_BTHD.shape, k_BSKD.shape
  n = -(-((1 - size) % stride + t) // stride)
  w = max(n, (s - size) // stride + 1)
  return _choose(
    pallas_kernels.choose_chunk_attention,
    "compressed_chunk_attention",
    jax.ShapeDtypeStruct((b, n, stride * h, d), q_BTHD.dtype),
    *[jax.ShapeDtypeStruct((b, w, k, d), k_BSKD.dtype)] * 2,
    implementation=implementation,
  )


def _choose(choose: Callable[..., pallas_kernels.Choice], op: str, *arrays, **options):
  """What another operation chooses, by the name of this one."""
  try:
    return choose(*arrays, **options)._replace(op=op)
  except pallas_kernels.CannotRunError as error:
    raise pallas_kernels.CannotRunError(op, error.asked, error.reasons, "xla") from None
