"""Sizes that the Mosaic GPU kernels of block-sparse attention share.

Kernels see queries in units of 16 rows (see `block_lists`), as an array `[B, V, X, D]`: unit
`u` of key head `k` is at `v = u // units_per_token`, and its rows are heads
`16 (k units_per_token + u % units_per_token)` and on.

Extra shape letters:
  U units of a row R = B * K   V, X see above   J key blocks of a group of entries
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_warp

UNIT = 16
# Keys that a step of a warp takes together, and a stage of the ring holds.
STEP = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """One call, as the kernels see it.

  Attributes:
    batch, num_kv_heads, num_units, units_per_token, num_keys, head_dim: see above.
    block_size: keys per block, 16, 32 or 64.
    tokens_per_unit: if several, they may list different blocks.
    has_bias: whether keys have biases.
    interpreted: whether the kernels run in the interpreter.
    num_workers: streaming multiprocessors of the device.
    warps_as_one: see `mosaic_warp.Warps`.
  """

  batch: int
  num_kv_heads: int
  num_units: int
  units_per_token: int
  tokens_per_unit: int
  num_keys: int
  head_dim: int
  block_size: int
  has_bias: bool
  interpreted: bool
  num_workers: int
  warps_as_one: bool = False

  @property
  def warps(self) -> mosaic_warp.Warps:
    return mosaic_warp.Warps(self.interpreted, self.warps_as_one)

  @property
  def own_barriers(self) -> bool:
    """Whether to use those of `mosaic_barrier`, which the interpreter does not know."""
    return not self.interpreted

  @property
  def has_tokens(self) -> bool:
    return self.tokens_per_unit > 1

  @property
  def num_rows(self) -> int:
    return self.batch * self.num_kv_heads

  @property
  def group(self) -> int:
    """Blocks of a step."""
    return STEP // self.block_size

  @property
  def pieces_per_block(self) -> int:
    return self.block_size // mosaic_warp.PIECE

  def batch_and_head(self, row) -> tuple[jax.Array, jax.Array]:
    """Of a row R."""
    heads = jnp.int32(self.num_kv_heads)
    return jax.lax.div(row, heads), jax.lax.rem(row, heads)

  def place_of_unit(self, head, unit) -> tuple[jax.Array, jax.Array]:
    """`v` and the first of the 16 heads of a unit."""
    parts = self.units_per_token
    if parts == 1:
      return unit, head * UNIT
    return jax.lax.div(unit, jnp.int32(parts)), (
      head * parts + jax.lax.rem(unit, jnp.int32(parts))
    ) * UNIT
