"""Windows of keys, their means, and the windows that speak for a block."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Pooling:
  """Mean windows: window j covers keys `j stride` to `j stride + size - 1`.

  The score of block b is the largest of `count` windows, from `b block_size / stride +
  first` on, or with weights their sum; windows that a query cannot see, and those that do not
  exist, count as 0.

  Attributes:
    size: keys of a window.
    stride: keys from one window to the next; it divides the block size.
    first: where the windows of a block begin, relative to its own first key.
    count: how many windows speak for a block.
    weights: of those windows in a block's score, which is then their sum; None takes the
      largest.
  """

  size: int
  stride: int
  first: int
  count: int
  weights: tuple[int, ...] | None = None

  def num_windows(self, num_keys: int) -> int:
    """Complete windows among so many keys."""
    return max(0, (num_keys - self.size) // self.stride + 1)

  def reach(self) -> int:
    """How many keys the windows of a block reach to, counted from its first key."""
    return (self.first + self.count - 1) * self.stride + self.size

  def coarser(self, factor: int) -> "Pooling":
    """Windows so many times as long and as far apart, to normalise over."""
    return Pooling(factor * self.size, factor * self.stride, 0, 1)


def whole_blocks(block_size: int) -> Pooling:
  """A block is one window (MoBA, SSA)."""
  return Pooling(block_size, block_size, 0, 1)


def infllm_v2(block_size: int) -> Pooling:
  """Half a block, every quarter, and the largest of five from one before the block on.

  That is what the released code computes (arXiv:2509.24663; 32 and 16 keys for blocks of
  64); `first=0` is what the paper prints.

  Raises:
    ValueError: a block that is no multiple of 4.
  """
  if block_size % 4:
    raise ValueError(f"{block_size=} has no quarters; take a multiple of 4")
  return Pooling(block_size // 2, block_size // 4, -1, 5)


def nsa_windows(block_size: int, size: int, stride: int) -> Pooling:
  """Every window that shares keys with a block, weighted by how many strides they share.

  Equation 9 of NSA (arXiv:2502.11089), where l' = block_size, l = size and d = stride.

  Raises:
    ValueError: a stride that does not divide windows and blocks.
  """
  if stride < 1 or size % stride or block_size % stride:
    raise ValueError(f"{stride=} does not divide windows of {size} and blocks of {block_size}")
  if size == stride == block_size:
    return whole_blocks(block_size)
  before, per_block = size // stride - 1, block_size // stride
  # Strides [i, i + size / stride) of window i against [0, per_block) of the block.
  weights = tuple(min(i + before + 1, per_block) - max(i, 0) for i in range(-before, per_block))
  return Pooling(size, stride, -before, len(weights), weights)


def mean_windows(x_BSKD, segments_BS, pooling: Pooling) -> jax.Array:
  """Mean of every complete window, over the document of its last key: float32 [B, W, K, D]."""
  b, s, *rest = x_BSKD.shape
  num_windows, per_window = pooling.num_windows(s), pooling.size
  if num_windows == 0:
    return jnp.zeros((b, 0, *rest), jnp.float32)
  if segments_BS is None and per_window % pooling.stride == 0:
    # Windows are runs of strides: add up each stride once.
    parts = per_window // pooling.stride
    used = (num_windows + parts - 1) * pooling.stride
    strides = x_BSKD[:, :used].reshape(b, -1, pooling.stride, *rest)
    strides = strides.astype(jnp.float32).sum(2)
    total = sum(strides[:, i : i + num_windows] for i in range(parts))
    return total / per_window
  key_WX = jnp.arange(num_windows)[:, None] * pooling.stride + jnp.arange(per_window)[None]
  x_BWXKD = x_BSKD[:, key_WX].astype(jnp.float32)
  if segments_BS is None:
    return x_BWXKD.mean(2)
  segments_BWX = segments_BS[:, key_WX]
  is_pooled_BWX = segments_BWX == segments_BWX[..., -1:]
  is_pooled_BWX1 = is_pooled_BWX.reshape(*is_pooled_BWX.shape, *[1] * len(rest))
  return jnp.where(is_pooled_BWX1, x_BWXKD, 0).sum(2) / is_pooled_BWX1.sum(2)


def largest_of_windows(
  x_BTKW: jax.Array, pooling: Pooling, per_block: int, num_blocks: int, empty: float
) -> jax.Array:
  """The largest of the windows of every block, over the last axis.

  Args:
    x_BTKW: numbers of windows.
    pooling: windows.
    per_block: strides per block.
    num_blocks: how many blocks.
    empty: what windows that do not exist count as.
  """
  return functools.reduce(
    jnp.maximum, _windows_of_blocks(x_BTKW, pooling, per_block, num_blocks, empty)
  )


def scores_of_blocks(
  x_BTKW: jax.Array, pooling: Pooling, per_block: int, num_blocks: int
) -> jax.Array:
  """Scores of blocks from those of windows: the largest, or the weighted sum."""
  if pooling.weights is None:
    return largest_of_windows(x_BTKW, pooling, per_block, num_blocks, 0.0)
  windows = _windows_of_blocks(x_BTKW, pooling, per_block, num_blocks, 0.0)
  return sum(weight * x for weight, x in zip(pooling.weights, windows, strict=True))


def _windows_of_blocks(
  x_BTKW: jax.Array, pooling: Pooling, per_block: int, num_blocks: int, empty: float
) -> list[jax.Array]:
  """The first window of every block, the second, and so on, over the last axis."""
  before = max(0, -pooling.first)
  needed = before + max(0, pooling.first) + pooling.count + per_block * num_blocks
  after = max(0, needed - before - x_BTKW.shape[-1])
  padding = [(0, 0)] * (x_BTKW.ndim - 1) + [(before, after)]
  padded = jnp.pad(x_BTKW, padding, constant_values=empty)
  start = before + pooling.first
  return [
    padded[..., start + i : start + i + per_block * num_blocks : per_block]
    for i in range(pooling.count)
  ]
