"""Adding up what the warps of a thread block have found; see `mosaic_gpu`.

Their rows lie one warp after the other, and warps alternate between units.
"""

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.decode_attention import mosaic_gpu_exchange
from pallas_kernels.decode_attention.mosaic_gpu_shape import PIECE, WARPS, Shape

ROWS = WARPS * PIECE
# Columns of the weighted values that are added up at a time: room in shared memory.
_COLUMNS = 32


def scratch(shape: Shape) -> dict:
  """What it needs of shared memory."""
  return dict(
    highest=plgpu.SMEM((ROWS,), jnp.float32),
    norm=plgpu.SMEM((ROWS,), jnp.float32),
    total=plgpu.SMEM((ROWS, _COLUMNS), jnp.float32),
    met=plgpu.Barrier(num_arrivals=shape.num_threads),
  )


def store_sum(shape: Shape, smem: dict, thread, sums, refs) -> None:
  """Writes the sum of what all warps of the block have found.

  Args:
    shape: of the call.
    smem: see `scratch`.
    thread: number of the thread.
    sums: of each warp: weighted values [rows, D], what they are relative to, their norm.
    refs: of the block's sums in device memory: [16 U, D], [64] and [64]; of the latter, the
      first 16 U count.
  """
  total, highest, norm = sums
  total_gmem, highest_gmem, norm_gmem = refs
  rows = pl.ds(thread * shape.warps.rows, shape.warps.rows)
  joint = highest
  for other in _of_others(shape, smem, "highest", thread, highest):
    joint = jnp.maximum(joint, other)
  factor = jnp.exp2(highest - joint)
  norm = norm * factor
  for other in _of_others(shape, smem, "norm", thread, norm):
    norm = norm + other
  highest_gmem[rows] = joint
  norm_gmem[rows] = norm

  total = total * lax.broadcast_in_dim(factor, total.shape, [0])
  size = shape.num_units * PIECE
  for start in range(0, shape.head_dim, _COLUMNS):
    smem["total"][rows, :] = total[:, start : start + _COLUMNS]
    _meet(smem)

    # All threads, where there is one for all warps.
    @pl.when(thread == 0)
    def _add(start=start):
      parts = [_load(smem["total"].at[pl.ds(i, size), :], shape) for i in range(0, ROWS, size)]
      total_gmem[:, pl.ds(start, _COLUMNS)] = sum(parts[1:], parts[0])

    # The next columns take the place of these.
    _meet(smem)


def _of_others(shape: Shape, smem: dict, name: str, thread, own):
  """The numbers of the same rows that the other warps of the unit have found."""
  ref = smem[name]
  if not shape.interpreted:
    return mosaic_gpu_exchange.of_others(ref, own, shape.num_units)
  ref[pl.ds(thread * PIECE, PIECE)] = own
  _meet(smem)
  others = [(thread + step) % WARPS for step in range(shape.num_units, WARPS, shape.num_units)]
  return [ref[pl.ds(other * PIECE, PIECE)] for other in others]


def _load(ref, shape: Shape) -> jax.Array:
  if shape.interpreted:
    return ref[...]
  return plgpu.load(ref, layout=plgpu.Layout.WG_STRIDED(ref.shape, vec_size=4))


def _meet(smem: dict) -> None:
  """Waits for all warps."""
  plgpu.commit_smem()
  plgpu.barrier_arrive(smem["met"])
  plgpu.barrier_wait(smem["met"])
