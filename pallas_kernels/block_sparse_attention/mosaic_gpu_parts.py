"""Adding up what several parts of the work found of one tile of keys; see `mosaic_gpu_dkv`.

Always in the order of the parts, so that gradients are the same every time.
"""

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_inline
from pallas_kernels.block_lists import key_tiles
from pallas_kernels.block_sparse_attention import mosaic_gpu_arrays as arrays
from pallas_kernels.block_sparse_attention.mosaic_gpu_shape import Shape


def add_parts(
  sums_YND,
  tiles: key_tiles.KeyTiles,
  *,
  shape: Shape,
  keys_per_tile: int,
  interpret=None,
) -> jax.Array:
  """Adds the partial sums of every tile: bfloat16 [B, S, K, D] from float32 [Y, N, D].

  N is a multiple of `keys_per_tile`: a part may hold several sums of the same keys.
  """
  num_sums = sums_YND.shape[1] // keys_per_tile
  d, num_pieces = shape.head_dim, keys_per_tile // 64
  num_tiles = len(tiles.first_part_X)
  tiles_per_row = num_tiles // shape.num_rows

  def body(sums_gmem, first_gmem, last_gmem, bounds_gmem, out_gmem, out_smem):
    tile, piece = lax.axis_index("tile"), lax.axis_index("piece")

    def load(part, n):
      sums = sums_gmem.at[tile + part, pl.ds(n * keys_per_tile + piece * 64, 64), :]
      if shape.interpreted:
        return sums[...]
      return plgpu.load(sums, layout=mosaic_inline.LAYOUT, optimized=False)

    def add(part, total):
      # A part without windows wrote nothing: what is in its slot may be anything.
      has_windows = bounds_gmem[part + 1] > bounds_gmem[part]
      return lax.cond(
        has_windows, lambda: sum((load(part, n) for n in range(num_sums)), total), lambda: total
      )

    zero = jnp.zeros((64, d), jnp.float32)
    if not shape.interpreted:
      zero = plgpu.layout_cast(zero, mosaic_inline.LAYOUT)
    total = lax.fori_loop(first_gmem[tile], last_gmem[tile] + 1, add, zero)
    out_smem[...] = total.astype(jnp.bfloat16)
    plgpu.commit_smem()
    row, x = (f(tile, jnp.int32(tiles_per_row)) for f in (lax.div, lax.rem))
    b, head = shape.batch_and_head(row)
    keys = pl.ds(x * keys_per_tile + piece * 64, 64)
    plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[b, keys, head])
    plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct(
      (shape.batch, shape.num_keys, shape.num_kv_heads, d), jnp.bfloat16
    ),
    grid=(num_tiles, num_pieces),
    grid_names=("tile", "piece"),
    kernel_name="block_sparse_dkv_parts",
    scratch_types=[arrays.tiled((64, d))],
    interpret=interpret,
  )(sums_YND, tiles.first_part_X, tiles.last_part_X, tiles.bounds_W)


def add_bias_parts(
  sums_YN, tiles: key_tiles.KeyTiles, *, shape: Shape, keys_per_tile: int
) -> jax.Array:
  """Adds the partial sums of every tile: float32 [B, S, K] from [Y, N]; see `add_parts`."""
  y_Y = jnp.arange(sums_YN.shape[0])
  x_X = jnp.arange(len(tiles.first_part_X))
  part_XY = y_Y[None, :] - x_X[:, None]
  is_part_XY = part_XY >= tiles.first_part_X[:, None]
  is_part_XY &= part_XY <= tiles.last_part_X[:, None]
  has_windows_W = jnp.diff(tiles.bounds_W) > 0
  is_part_XY &= jnp.take(has_windows_W, part_XY, mode="clip")
  # What no part wrote may hold anything.
  sums_YN = jnp.where(is_part_XY.any(0)[:, None], sums_YN, 0.0)
  sums_YN = sums_YN.reshape(len(sums_YN), -1, keys_per_tile).sum(1)
  total_XN = jnp.dot(is_part_XY.astype(jnp.float32), sums_YN, precision="highest")
  total_BKS = total_XN.reshape(shape.batch, shape.num_kv_heads, -1)[..., : shape.num_keys]
  return total_BKS.transpose(0, 2, 1)
