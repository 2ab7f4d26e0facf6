"""Clearing what is not read of a piece of values; an inline operation of Mosaic GPU.

A weight of 0 does not silence a NaN, and nobody knows what lies in the unused part of a page.
"""

from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_kernels import mosaic_inline
from pallas_kernels import mosaic_thread as thread
from pallas_kernels.mosaic_inline import PIECE

_SCALAR = plgpu.Layout.WG_SPLAT
# Of a line of 64 bfloat16, and of eight lines, a tile.
_LINE, _TILE = 128, 1024


def clear(ref, piece, begin, end) -> None:
  """Sets to 0, in each warp's piece, the rows outside of `begin` to `end - 1`.

  The warp's lanes, and copies that it starts from here on, find it done.

  Args:
    ref: tiled shared-memory array [16 n, D].
    piece: below n.
    begin, end: of the rows to keep.
  """
  d = ref.shape[-1]
  num_tiles = d // 64

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(mosaic_inline.TRANSFORMS), *[_SCALAR] * 3), return_type=None
  )
  def run(context, ref, piece, begin, end):
    del context
    # Two lanes for a row, each with half of every line. How chunks are permuted within a
    # line does not matter.
    lane = thread.lane()
    row, half = thread.bits(lane, 1, 15), thread.bits(lane, 0, 1)
    is_kept = thread.is_between(row, thread.value(begin), thread.value(end))
    predicate = arith.xori(is_kept, mgpu_utils.c(1, is_kept.type))
    place = thread.multiply(thread.value(piece), 2 * num_tiles * _TILE)
    place = thread.add(place, thread.multiply(thread.bits(row, 3, 1), num_tiles * _TILE))
    place = thread.add(place, thread.multiply(thread.bits(row, 0, 7), _LINE))
    place = thread.add(place, thread.multiply(half, _LINE // 2))
    place = thread.add(thread.smem_address(ref), place)
    for tile in range(num_tiles):
      for offset in range(0, _LINE // 2, 16):
        mgpu_utils.inline_ptx(
          f"st.shared.v4.b32 [$0 + {tile * _TILE + offset}], {{$1, $1, $1, $1}};",
          place,
          thread.i32(0),
          predicate=predicate,
          has_side_effects=True,
        )
    # The next copy into this place must not be overtaken by these.
    mgpu_utils.inline_ptx("fence.proxy.async.shared::cta;", has_side_effects=True)
    mgpu_utils.warp_barrier()

  run(ref, jnp.int32(piece), jnp.int32(begin), jnp.int32(end))


def interpreted(ref, piece, begin, end) -> None:
  """The same in the interpreter."""
  rows = ref.at[pl.ds(piece * PIECE, PIECE), :]
  row = jnp.arange(PIECE)[:, None]
  rows[...] = jnp.where((row >= begin) & (row < end), rows[...], 0)
