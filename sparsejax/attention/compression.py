"""Keys and values of whole windows made one each, and attention to them (NSA's first branch).

After arXiv:2502.11089, section 3.3.1. Window w covers tokens `w stride` to `w stride + size -
1`; only complete ones exist. A query sees those that are complete at its position and end in
its document; keys of other documents in them count as absent.

Letters: B batch, T tokens, W windows, X tokens of a window, H query heads, K key/value heads,
D head size, F width within the MLP, C queries of a stripe.
"""

from flax import linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

import pallas_kernels

# Scores (float32, of every query head) that exist at the same time.
STRIPE_ELEMENTS = 2**26


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


def attend(q_BTHD, keys_BWKD, values_BWKD, segments_BT, *, size: int, stride: int) -> jax.Array:
  """Attention [B, T, H, D] to the windows that a query sees; 0 where it sees none.

  Scores are scaled by D ** -0.5. Stripes of queries are compared with every window and are
  recomputed in the backward pass, so that no array of all scores exists.
  """
  (b, t, h, _), w = q_BTHD.shape, keys_BWKD.shape[1]
  if w == 0:
    return jnp.zeros_like(q_BTHD)
  if segments_BT is None:
    segments_BT = jnp.ones((b, t), jnp.int32)
  last_W = jnp.arange(w) * stride + size - 1
  segments_BW = windows(segments_BT, size, stride)[..., -1]

  @jax.checkpoint
  def stripe(part):
    q_BCHD, segments_BC, position_C = part
    is_complete_CW = last_W[None, :] <= position_C[:, None]
    is_own_BCW = segments_BC[:, :, None] == segments_BW[:, None, :]
    is_seen_BCW = is_complete_CW[None] & is_own_BCW
    out_BCHD = jax.nn.dot_product_attention(
      q_BCHD, keys_BWKD, values_BWKD, mask=is_seen_BCW[:, None]
    )
    return jnp.where(is_seen_BCW.any(-1)[..., None, None], out_BCHD, 0)

  rows = min(t, max(1, STRIPE_ELEMENTS // (b * h * w)))
  if rows == t:
    out_BTHD = stripe((q_BTHD, segments_BT, jnp.arange(t)))
  else:
    padding = -t % rows

    def cut(x_BT):
      x_BT = jnp.pad(x_BT, [(0, 0), (0, padding)] + [(0, 0)] * (x_BT.ndim - 2))
      return x_BT.reshape(b, -1, rows, *x_BT.shape[2:]).swapaxes(0, 1)

    positions = jnp.arange(t + padding).reshape(-1, rows)
    outs = jax.lax.map(stripe, (cut(q_BTHD), cut(segments_BT), positions))
    out_BTHD = outs.swapaxes(0, 1).reshape(b, -1, *q_BTHD.shape[2:])[:, :t]
  return checkpoint_name(out_BTHD, "attention_residual")


def choose(kernels: str) -> pallas_kernels.Choice:
  """What `attend` runs on.

  Args:
    kernels: `strict` where only a GPU kernel will do.

  Raises:
    CannotRunError: for `strict`; there is none.
  """
  op, why = "compressed_attention", "it has no GPU kernel"
  if kernels == "strict":
    raise pallas_kernels.CannotRunError(op, kernels, why, "xla")
  return pallas_kernels.Choice(op, "xla", why)
