"""Dealing the units that read a tile of keys into windows, on Hopper GPUs.

A warp takes the units of a row 32 at a time, one to a lane, and a stretch of them in all.
First, every stretch counts how many of its units read each tile; sums along the row tell
where the units of a stretch come among those of a tile. Then each puts its units there.
Both times the work grows with the lists, and no two warps write to the same place.

For units of single tokens; see `key_tiles` for what comes out.

Extra shape letters:
  C stretches of the units of a row   X tiles of a row   E entries of a unit
"""

from collections.abc import Callable
import dataclasses

import jax
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_kernels import mosaic_thread as thread
from pallas_kernels.block_lists import key_tiles, units

_WARPS = 4
_LANES = 32
# Stretches of a row, at most: their counts are summed along the row.
_MOST_STRETCHES = 256
# Bytes of a multiprocessor's shared memory, less what the rounding of arrays takes.
_SHARED_MEMORY = 224 * 1024
_PLAIN = plgpu.RefType()
_SCALAR = plgpu.Layout.WG_SPLAT


def has_room(tiling: key_tiles.Tiling) -> bool:
  """Whether shared memory holds two numbers of every tile of a row for each warp."""
  return 2 * 4 * _WARPS * tiling.tiles_per_row <= _SHARED_MEMORY


def deal(lists: units.UnitLists, tiling: key_tiles.Tiling) -> key_tiles.Dealt:
  """What `key_tiles.deal` returns, but for what no window reads.

  Args:
    lists: of units of single tokens.
    tiling: of keys.
  """
  r, u, e = lists.blocks_RUE.shape
  num_batches = -(-u // _LANES)
  batches = -(-num_batches // _MOST_STRETCHES)
  sizes = _Sizes(
    num_rows=r,
    num_units=u,
    num_entries=e,
    batches=batches,
    stretches=-(-num_batches // batches),
    rows_per_batch=r // lists.first_BU.shape[0],
    tiling=tiling,
  )
  per_row = tiling.tiles_per_row
  (counts_RCX,) = _kernel(
    sizes,
    _Warp.count,
    [lists.blocks_RUE],
    [jax.ShapeDtypeStruct((r, sizes.stretches, per_row), jnp.int32)],
    num_arrays=1,
  )
  sums_RCX = jnp.cumsum(counts_RCX, axis=1)
  num_units_X = sums_RCX[:, -1].reshape(-1)
  windows_X, first_window_X = key_tiles.windows_of(num_units_X)
  # One window more than there are, for who reads ahead.
  most = (tiling.most_windows(lists.blocks_RUE) + 1) * key_tiles.WINDOW
  units_W, pieces_W = _kernel(
    sizes,
    _Warp.deal,
    [
      lists.blocks_RUE,
      lists.first_BU,
      lists.last_BU,
      sums_RCX - counts_RCX,
      num_units_X,
      first_window_X,
    ],
    [jax.ShapeDtypeStruct((most,), jnp.int32)] * 2,
    num_arrays=2,
  )
  return key_tiles.Dealt(windows_X, first_window_X, units_W, pieces_W, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
  """What is known of a call before it runs.

  Attributes:
    num_rows, num_units, num_entries: R, U and E.
    batches: of 32 units, in a stretch.
    stretches: C.
    rows_per_batch: rows R of a row of the batch.
    tiling: of keys.
  """

  num_rows: int
  num_units: int
  num_entries: int
  batches: int
  stretches: int
  rows_per_batch: int
  tiling: key_tiles.Tiling


def _kernel(sizes: _Sizes, work: Callable, inputs, out_type, *, num_arrays: int):
  """Runs `work` in a warp for every stretch, with arrays of a number for each tile."""
  num_warps = sizes.num_rows * sizes.stretches

  def body(*refs):
    @plgpu.inline_mgpu(arg_types=(_PLAIN,) * len(refs) + (_SCALAR,), return_type=None)
    def run(context, *args):
      del context
      warp = thread.warp()
      number = thread.add(thread.multiply(thread.value(args[-1]), _WARPS), warp)
      gmem, smem = args[: -1 - num_arrays], args[-1 - num_arrays : -1]
      with mgpu_utils.when(thread.is_less(number, thread.i32(num_warps))):
        row, stretch = thread.divide(number, sizes.stretches)
        work(_Warp(sizes, warp, row, stretch, smem), *gmem)

    run(*refs, jnp.int32(lax.axis_index("group")))

  return plgpu.kernel(
    body,
    out_type=out_type,
    grid=(-(-num_warps // _WARPS),),
    grid_names=("group",),
    kernel_name=f"lists_of_keys_{work.__name__}",
    scratch_types=[
      plgpu.SMEM((_WARPS, sizes.tiling.tiles_per_row), jnp.int32) for _ in range(num_arrays)
    ],
  )(*inputs)


@dataclasses.dataclass(frozen=True)
class _Warp:
  """One warp at work on one stretch.

  Attributes:
    sizes: of the call.
    warp: its number in its warpgroup.
    row: R.
    stretch: number of the stretch in the row.
    smem: arrays in shared memory, a number for each tile of the row and each warp.
  """

  sizes: _Sizes
  warp: object
  row: object
  stretch: object
  smem: tuple

  def count(self, blocks, counts) -> None:
    """Writes how many units of the stretch read each tile."""
    per_row = self.sizes.tiling.tiles_per_row
    zero, one = thread.i32(0), thread.i32(1)
    thread.for_lanes(per_row, lambda x: thread.store_shared(self._of_tile(0, x), zero))
    mgpu_utils.warp_barrier()

    def add(tile):
      mgpu_utils.inline_ptx(
        "red.shared.add.u32 [$0], $1;", self._of_tile(0, tile), one, has_side_effects=True
      )

    self._for_batches(lambda unit: self._for_tiles(blocks, unit, add))
    mgpu_utils.warp_barrier()

    def write(x):
      count = thread.load_shared(self._of_tile(0, x))
      thread.store_global(counts, self._in_stretch(x), count)

    thread.for_lanes(per_row, write)

  def deal(self, blocks, first, last, before, num_units, first_window, units, pieces) -> None:
    """Puts the units of the stretch where they belong in the windows of their tiles."""
    sizes, per_row = self.sizes, self.sizes.tiling.tiles_per_row
    zero = thread.i32(0)
    out = _Windows(num_units, first_window, units, pieces, sizes.tiling.in_order)
    row_tile = thread.multiply(self.row, per_row)

    def begin(x):
      rank = thread.load_global(before, self._in_stretch(x))
      thread.store_shared(self._of_tile(0, x), rank)
      thread.store_shared(self._of_tile(1, x), zero)

    thread.for_lanes(per_row, begin)
    b, _ = thread.divide(self.row, sizes.rows_per_batch)
    bit = arith.shli(thread.i32(1), thread.lane())
    lower = thread.lower_bits(thread.lane())

    def mark(tile):
      mgpu_utils.inline_ptx(
        "red.shared.or.b32 [$0], $1;", self._of_tile(1, tile), bit, has_side_effects=True
      )

    def put(unit):
      mgpu_utils.warp_barrier()
      self._for_tiles(blocks, unit, mark)
      mgpu_utils.warp_barrier()
      place = thread.add(thread.multiply(b, sizes.num_units), self._clamped(unit))
      own_first = thread.load_global(first, place)
      own_last = thread.load_global(last, place)

      def write(n, read):
        """From the last entry back, so that a tile's first one finds all of its pieces."""
        e = arith.subi(thread.i32(sizes.num_entries - 1), n)
        tile, block = self._entry(blocks, unit, e)
        next_tile, _ = self._entry(blocks, unit, thread.add(e, thread.i32(1)))
        is_same = thread.is_equal(tile, next_tile)
        read = arith.select(is_same, read, zero)
        read = arith.ori(read, self._pieces(tile, block))
        previous, _ = self._entry(blocks, unit, arith.subi(e, thread.i32(1)))

        def store():
          marks = thread.load_shared(self._of_tile(1, tile))
          rank = thread.popcount(arith.andi(marks, lower))
          rank = thread.add(rank, thread.load_shared(self._of_tile(0, tile)))
          edge = self._edge(tile, own_first, own_last)
          out.store(thread.add(row_tile, tile), rank, unit, arith.ori(read, edge))

        self._if_other(tile, previous, store)
        return read

      thread.loop(sizes.num_entries, write, zero)
      mgpu_utils.warp_barrier()

      def advance(x):
        marks = thread.load_shared(self._of_tile(1, x))
        rank = thread.load_shared(self._of_tile(0, x))
        rank = thread.add(rank, thread.popcount(marks))
        thread.store_shared(self._of_tile(0, x), rank)
        thread.store_shared(self._of_tile(1, x), zero)

      thread.for_lanes(per_row, advance)

    self._for_batches(put)
    # Each stretch sees to some of the row's tiles: what their last windows have left.
    for_each = -(-per_row // sizes.stretches)

    def clear(n, carry):
      x = thread.add(thread.multiply(n, sizes.stretches), self.stretch)
      with mgpu_utils.when(thread.is_less(x, thread.i32(per_row))):
        out.clear_rest(thread.add(row_tile, x))
      return carry

    thread.loop(for_each, clear, zero)

  def _for_batches(self, body: Callable) -> None:
    """Calls `body(unit)` for the stretch; lanes behind the last unit have one without list."""

    def step(n, carry):
      batch = thread.add(thread.multiply(self.stretch, self.sizes.batches), n)
      body(thread.add(thread.multiply(batch, _LANES), thread.lane()))
      return carry

    thread.loop(self.sizes.batches, step, thread.i32(0))

  def _for_tiles(self, blocks, unit, body: Callable) -> None:
    """Calls `body(tile)` for every tile that a unit reads, once."""

    def step(e, before):
      tile, _ = self._entry(blocks, unit, e)
      self._if_other(tile, before, lambda: body(tile))
      return tile

    no_tile = thread.i32(self.sizes.tiling.tiles_per_row)
    thread.loop(self.sizes.num_entries, step, no_tile)

  def _in_stretch(self, tile):
    """Where the stretch's number for a tile lies in an array [R, C, X]."""
    stretch = thread.add(thread.multiply(self.row, self.sizes.stretches), self.stretch)
    return thread.add(thread.multiply(stretch, self.sizes.tiling.tiles_per_row), tile)

  def _of_tile(self, array: int, tile):
    """The address of a tile's number."""
    index = thread.multiply(self.warp, self.sizes.tiling.tiles_per_row)
    index = thread.multiply(thread.add(index, tile), 4)
    return thread.add(thread.smem_address(self.smem[array]), index)

  def _clamped(self, unit):
    return arith.minsi(unit, thread.i32(self.sizes.num_units - 1))

  def _entry(self, blocks, unit, e):
    """The tile and the block of a unit's entry; the tile is X where there is none."""
    sizes = self.sizes
    is_there = arith.andi(
      thread.is_less(unit, thread.i32(sizes.num_units)),
      thread.is_between(e, thread.i32(0), thread.i32(sizes.num_entries)),
    )
    place = thread.add(thread.multiply(self.row, sizes.num_units), self._clamped(unit))
    index = thread.add(thread.multiply(place, sizes.num_entries), e)
    index = arith.select(is_there, index, thread.i32(0))
    block = thread.load_global(blocks, index)
    is_there = arith.andi(is_there, thread.is_less(block, thread.i32(units.NONE)))
    block = arith.select(is_there, block, thread.i32(0))
    tile, _ = thread.divide(block, sizes.tiling.blocks_per_tile)
    return arith.select(is_there, tile, thread.i32(sizes.tiling.tiles_per_row)), block

  def _if_other(self, tile, neighbour, body: Callable[[], None]) -> None:
    """Calls `body` where there is a tile, and the neighbouring entry is of another one."""
    is_tile = thread.is_less(tile, thread.i32(self.sizes.tiling.tiles_per_row))
    is_other = arith.cmpi(arith.CmpIPredicate.ne, tile, neighbour)
    with mgpu_utils.when(arith.andi(is_tile, is_other)):
      body()

  def _pieces(self, tile, block):
    """Bits of the pieces of a block in its tile."""
    tiling = self.sizes.tiling
    number = arith.subi(block, thread.multiply(tile, tiling.blocks_per_tile))
    ones = thread.i32((1 << tiling.pieces_per_block) - 1)
    # Without a block the number may be anything, and the bits are not used.
    shift = thread.bits(thread.multiply(number, tiling.pieces_per_block), 0, 31)
    return arith.shli(ones, shift)

  def _edge(self, tile, first, last):
    """The bit that says that a unit may not see every key of a tile."""
    keys = self.sizes.tiling.keys_per_tile
    begin = thread.multiply(tile, keys)
    end = thread.add(begin, thread.i32(keys - 1))
    is_edge = arith.ori(thread.is_less(begin, first), thread.is_less(last, end))
    return arith.select(is_edge, thread.i32(key_tiles.EDGE), thread.i32(0))


@dataclasses.dataclass(frozen=True)
class _Windows:
  """The windows of all tiles.

  Attributes:
    num_units, first_window: of every tile.
    units, pieces: what is written.
    in_order: see `key_tiles.Tiling`.
  """

  num_units: object
  first_window: object
  units: object
  pieces: object
  in_order: bool

  def store(self, tile, rank, unit, read) -> None:
    """Puts a unit where the `rank`-th of a tile belongs."""
    if self.in_order:
      window, slot = thread.divide(rank, key_tiles.WINDOW)
    else:  # they go round the tile's windows
      windows = self._num_windows(tile)
      slot = arith.divui(rank, windows)
      window = arith.subi(rank, arith.muli(slot, windows))
    window = thread.add(thread.load_global(self.first_window, tile), window)
    place = thread.add(thread.multiply(window, key_tiles.WINDOW), slot)
    thread.store_global(self.units, place, unit)
    thread.store_global(self.pieces, place, read)

  def clear_rest(self, tile) -> None:
    """Empties the places of a tile that no unit belongs to; fewer than there are lanes."""
    rank = thread.add(thread.load_global(self.num_units, tile), thread.lane())
    room = thread.multiply(self._num_windows(tile), key_tiles.WINDOW)
    with mgpu_utils.when(thread.is_less(rank, room)):
      self.store(tile, rank, thread.i32(0), thread.i32(0))

  def _num_windows(self, tile):
    num = thread.load_global(self.num_units, tile)
    return arith.shrui(thread.add(num, thread.i32(key_tiles.WINDOW - 1)), thread.i32(5))
