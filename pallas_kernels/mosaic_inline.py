"""Warp-level products and loads as inline operations of Mosaic GPU; see `mosaic_warp`.

What is here is written for one CUDA thread. An `mma.sync.m16n8k16` takes, of the left
operand, four registers with the 8 x 8 quarters (rows 0-7, columns 0-7), (8-15, 0-7), (0-7,
8-15) and (8-15, 8-15) of 16 x 16 elements; of the right operand, two registers with the
halves of 16 x 8; of the sum, two pairs with the halves of 16 x 8. `ldmatrix` delivers four
8 x 8 quarters, and lane l gives the address of row l % 8 of quarter l // 8.
"""

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
import numpy as np

from pallas_kernels import mosaic_thread as thread

PIECE = 16
LAYOUT = plgpu.Layout.WGMMA
# Of a number for each row.
ROWS = LAYOUT.reduce(1)
# How arrays that take part in products lie in shared memory: tiles of 8 x 64 bfloat16, the
# 16-byte chunks of a row permuted so that no two rows of a tile share a bank.
TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

_TILED = plgpu.RefType(TRANSFORMS)
_PLAIN = plgpu.RefType()
_SCALAR = plgpu.Layout.WG_SPLAT
_TILE_BYTES = 8 * 64 * 2


def load_rows(ref):
  d = ref.shape[-1]

  @plgpu.inline_mgpu(
    arg_types=(_TILED,),
    return_type=plgpu.ShapeDtypeStruct((64, d), jnp.bfloat16, layout=LAYOUT),
  )
  def load(context, ref):
    del context
    place = thread.add(
      thread.smem_address(ref), thread.multiply(thread.warp(), 2 * _row_bytes(d))
    )
    place = thread.add(place, _lane_offset(d, rows_first=True))
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    registers = [
      mgpu_utils.bitcast(quarter, pair)
      for k in range(d // 16)
      for quarter in _ldmatrix(_at_column(place, k), k)
    ]
    return _array(registers, (64, d))

  return load(ref)


def load_global_rows(ref, row, step: int):
  d = ref.shape[-1]

  @plgpu.inline_mgpu(
    arg_types=(_PLAIN, _SCALAR),
    return_type=plgpu.ShapeDtypeStruct((64, d), jnp.bfloat16, layout=LAYOUT),
  )
  def load(context, ref, row):
    del context
    place = _place_of_lane(ref, thread.value(row), step)
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    registers = []
    for offset in _register_offsets(d, step):
      bits = mgpu_utils.inline_ptx(
        f"ld.global.nc.b32 $0, [$1 + {offset}];",
        place,
        result_types=thread.int32(),
        has_side_effects=True,
      )
      registers.append(mgpu_utils.bitcast(bits, pair))
    return _array(registers, (64, d))

  return load(ref, jnp.int32(row))


def store_global_rows(ref, row, is_there, x) -> None:
  @plgpu.inline_mgpu(arg_types=(_PLAIN, _SCALAR, _SCALAR, LAYOUT), return_type=None)
  def store(context, ref, row, is_there, x):
    del context
    place = _place_of_lane(ref, thread.value(row), 1)
    predicate = thread.is_equal(thread.value(is_there), thread.i32(1))
    offsets = _register_offsets(x.shape[-1], 1)
    for offset, register in zip(offsets, x.registers.flat, strict=True):
      mgpu_utils.inline_ptx(
        f"st.global.b32 [$0 + {offset}], $1;",
        place,
        mgpu_utils.bitcast(register, thread.int32()),
        predicate=predicate,
        has_side_effects=True,
      )

  store(ref, jnp.int32(row), jnp.int32(is_there), x)


def products(rows, ref, pieces):
  d, n = ref.shape[-1], len(pieces)

  @plgpu.inline_mgpu(
    arg_types=(LAYOUT, _TILED, *[_SCALAR] * n),
    return_type=plgpu.ShapeDtypeStruct((64, PIECE * n), jnp.float32, layout=LAYOUT),
  )
  def multiply(context, rows, ref, *pieces):
    del context
    left = _left_operands(rows)
    place = thread.add(thread.smem_address(ref), _lane_offset(d, rows_first=False))
    zero = mgpu_utils.c(0.0, ir.F32Type.get())
    sums = []
    for piece in pieces:
      here = thread.add(place, thread.multiply(thread.value(piece), 2 * _row_bytes(d)))
      low, high = [zero] * 4, [zero] * 4
      for k in range(d // 16):
        right = _ldmatrix(_at_column(here, k), k)
        low = _mma(low, left[k], right[:2])
        high = _mma(high, left[k], right[2:])
      sums += [low, high]
    return _float_array(sums, (64, PIECE * n))

  return multiply(rows, ref, *pieces)


def add_products(total, weights, ref, pieces):
  d, n = ref.shape[-1], len(pieces)

  @plgpu.inline_mgpu(
    arg_types=(LAYOUT, LAYOUT, _TILED, *[_SCALAR] * n),
    return_type=plgpu.ShapeDtypeStruct((64, d), jnp.float32, layout=LAYOUT),
  )
  def multiply(context, total, weights, ref, *pieces):
    del context
    left = _left_operands(weights)
    place = thread.add(thread.smem_address(ref), _lane_offset(d, rows_first=True))
    sums = float_registers(total)
    for k, piece in enumerate(pieces):
      here = thread.add(place, thread.multiply(thread.value(piece), 2 * _row_bytes(d)))
      for column in range(d // 16):
        right = _ldmatrix(_at_column(here, column), column, transposed=True)
        for half in range(2):
          tile = 2 * column + half
          sums[tile] = _mma(sums[tile], left[k], right[2 * half : 2 * half + 2])
    return _float_array(sums, (64, d))

  return multiply(total, weights, ref, *pieces)


def row_sums(weights):
  @plgpu.inline_mgpu(
    arg_types=(LAYOUT,),
    return_type=plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=ROWS),
  )
  def add(context, weights):
    del context
    one = thread.i32(0x3F803F80)  # twice, in bfloat16
    sums = [mgpu_utils.c(0.0, ir.F32Type.get())] * 4
    for left in _left_operands(weights):
      sums = _mma(sums, left, [one, one])
    # All columns of the product are the same.
    number = ir.VectorType.get((1,), ir.F32Type.get())
    return _array([vector.broadcast(number, sums[i]) for i in (0, 2)], (64,), ROWS)

  return add(weights)


def any_above(x_rows, limit: float):
  def vote(x):
    lower, upper = (vector.extract(r, [], [0]) for r in x.registers.flat)
    ptx = (
      "{ .reg .pred p; setp.gt.f32 p, $1, $3; setp.gt.or.f32 p, $2, $3, p; "
      "vote.sync.any.pred p, p, 0xffffffff; selp.b32 $0, 1, 0, p; }"
    )
    return [thread.convergent(ptx, lower, upper, mgpu_utils.c(limit, ir.F32Type.get()))]

  return _scalars(1, (ROWS,), vote)(x_rows)[0]


def columns(ref, places):
  width, n = ref.shape[-1], len(places)
  starts = [jnp.int32(start) for _, start in places]

  @plgpu.inline_mgpu(
    arg_types=(_PLAIN, *[_SCALAR] * (2 * n)),
    return_type=plgpu.ShapeDtypeStruct((64, PIECE * n), jnp.float32, layout=LAYOUT),
  )
  def load(context, ref, *scalars):
    del context
    # Lane l holds columns 2 (l % 4) and the next of each 16 x 8 half.
    pair = thread.bits(thread.lane(), 0, 3)
    place = thread.add(thread.smem_address(ref), thread.multiply(pair, 8))
    f32 = ir.F32Type.get()
    halves = []
    for row, start in zip(scalars[:n], scalars[n:], strict=True):
      index = thread.add(thread.multiply(thread.value(row), width), thread.value(start))
      here = thread.add(place, thread.multiply(index, 4))
      for half in range(2):
        first, second = mgpu_utils.inline_ptx(
          f"ld.shared.v2.f32 {{$0, $1}}, [$2 + {32 * half}];",
          here,
          result_types=[f32, f32],
          has_side_effects=True,
        )
        halves.append([first, second, first, second])
    return _float_array(halves, (64, PIECE * n))

  return load(ref, *(row for row, _ in places), *starts)


def warp_index():
  return _scalars(1, (), lambda: [thread.warp()])[0]


def synchronize() -> None:
  @plgpu.inline_mgpu(arg_types=(), return_type=None)
  def run(context):
    del context
    mgpu_utils.warp_barrier()

  run()


def words(ref, start, num_words):
  width = ref.shape[-1] if len(ref.shape) == 2 else PIECE

  def load(ref, start):
    index = thread.add(thread.multiply(thread.warp(), width), thread.value(start))
    place = thread.add(thread.smem_address(ref), thread.multiply(index, 4))
    return [
      mgpu_utils.inline_ptx(
        f"ld.shared.b32 $0, [$1 + {4 * i}];",
        place,
        result_types=thread.int32(),
        has_side_effects=True,
      )
      for i in range(num_words)
    ]

  return _scalars(num_words, (_PLAIN, _SCALAR), load)(ref, start)


def ballot(ref, start, bit):
  def vote(ref, start, bit):
    word = _load_of_lane(ref, thread.value(start))
    is_set = thread.bits(arith.shrui(word, thread.value(bit)), 0, 1)
    ptx = "{ .reg .pred p; setp.ne.b32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }"
    return [thread.convergent(ptx, is_set)]

  return _scalars(1, (_PLAIN, _SCALAR, _SCALAR), vote)(ref, start, bit)[0]


def lane_load(ref, start):
  def load(ref, start):
    return [_load_of_lane(ref, thread.value(start))]

  return _scalars(1, (_PLAIN, _SCALAR), load)(ref, jnp.int32(start))[0]


def of_lane(x, lane):
  def shuffle(x, lane):
    ptx = "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;"
    return [thread.convergent(ptx, thread.value(x), thread.value(lane))]

  return _scalars(1, (_SCALAR, _SCALAR), shuffle)(x, jnp.int32(lane))[0]


def _scalars(num_results, arg_types, function):
  """An inline operation with int32 scalars as results, each warp or lane its own."""
  scalar = plgpu.ShapeDtypeStruct((), jnp.int32, layout=_SCALAR)

  @plgpu.inline_mgpu(arg_types=arg_types, return_type=(scalar,) * num_results)
  def run(context, *args):
    del context
    return tuple(mgpu.FragmentedArray.splat(x, (), is_signed=True) for x in function(*args))

  return run if arg_types else run()


def _row_bytes(d: int) -> int:
  """Bytes of 8 rows of D elements: a row of tiles."""
  return _TILE_BYTES * (d // 64)


def _lane_offset(d: int, *, rows_first: bool):
  """Where this lane's row of its quarter lies in a piece, columns 0 to 15.

  Quarters are numbered down the rows first, or along the columns first.
  """
  lane = thread.lane()
  row, second, fourth = (
    thread.bits(lane, 0, 7),
    thread.bits(lane, 3, 1),
    thread.bits(lane, 4, 1),
  )
  lower, right = (second, fourth) if rows_first else (fourth, second)
  # The swizzle exchanges the chunks of 16 bytes of row r by r's last three bits.
  chunk = arith.xori(right, row)
  offset = thread.add(thread.multiply(lower, _row_bytes(d)), thread.multiply(row, 128))
  return thread.add(offset, thread.multiply(chunk, 16))


def _at_column(place, k: int):
  """The address for columns 16 k to 16 k + 15 within their tile (see `_ldmatrix`)."""
  return place if k % 4 == 0 else arith.xori(place, thread.i32(32 * (k % 4)))


def _ldmatrix(place, k: int, *, transposed: bool = False):
  """Four quarters; k // 4 is the tile along the columns."""
  way = ".trans" if transposed else ""
  return mgpu_utils.inline_ptx(
    f"ldmatrix.sync.aligned.m8n8.x4{way}.shared.b16 "
    f"{{$0, $1, $2, $3}}, [$4 + {_TILE_BYTES * (k // 4)}];",
    place,
    result_types=[thread.int32()] * 4,
    # Reads what copies write: it must not move across the waits for them.
    has_side_effects=True,
    convergent=True,
  )


def _mma(sums, left, right):
  return mgpu_utils.inline_ptx(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
    *left,
    *right,
    *sums,
    result_types=[ir.F32Type.get()] * 4,
    convergent=True,
  )


def _place_of_lane(ref, row, step: int):
  """Where in device memory the lane's first pair of a left operand lies.

  Args:
    ref: bfloat16 array [..., D].
    row: number of the warp's first row among all rows of D elements.
    step: from each of its rows to the next.
  """
  i64, d, lane = ir.IntegerType.get_signless(64), ref.type.shape[-1], thread.lane()
  row = thread.add(row, thread.multiply(thread.bits(lane, 2, 7), step))
  offset = arith.muli(arith.extui(i64, row), mgpu_utils.c(2 * d, i64))
  column = arith.extui(i64, thread.multiply(thread.bits(lane, 0, 3), 4))
  base = llvm.ptrtoint(i64, mgpu_utils.memref_ptr(ref))
  return arith.addi(base, arith.addi(offset, column))


def _register_offsets(d: int, step: int) -> list[int]:
  """Bytes from the lane's first pair to each, in the order of a left operand's registers."""
  rows = 0, 8 * step * 2 * d
  return [32 * k + 16 * half + row for k in range(d // 16) for half in range(2) for row in rows]


def _load_of_lane(ref, start):
  """Element `start + lane` of an int32 GMEM vector."""
  i64 = ir.IntegerType.get_signless(64)
  base = llvm.ptrtoint(i64, mgpu_utils.memref_ptr(ref))
  offset = arith.extui(i64, thread.multiply(thread.add(start, thread.lane()), 4))
  return mgpu_utils.inline_ptx(
    "ld.global.nc.b32 $0, [$1];",
    arith.addi(base, offset),
    result_types=thread.int32(),
    has_side_effects=True,
  )


def _left_operands(x: mgpu.FragmentedArray):
  """The four registers of every 16 columns of a bfloat16 array."""
  i32 = thread.int32()
  registers = [mgpu_utils.bitcast(r, i32) for r in x.registers.flat]
  return [registers[i : i + 4] for i in range(0, len(registers), 4)]


def float_registers(x: mgpu.FragmentedArray):
  """The four numbers of every 8 columns of a float32 array."""
  numbers = [
    vector.extract(pair, dynamic_position=[], static_position=[i])
    for pair in x.registers.flat
    for i in range(2)
  ]
  return [numbers[i : i + 4] for i in range(0, len(numbers), 4)]


def _float_array(tiles, shape) -> mgpu.FragmentedArray:
  pair = ir.VectorType.get((2,), ir.F32Type.get())
  registers = []
  for tile in tiles:
    for half in (tile[:2], tile[2:]):
      register = llvm.mlir_undef(pair)
      for i, number in enumerate(half):
        register = llvm.insertelement(register, number, position=thread.i32(i))
      registers.append(register)
  return _array(registers, shape)


def _array(registers, shape, layout=LAYOUT) -> mgpu.FragmentedArray:
  layout = layout.to_mgpu()
  grid = np.array(registers, dtype=object).reshape(layout.registers_shape(shape))
  return fragmented_array.FragmentedArray(_registers=grid, _layout=layout, _is_signed=None)
