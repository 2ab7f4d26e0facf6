"""Adding up the two halves of every warp's rows; an inline operation of Mosaic GPU.

In the WGMMA layout a thread holds, of its warp's 16 rows, row g and row g + 8. Where these
belong to the same query under two heads, their sum costs one addition.
"""

from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import mosaic_inline
from pallas_kernels import mosaic_thread as thread

_PLAIN = plgpu.RefType()
_SCALAR = plgpu.Layout.WG_SPLAT


def fold(ref, column, x, *, is_first: bool) -> None:
  """Stores, or adds, `x[16 w + g] + x[16 w + g + 8]` in row `8 w + g`, from a column on.

  Args:
    ref: float32 shared-memory array [32, n].
    column: an even number.
    x: float32 [64, m] in the WGMMA layout.
    is_first: whether to store; otherwise to add.
  """
  width = ref.shape[-1]

  @plgpu.inline_mgpu(arg_types=(_PLAIN, _SCALAR, mosaic_inline.LAYOUT), return_type=None)
  def run(context, ref, column, x):
    del context
    lane = thread.lane()
    row = thread.add(thread.multiply(thread.warp(), 8), thread.bits(lane, 2, 7))
    number = thread.add(thread.multiply(row, width), thread.value(column))
    number = thread.add(number, thread.multiply(thread.bits(lane, 0, 3), 2))
    place = thread.add(thread.smem_address(ref), thread.multiply(number, 4))
    f32 = ir.F32Type.get()
    for i, (a, b, c, d) in enumerate(mosaic_inline.float_registers(x)):
      first, second = arith.addf(a, c), arith.addf(b, d)
      at = f"[$0 + {32 * i}]"
      if not is_first:
        old = mgpu_utils.inline_ptx(
          f"ld.shared.v2.f32 {{$0, $1}}, [$2 + {32 * i}];",
          place,
          result_types=[f32, f32],
          has_side_effects=True,
        )
        first, second = arith.addf(first, old[0]), arith.addf(second, old[1])
      mgpu_utils.inline_ptx(f"st.shared.v2.f32 {at}, {{$1, $2}};", place, first, second)

  run(ref, jnp.int32(column), x)


def interpreted(ref, column, x, *, is_first: bool) -> None:
  """The same in the interpreter."""
  folded = x.reshape(4, 2, 8, -1).sum(1).reshape(32, -1)
  target = ref.at[:, pl.ds(column, folded.shape[1])]
  target[...] = folded if is_first else target[...] + folded
