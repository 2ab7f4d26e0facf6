"""Numbers of rows from warp to warp; an inline operation of Mosaic GPU.

Written in Pallas, with slices of shared memory, it takes half a minute to lower the kernel:
the layouts of everything around are searched for together.
"""

from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector
import numpy as np

from pallas_kernels import mosaic_thread as thread
from pallas_kernels.decode_attention.mosaic_gpu_shape import PIECE, WARPS
from pallas_kernels.mosaic_inline import ROWS

_PLAIN = plgpu.RefType()


def of_others(ref, x, num_units: int) -> tuple:
  """What the other warps of the unit have for the same rows, an array for each of them.

  All warps take part, and wait for each other.

  Args:
    ref: float32 shared-memory vector [64], which nobody else uses.
    x: float32 [64], a number for each row of the warps.
    num_units: between which the warps alternate.
  """
  steps = range(num_units, WARPS, num_units)
  result = plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=ROWS)

  @plgpu.inline_mgpu(arg_types=(_PLAIN, ROWS), return_type=(result,) * len(steps))
  def run(context, ref, x):
    del context
    # A thread has, of its warp's 16 rows, row g and row g + 8; and so have three others.
    row = thread.bits(thread.lane(), 2, 7)
    place = thread.add(thread.smem_address(ref), thread.multiply(row, 4))
    own = thread.add(place, thread.multiply(thread.warp(), 4 * PIECE))
    for offset, register in zip((0, 32), x.registers.flat, strict=True):
      mgpu_utils.inline_ptx(
        f"st.shared.f32 [$0 + {offset}], $1;",
        own,
        vector.extract(register, [], [0]),
        has_side_effects=True,
      )
    mgpu_utils.warpgroup_barrier()
    return tuple(_load(place, step) for step in steps)

  return run(ref, x)


def _load(place, step: int) -> fragmented_array.FragmentedArray:
  """The numbers of the warp so many further on; after the last comes the first."""
  other = thread.bits(thread.add(thread.warp(), thread.i32(step)), 0, WARPS - 1)
  other = thread.add(place, thread.multiply(other, 4 * PIECE))
  f32 = ir.F32Type.get()
  registers = []
  for offset in (0, 32):
    number = mgpu_utils.inline_ptx(
      f"ld.shared.f32 $0, [$1 + {offset}];", other, result_types=f32, has_side_effects=True
    )
    registers.append(vector.broadcast(ir.VectorType.get((1,), f32), number))
  layout = ROWS.to_mgpu()
  grid = np.array(registers, dtype=object).reshape(layout.registers_shape((PIECE * WARPS,)))
  return fragmented_array.FragmentedArray(_registers=grid, _layout=layout, _is_signed=None)
