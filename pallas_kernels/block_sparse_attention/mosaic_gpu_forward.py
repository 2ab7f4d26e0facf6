"""The forward kernel of block-sparse attention on Hopper GPUs; see `mosaic_gpu_walk`."""

import math

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import mosaic_gpu_arrays as arrays
from pallas_kernels.block_sparse_attention import mosaic_gpu_walk as walk
from pallas_kernels.block_sparse_attention.mosaic_gpu_shape import UNIT, Shape

_LOG2E = math.log2(math.e)
# A maximum to begin with: below any score, and far above masked ones under any scale.
_LOWEST = -1e20
# The maximum that weights are relative to, base 2, lags behind the highest score by less: so
# they stay below 2 ** 8, and sums need to be scaled anew a time or two, not at every step.
_LAG = 8.0


def forward(
  q_BVXD,
  lists: walk.Lists,
  *,
  shape: Shape,
  config: walk.Config,
  scale: float,
  interpret=None,
) -> tuple[jax.Array, jax.Array]:
  """Returns out [B, V, X, D] and lse [R, L], natural logarithm, of whole tiles.

  Rows of units that list nothing get out = 0 and lse = -inf.
  """
  warps = shape.warps
  num_threads = config.units_per_tile // warps.per_thread
  pieces = range(4)

  def copies(tile, own_refs, scratch):
    (q_gmem,) = own_refs
    yield from tile.unit_slices(q_gmem, scratch["q"].at[tile.thread])

  def load(tile, scratch):
    return warps.load_rows(scratch["q"].at[tile.thread])

  def attend(tile, q, out_refs):
    out_gmem, lse_gmem = out_refs

    def step(group, carry):
      total, highest, norm = carry
      scores, factor = warps.products(q, tile.smem["k"], group.pieces), scale * _LOG2E
      if shape.has_bias:
        scores = scores * factor + _LOG2E * group.biases(pieces)
        factor = 1.0
      scores = group.masked(scores, pieces)
      found = scores.max(axis=1) * factor

      def follow(total, highest, norm):
        new_highest = jnp.maximum(highest, found)
        shrink = jnp.exp2(highest - new_highest)
        return total * arrays.along_rows(shrink, total.shape), new_highest, norm * shrink

      total, highest, norm = lax.cond(
        warps.any_above(found - highest, _LAG), follow, lambda *x: x, total, highest, norm
      )
      # The scale enters here, in one multiply-add with the maximum.
      weights = jnp.exp2(scores * factor + arrays.along_rows(-highest, scores.shape))
      weights = weights.astype(jnp.bfloat16)
      norm = norm + warps.row_sums(weights)
      total = warps.add_products(total, weights, tile.smem["v"], group.pieces)
      return total, highest, norm

    start = warps.zeros(shape.head_dim), warps.filled(_LOWEST), warps.filled(0.0)
    total, highest, norm = tile.walk(step, start)

    # A row that saw nothing has a norm of 0.
    inverse = jnp.where(norm > 0.0, 1.0 / jnp.maximum(norm, 1e-37), 0.0)
    lse = jnp.where(norm > 0.0, (highest + jnp.log2(norm)) / _LOG2E, -jnp.inf)
    out = total * arrays.along_rows(inverse, total.shape)
    tile.store(out_gmem, out.astype(jnp.bfloat16))
    lse_gmem[tile.row, tile.lines] = lse

  num_lines = lists.count_RX.shape[1] * config.units_per_tile * UNIT
  out_BVXD, lse_RL = walk.call(
    "block_sparse_forward",
    [q_BVXD],
    lists,
    shape=shape,
    config=config,
    out_type=[
      jax.ShapeDtypeStruct(q_BVXD.shape, q_BVXD.dtype),
      jax.ShapeDtypeStruct((shape.num_rows, num_lines), jnp.float32),
    ],
    scratch=dict(q=arrays.tiled((num_threads, warps.rows, shape.head_dim))),
    num_copies=warps.per_thread,
    copies=copies,
    load=load,
    attend=attend,
    interpret=interpret,
  )
  return out_BVXD, lse_RL
