"""Queries and what belongs to them, in the order of units of 16 rows; see `mosaic_gpu_shape`.

The number of heads per key head is first padded to a power of two, with heads of zeros.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.block_lists import units


@dataclasses.dataclass(frozen=True)
class Packing:
  """How `num_tokens` tokens of `num_heads` heads per each of `num_kv_heads` are packed."""

  num_tokens: int
  num_heads: int
  num_kv_heads: int

  @property
  def padded_heads(self) -> int:
    """Heads per key head, rounded up to a power of two."""
    return 1 << (self.num_heads - 1).bit_length()

  @property
  def grouping(self) -> units.Grouping:
    return units.group(self.num_tokens, self.padded_heads)

  def pack(self, x_BTHD: jax.Array) -> jax.Array:
    """[B, T, H, ...] to [B, V, X, ...]; what pads it is zero."""
    b, t, _, *rest = x_BTHD.shape
    per_unit = self.grouping.tokens_per_unit
    x = x_BTHD.reshape(b, t, self.num_kv_heads, self.num_heads, *rest)
    heads, tokens = self.padded_heads - self.num_heads, -t % per_unit
    x = jnp.pad(x, [(0, 0), (0, tokens), (0, 0), (0, heads)] + [(0, 0)] * len(rest))
    if per_unit > 1:
      x = x.reshape(b, -1, per_unit, *x.shape[2:]).swapaxes(2, 3)
    return x.reshape(b, -1, self._packed_heads, *rest)

  def unpack(self, x_BVXD: jax.Array) -> jax.Array:
    """The inverse of `pack`: [B, V, X, ...] to [B, T, H, ...]."""
    b, v, _, *rest = x_BVXD.shape
    per_unit, k = self.grouping.tokens_per_unit, self.num_kv_heads
    x = x_BVXD.reshape(b, v, k, per_unit, self.padded_heads, *rest)
    if per_unit > 1:
      x = x.swapaxes(2, 3)
    x = x.reshape(b, -1, k, self.padded_heads, *rest)
    x = x[:, : self.num_tokens, :, : self.num_heads]
    return x.reshape(b, self.num_tokens, k * self.num_heads, *rest)

  def to_lines(self, x_BTH: jax.Array) -> jax.Array:
    """[B, T, H] to [R, 16 U], unit by unit."""
    x_BVX = self.pack(x_BTH)
    b, v, _ = x_BVX.shape
    x = x_BVX.reshape(b, v, self.num_kv_heads, -1).swapaxes(1, 2)
    return x.reshape(b * self.num_kv_heads, -1)

  def from_lines(self, x_RL: jax.Array) -> jax.Array:
    """The inverse of `to_lines`; lines beyond the last unit are dropped."""
    num_lines = self.grouping.num_units * units.UNIT
    k, x = self.num_kv_heads, x_RL[:, :num_lines]
    per_v = units.UNIT * self.grouping.units_per_token
    x = x.reshape(x.shape[0] // k, k, num_lines // per_v, per_v).swapaxes(1, 2)
    return self.unpack(x.reshape(*x.shape[:2], -1))

  def token_lines(self, x_BT: jax.Array) -> jax.Array:
    """[B, T], a number of each token, to [B, 16 U]; the last token's number pads it."""
    grouping = self.grouping
    per_unit, per_token = grouping.tokens_per_unit, grouping.units_per_token
    x_BT = jnp.pad(x_BT, [(0, 0), (0, -self.num_tokens % per_unit)], mode="edge")
    return jnp.repeat(x_BT, per_token * units.UNIT // per_unit, axis=1)

  @property
  def _packed_heads(self) -> int:
    return self.num_kv_heads * max(units.UNIT, self.padded_heads)
