"""The kernel for the gradient of queries on Hopper GPUs; see `mosaic_gpu_walk`."""

import math
from typing import NamedTuple

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import mosaic_gpu_arrays as arrays
from pallas_kernels.block_sparse_attention import mosaic_gpu_walk as walk
from pallas_kernels.block_sparse_attention.mosaic_gpu_shape import Shape

_LOG2E = math.log2(math.e)


class Lines(NamedTuple):
  """What the gradients of scores need of every row of queries.

  Attributes:
    lse_RL: natural logarithm, finite everywhere.
    delta_RL: sum of output times its cotangent, less the cotangent of lse. Where the kernel
      finds it: the cotangent of lse alone.
    out_BVXD: the output, where the kernel finds delta; else None.
  """

  lse_RL: jax.Array
  delta_RL: jax.Array
  out_BVXD: jax.Array | None


def dq(
  q_BVXD,
  dout_BVXD,
  lines: Lines,
  lists: walk.Lists,
  *,
  shape: Shape,
  config: walk.Config,
  scale: float,
  interpret=None,
) -> tuple[jax.Array, jax.Array]:
  """Returns dq [B, V, X, D], and delta as `Lines` has it.

  Args:
    q_BVXD, dout_BVXD: queries and the cotangent of the output.
    lines: of whole tiles.
    lists: of the tiles.
    shape, config, scale, interpret: of the call.
  """
  warps = shape.warps
  num_threads = config.units_per_tile // warps.per_thread
  finds_delta = lines.out_BVXD is not None
  wide = dict(q=q_BVXD, dout=dout_BVXD)
  if finds_delta:
    wide["out"] = lines.out_BVXD

  def copies(tile, own_refs, scratch):
    smem = {name: ref.at[tile.thread] for name, ref in scratch.items()}
    gmem = dict(zip((*wide, "lse", "delta"), own_refs, strict=True))
    for name in wide:
      yield from tile.unit_slices(gmem[name], smem[name])
    for name in ("lse", "delta"):
      yield gmem[name], (tile.row, tile.lines), smem[name]

  def load(tile, scratch):
    smem = {name: ref.at[tile.thread] for name, ref in scratch.items()}
    q, dout = (warps.load_rows(smem[name]) for name in ("q", "dout"))
    lse, delta = (warps.load_vector(smem[name]) for name in ("lse", "delta"))
    if finds_delta:
      products = warps.load_rows(smem["out"]).astype(jnp.float32) * dout.astype(jnp.float32)
      delta = products.sum(axis=1) - delta
    return q, dout, -_LOG2E * lse, delta

  def attend(tile, loaded, out_refs):
    q, dout, shift, delta = loaded
    if finds_delta:
      out_refs[1][tile.row, tile.lines] = delta

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
    tile.store(out_refs[0], (total * scale).astype(jnp.bfloat16))

  rows = arrays.tiled((num_threads, warps.rows, shape.head_dim))
  numbers = plgpu.SMEM((num_threads, warps.rows), jnp.float32)
  delta_type = jax.ShapeDtypeStruct(lines.delta_RL.shape, jnp.float32)
  results = walk.call(
    "block_sparse_dq",
    [*wide.values(), lines.lse_RL, lines.delta_RL],
    lists,
    shape=shape,
    config=config,
    out_type=[jax.ShapeDtypeStruct(q_BVXD.shape, q_BVXD.dtype)] + [delta_type] * finds_delta,
    scratch=dict.fromkeys(wide, rows) | dict(lse=numbers, delta=numbers),
    num_copies=len(wide) * warps.per_thread + 2,
    copies=copies,
    load=load,
    attend=attend,
    interpret=interpret,
  )
  return results[0], results[1] if finds_delta else lines.delta_RL
