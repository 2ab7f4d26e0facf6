"""The kernel for the gradient of queries on Hopper GPUs; see `mosaic_gpu_walk`."""

import math

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import mosaic_gpu_arrays as arrays
from pallas_kernels.block_sparse_attention import mosaic_gpu_walk as walk
from pallas_kernels.block_sparse_attention.mosaic_gpu_shape import Shape

_LOG2E = math.log2(math.e)


def dq(
  q_BVXD,
  dout_BVXD,
  lse_RL,
  delta_RL,
  lists: walk.Lists,
  *,
  shape: Shape,
  config: walk.Config,
  scale: float,
  interpret=None,
) -> jax.Array:
  """Returns dq [B, V, X, D].

  Args:
    q_BVXD, dout_BVXD: queries and the cotangent of the output.
    lse_RL: natural logarithm, finite everywhere, of whole tiles.
    delta_RL: sum of output times its cotangent, less the cotangent of lse, of whole tiles.
    lists: of the tiles.
    shape, config, scale, interpret: of the call.
  """
  warps = shape.warps
  num_threads = config.units_per_tile // warps.per_thread

  def copies(tile, own_refs, scratch):
    q_gmem, dout_gmem, lse_gmem, delta_gmem = own_refs
    smem = {name: ref.at[tile.thread] for name, ref in scratch.items()}
    yield from tile.unit_slices(q_gmem, smem["q"])
    yield from tile.unit_slices(dout_gmem, smem["dout"])
    yield lse_gmem, (tile.row, tile.lines), smem["lse"]
    yield delta_gmem, (tile.row, tile.lines), smem["delta"]

  def load(tile, scratch):
    smem = {name: ref.at[tile.thread] for name, ref in scratch.items()}
    q, dout = (warps.load_rows(smem[name]) for name in ("q", "dout"))
    lse, delta = (warps.load_vector(smem[name]) for name in ("lse", "delta"))
    return q, dout, -_LOG2E * lse, delta

  def attend(tile, loaded, out_refs):
    (dq_gmem,) = out_refs
    q, dout, shift, delta = loaded

    def step(group, total):
      # Half a group at a time keeps scores and their gradients in registers.
      for numbers in (range(2), range(2, 4)):
        pieces = [group.pieces[n] for n in numbers]
        scores, factor = warps.products(q, tile.smem["k"], pieces), scale * _LOG2E
        if shape.has_bias:
          scores = scores * factor + _LOG2E * group.biases(numbers)
          factor = 1.0
        scores = group.masked(scores, numbers)
        weights = jnp.exp2(scores * factor + arrays.along_rows(shift, scores.shape))
        dweights = warps.products(dout, tile.smem["v"], pieces)
        dscores = weights * (dweights - arrays.along_rows(delta, dweights.shape))
        total = warps.add_products(total, dscores.astype(jnp.bfloat16), tile.smem["k"], pieces)
      return total

    total = tile.walk(step, warps.zeros(shape.head_dim))
    tile.store(dq_gmem, (total * scale).astype(jnp.bfloat16))

  rows = arrays.tiled((num_threads, warps.rows, shape.head_dim))
  numbers = plgpu.SMEM((num_threads, warps.rows), jnp.float32)
  (dq_BVXD,) = walk.call(
    "block_sparse_dq",
    [q_BVXD, dout_BVXD, lse_RL, delta_RL],
    lists,
    shape=shape,
    config=config,
    out_type=[jax.ShapeDtypeStruct(q_BVXD.shape, q_BVXD.dtype)],
    scratch=dict(q=rows, dout=rows, lse=numbers, delta=numbers),
    num_copies=2 * warps.per_thread + 2,
    copies=copies,
    load=load,
    attend=attend,
    interpret=interpret,
  )
  return dq_BVXD
