"""The lists of queries on Hopper GPUs: one warp sorts the lists of a tile and joins them.

It sets a bit for every block that the tile reads; the number of bits below a block's own is
its place in the union. For units of single tokens; see `query_tiles` for what comes out.
"""

import dataclasses

import jax
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_kernels import mosaic_thread as thread
from pallas_kernels.block_lists import query_tiles, units

_WARPS = 4
# Bytes of a multiprocessor's shared memory, less what the rounding of three arrays takes.
_SHARED_MEMORY = 224 * 1024
_PLAIN = plgpu.RefType()
_SCALAR = plgpu.Layout.WG_SPLAT


def has_room(num_slots: int, num_blocks: int, units_per_tile: int) -> bool:
  """Whether shared memory holds lists of so many slots, and bits for so many blocks."""
  width = query_tiles.width(min(num_slots, num_blocks))
  numbers = units_per_tile * (num_slots + width) + 2 * _num_words(num_blocks)
  return 4 * _WARPS * numbers <= _SHARED_MEMORY


def lists(
  blocks_BTKM: jax.Array,
  first_BT: jax.Array,
  position_T: jax.Array,
  *,
  grouping: units.Grouping,
  block_size: int,
  num_blocks: int,
  units_per_tile: int,
) -> tuple[units.UnitLists, query_tiles.QueryTiles]:
  """What `units.unit_lists` and `query_tiles.query_tiles` return.

  Of a union, only what whole groups of entries reach is written.

  Args:
    blocks_BTKM: block lists in any order, with any numbers.
    first_BT: first key that a query may see: where its document begins.
    position_T: last key that a query may see: its own position.
    grouping: one token per unit.
    block_size: keys per block.
    num_blocks: N.
    units_per_tile: see `query_tiles`.

  Raises:
    ValueError: more blocks than an entry can number.
  """
  query_tiles.check_num_blocks(num_blocks)
  (b, _, k, m), num_units = blocks_BTKM.shape, grouping.num_units
  num_rows, tiles_per_row = b * k, -(-num_units // units_per_tile)
  num_tiles = num_rows * tiles_per_row
  width = query_tiles.width(min(m, num_blocks))
  length = query_tiles.length(num_blocks, units_per_tile * m)
  num_words = _num_words(num_blocks)
  sizes = _Sizes(
    num_heads=k,
    num_slots=m,
    units_per_tile=units_per_tile,
    tiles_per_row=tiles_per_row,
    width=width,
    length=length,
    num_words=num_words,
    block_size=block_size,
    num_blocks=num_blocks,
    grouping=grouping,
  )

  def body(blocks, first, position, entries, union, count, raw, rows, words):
    refs = blocks, first, position, entries, union, count, raw, rows, words

    @plgpu.inline_mgpu(arg_types=(_PLAIN,) * len(refs) + (_SCALAR,), return_type=None)
    def run(context, *args):
      del context
      warp = thread.warp()
      tile = thread.add(thread.multiply(thread.value(args[-1]), _WARPS), warp)
      with mgpu_utils.when(thread.is_less(tile, thread.i32(num_tiles))):
        _Warp(sizes, warp, tile, *args[:-1]).run()

    run(*refs, jnp.int32(lax.axis_index("group")))

  padded_units = tiles_per_row * units_per_tile
  entries_RUE, union_RXC, count_RX = plgpu.kernel(
    body,
    out_type=[
      jax.ShapeDtypeStruct((num_rows, padded_units, width), jnp.int32),
      jax.ShapeDtypeStruct((num_rows, tiles_per_row, length), jnp.int32),
      jax.ShapeDtypeStruct((num_rows, tiles_per_row), jnp.int32),
    ],
    grid=(-(-num_tiles // _WARPS),),
    grid_names=("group",),
    kernel_name="lists_of_queries",
    scratch_types=[
      plgpu.SMEM((_WARPS, units_per_tile * m), jnp.int32),
      plgpu.SMEM((_WARPS, units_per_tile * width), jnp.int32),
      plgpu.SMEM((_WARPS, 2 * num_words), jnp.int32),
    ],
  )(blocks_BTKM.astype(jnp.int32), first_BT.astype(jnp.int32), position_T.astype(jnp.int32))

  is_entry_RUE = entries_RUE < query_tiles.END
  blocks_RUE = jnp.where(is_entry_RUE, entries_RUE >> query_tiles.PLACE_BITS, units.NONE)
  blocks_RUE = blocks_RUE[:, :num_units, : min(m, num_blocks)]
  first_BU, last_BU = units.seen_by_all(first_BT, position_T, grouping)
  unit_lists = units.UnitLists(
    blocks_RUE, (blocks_RUE < units.NONE).astype(jnp.int32), first_BU, last_BU
  )
  tiles = query_tiles.QueryTiles(
    union_RXC, count_RX, entries_RUE, is_entry_RUE.astype(jnp.int32)
  )
  return unit_lists, tiles


def _num_words(num_blocks: int) -> int:
  """Words with a bit for every block, a multiple of 32."""
  return 32 * -(-num_blocks // (32 * 32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
  """What is known of a call before it runs.

  Attributes:
    num_heads: K.
    num_slots: M.
    units_per_tile, tiles_per_row, block_size, num_blocks, grouping: see `lists`.
    width: entries of a unit, and room for what is read beyond them.
    length: numbers of a union.
    num_words: of a bit for every block, a multiple of 32.
  """

  num_heads: int
  num_slots: int
  units_per_tile: int
  tiles_per_row: int
  width: int
  length: int
  num_words: int
  block_size: int
  num_blocks: int
  grouping: units.Grouping


@dataclasses.dataclass(frozen=True)
class _Warp:
  """One warp at work on one tile.

  Attributes:
    sizes: of the call.
    warp: its number in its warpgroup.
    tile: its number among all rows R.
    blocks, first, position: what is read of device memory.
    entries, union, count: what is written there.
    raw, rows, words: shared memory of the four warps: lists as they come, entries, and
      bits of blocks with, behind them, how many are set below each word.
  """

  sizes: _Sizes
  warp: object
  tile: object
  blocks: object
  first: object
  position: object
  entries: object
  union: object
  count: object
  raw: object
  rows: object
  words: object

  def run(self) -> None:
    sizes = self.sizes
    num_slots = sizes.units_per_tile * sizes.num_slots
    num_entries = sizes.units_per_tile * sizes.width
    zero, end = thread.i32(0), thread.i32(query_tiles.END)
    thread.for_lanes(sizes.num_words, lambda i: thread.store_shared(self._word(i), zero))
    thread.for_lanes(num_entries, lambda i: thread.store_shared(self._entry(i), end))
    thread.for_lanes(num_slots, self._load)
    mgpu_utils.warp_barrier()
    thread.for_lanes(num_slots, self._set_bit)
    mgpu_utils.warp_barrier()
    count = thread.loop(sizes.num_words // 32, self._count_bits, zero)
    mgpu_utils.warp_barrier()
    last = arith.maxsi(arith.subi(count, thread.i32(1)), zero)
    self._end_union(zero, zero, thread.is_equal(count, zero))
    thread.for_lanes(num_slots, lambda i: self._place(i, last))
    mgpu_utils.warp_barrier()
    first_entry = thread.multiply(self.tile, num_entries)

    def write(i):
      entry = thread.load_shared(self._entry(i))
      thread.store_global(self.entries, thread.add(first_entry, i), entry)

    thread.for_lanes(num_entries, write)
    with mgpu_utils.when(thread.is_equal(thread.lane(), zero)):
      thread.store_global(self.count, self.tile, count)

  # Where the warp's numbers lie in shared memory.

  def _slot(self, i):
    return self._own(self.raw, self.sizes.units_per_tile * self.sizes.num_slots, i)

  def _entry(self, i):
    return self._own(self.rows, self.sizes.units_per_tile * self.sizes.width, i)

  def _word(self, i):
    return self._own(self.words, 2 * self.sizes.num_words, i)

  def _own(self, ref, size: int, i):
    index = thread.add(thread.multiply(self.warp, size), i)
    return thread.add(thread.smem_address(ref), thread.multiply(index, 4))

  # Steps.

  def _load(self, i) -> None:
    """Loads a slot; what the query does not see counts as empty."""
    sizes, grouping = self.sizes, self.sizes.grouping
    row, x = thread.divide(self.tile, sizes.tiles_per_row)
    b, head = thread.divide(row, sizes.num_heads)
    unit, slot = thread.divide(i, sizes.num_slots)
    unit = thread.add(thread.multiply(x, sizes.units_per_tile), unit)
    token, _ = thread.divide(unit, grouping.units_per_token)
    is_there = thread.is_less(token, thread.i32(grouping.num_tokens))
    token = arith.select(is_there, token, thread.i32(0))
    place = thread.add(thread.multiply(b, grouping.num_tokens), token)
    index = thread.add(thread.multiply(place, sizes.num_heads), head)
    index = thread.add(thread.multiply(index, sizes.num_slots), slot)
    block = thread.load_global(self.blocks, index)
    first = thread.load_global(self.first, place)
    position = thread.load_global(self.position, token)

    is_block = thread.is_between(block, thread.i32(0), thread.i32(sizes.num_blocks))
    begin = thread.multiply(arith.select(is_block, block, thread.i32(0)), sizes.block_size)
    end = thread.add(begin, thread.i32(sizes.block_size))
    is_seen = arith.andi(is_block, is_there)
    is_seen = arith.andi(is_seen, arith.cmpi(arith.CmpIPredicate.sle, begin, position))
    is_seen = arith.andi(is_seen, thread.is_less(first, end))
    block = arith.select(is_seen, block, thread.i32(units.NONE))
    thread.store_shared(self._slot(i), block)

  def _set_bit(self, i) -> None:
    """Sets the bit of a slot's block; empties the slot if one before it has the same."""
    own = thread.load_shared(self._slot(i))
    unit, slot = thread.divide(i, self.sizes.num_slots)

    def look(j, is_repeat):
      is_same = thread.is_equal(thread.load_shared(self._slot_of(unit, j)), own)
      is_same = arith.andi(is_same, thread.is_less(j, slot))
      return arith.ori(is_repeat, arith.extui(thread.int32(), is_same))

    is_repeat = thread.loop(self.sizes.num_slots, look, thread.i32(0))
    # The first of equal ones always stays, so that it does not matter who is emptied when.
    empty = thread.is_equal(is_repeat, thread.i32(1))
    thread.store_shared(self._slot(i), thread.i32(units.NONE), empty)
    bit = arith.shli(thread.i32(1), thread.bits(own, 0, 31))
    with mgpu_utils.when(thread.is_less(own, thread.i32(units.NONE))):
      place = self._word(arith.shrui(own, thread.i32(5)))
      mgpu_utils.inline_ptx("red.shared.or.b32 [$0], $1;", place, bit, has_side_effects=True)

  def _count_bits(self, n, before):
    """Writes how many bits are set below each of 32 words; returns all up to their end."""
    lane = thread.lane()
    i = thread.add(thread.multiply(n, 32), lane)
    own = thread.popcount(thread.load_shared(self._word(i)))
    total = own
    for distance in (1, 2, 4, 8, 16):
      ptx = f"shfl.sync.up.b32 $0, $1, {distance}, 0, 0xffffffff;"
      lower = thread.convergent(ptx, total)
      is_first = thread.is_less(lane, thread.i32(distance))
      total = thread.add(total, arith.select(is_first, thread.i32(0), lower))
    below = thread.add(before, arith.subi(total, own))
    thread.store_shared(self._word(i), below, offset=4 * self.sizes.num_words)
    ptx = "shfl.sync.idx.b32 $0, $1, 31, 0x1f, 0xffffffff;"
    return thread.add(before, thread.convergent(ptx, total))

  def _place(self, i, last) -> None:
    """Puts a slot's block into the union, and its entry into the unit's list."""
    own = thread.load_shared(self._slot(i))
    unit, _ = thread.divide(i, self.sizes.num_slots)
    with mgpu_utils.when(thread.is_less(own, thread.i32(units.NONE))):

      def compare(j, rank):
        is_lower = thread.is_less(thread.load_shared(self._slot_of(unit, j)), own)
        return thread.add(rank, arith.extui(thread.int32(), is_lower))

      rank = thread.loop(self.sizes.num_slots, compare, thread.i32(0))
      word = self._word(arith.shrui(own, thread.i32(5)))
      lower = arith.andi(thread.load_shared(word), thread.lower_bits(thread.bits(own, 0, 31)))
      below = thread.load_shared(word, 4 * self.sizes.num_words)
      place = thread.add(below, thread.popcount(lower))
      entry = arith.ori(arith.shli(own, thread.i32(query_tiles.PLACE_BITS)), place)
      index = thread.add(thread.multiply(unit, self.sizes.width), rank)
      thread.store_shared(self._entry(index), entry)
      self._store_in_union(place, own)
      self._end_union(last, own, thread.is_equal(place, last))

  def _end_union(self, last, block, is_last) -> None:
    """Repeats the last block as far as a group of entries that begins there may reach."""
    with mgpu_utils.when(is_last):
      for n in range(query_tiles.GROUP):
        place = thread.add(last, thread.i32(n))
        with mgpu_utils.when(thread.is_less(place, thread.i32(self.sizes.length))):
          self._store_in_union(place, block)

  def _slot_of(self, unit, j):
    return self._slot(thread.add(thread.multiply(unit, self.sizes.num_slots), j))

  def _store_in_union(self, place, block) -> None:
    first = thread.multiply(self.tile, self.sizes.length)
    thread.store_global(self.union, thread.add(first, place), block)
