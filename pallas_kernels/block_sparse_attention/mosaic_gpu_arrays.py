"""Arrays that several Mosaic GPU kernels of block-sparse attention hold alike."""

from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_inline
from pallas_kernels.block_sparse_attention.mosaic_gpu_shape import UNIT, Shape

# Far below any score, and still finite after the subtraction of another one.
MASKED = -1e30


def token_of_row(shape: Shape, axis: int = 0):
  """[rows, 16]: which of its unit's tokens each row (or column) belongs to."""
  rows_per_token = UNIT // shape.tokens_per_unit
  return lax.div(shape.warps.iota(axis) & (UNIT - 1), jnp.int32(rows_per_token))


def tiled(shape):
  """Shared memory for bfloat16 arrays that take part in products."""
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=mosaic_inline.TRANSFORMS)


def along_rows(x_rows, shape):
  """[rows] as the same number in every column."""
  return lax.broadcast_in_dim(x_rows, shape, [0])
