"""The pieces of 16 keys that a warp takes of a row's list, 32 slots at a time.

Every `num_takers`-th piece of the list is a taker's, so that takers have equally much to do
wherever the empty slots are. Each lane of a warp looks at one of the next 32; a vote says
which of them there is something to read of.
"""

from typing import NamedTuple

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_kernels import mosaic_inline
from pallas_kernels import mosaic_thread as thread
from pallas_kernels.decode_attention.mosaic_gpu_shape import PIECE, Shape

LANES = 32
# A range of keys in a piece: its begin, and its end above.
END_SHIFT = 8
WHOLE = PIECE << END_SHIFT

_PLAIN = plgpu.RefType()
_SCALAR = plgpu.Layout.WG_SPLAT


class Pieces(NamedTuple):
  """Up to 32 pieces.

  Attributes:
    left: which of them are yet to be taken, as bits.
    numbers: among all pieces of all pages; only `of_lane` can read them.
    ranges: of keys that are read, never empty; likewise.
  """

  left: jax.Array
  numbers: jax.Array
  ranges: jax.Array


def nothing(shape: Shape) -> Pieces:
  zero = jnp.int32(0)
  handle = jnp.zeros(LANES, jnp.int32) if shape.interpreted else zero
  return Pieces(zero, handle, handle)


def of_lane(handle, i, shape: Shape) -> jax.Array:
  """The number of the i-th of the pieces."""
  return handle[i] if shape.interpreted else mosaic_inline.of_lane(handle, i)


def look(lists, row, first, shape: Shape) -> Pieces:
  """What there is of pieces `first`, `first + num_takers` and on.

  Args:
    lists: pages, begins and ends in device memory, [R, M].
    row: R.
    first: among the pieces of the row's list; from N on, there are none.
    shape: of the call.
  """
  if shape.interpreted:
    return _look_interpreted(lists, row, first, shape)
  scalar = plgpu.ShapeDtypeStruct((), jnp.int32, layout=_SCALAR)

  @plgpu.inline_mgpu(
    arg_types=(_PLAIN, _PLAIN, _PLAIN, _SCALAR, _SCALAR), return_type=(scalar,) * 3
  )
  def run(context, pages, begins, ends, row, first):
    del context
    own = thread.multiply(thread.lane(), shape.num_takers)
    own = thread.add(thread.value(first), own)
    is_there = thread.is_less(own, thread.i32(shape.num_pieces))
    own = arith.select(is_there, own, thread.i32(0))
    slot, part = thread.divide(own, shape.pieces_per_page)
    place = thread.add(thread.multiply(thread.value(row), shape.num_slots), slot)
    page, begin, end = (thread.load_global(ref, place) for ref in (pages, begins, ends))
    is_there = arith.andi(
      is_there, thread.is_between(page, thread.i32(0), thread.i32(shape.num_pages))
    )
    # Within the page first: what anybody wrote there is then far from overflowing.
    before = thread.multiply(part, PIECE)
    zero, size = thread.i32(0), thread.i32(shape.page_size)
    begin = arith.maxsi(arith.subi(arith.maxsi(begin, zero), before), zero)
    end = arith.minsi(arith.subi(arith.minsi(end, size), before), thread.i32(PIECE))
    left = thread.ballot(arith.andi(is_there, thread.is_less(begin, end)))
    number = thread.add(thread.multiply(page, shape.pieces_per_page), part)
    range_ = thread.add(begin, thread.multiply(end, 1 << END_SHIFT))
    return tuple(map(thread.scalar, (left, number, range_)))

  return Pieces(*run(*lists, row, first))


def _look_interpreted(lists, row, first, shape: Shape) -> Pieces:
  """The same in the interpreter."""
  own = first + shape.num_takers * jnp.arange(LANES)
  is_there = own < shape.num_pieces
  own = jnp.where(is_there, own, 0)
  slot, part = own // shape.pieces_per_page, own % shape.pieces_per_page
  page, begin, end = (jnp.take(ref[row, :], slot) for ref in lists)
  begin = jnp.maximum(jnp.maximum(begin, 0) - PIECE * part, 0)
  end = jnp.minimum(jnp.minimum(end, shape.page_size) - PIECE * part, PIECE)
  is_there &= (page >= 0) & (page < shape.num_pages) & (begin < end)
  left = (is_there.astype(jnp.int32) << jnp.arange(LANES)).sum().astype(jnp.int32)
  return Pieces(left, page * shape.pieces_per_page + part, begin + (end << END_SHIFT))


def lowest(bits) -> jax.Array:
  """The number of the lowest bit that is set."""
  return 31 - lax.clz(bits & -bits)
