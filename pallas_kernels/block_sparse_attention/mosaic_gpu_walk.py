"""Kernels in which the warps of a tile walk along the union of their lists.

A warp holds one unit, 16 rows of queries that share a list: with 16 heads per key head, one
token. The units of a tile, neighbours, mostly list the same blocks, so the union of their
lists goes through shared memory once; each warp picks what its unit lists, and no product
is spent on what it does not. Lists ascend, and so does the union: it streams through a
ring, and warps run along it, each at its own pace, a step of 64 keys at a time.

See `mosaic_gpu_shape` for the letters.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_barrier, mosaic_inline, mosaic_ring
from pallas_kernels.block_lists import query_tiles
from pallas_kernels.block_sparse_attention import mosaic_gpu_threads as threads
from pallas_kernels.block_sparse_attention.mosaic_gpu_shape import UNIT, Shape

# Far below any score, and still finite after the subtraction of another one.
MASKED = -1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """What may change speed but never the answer.

  Attributes:
    warpgroups: that compute, each with four units.
    stages: of 64 keys and values in shared memory.
    registers: of each computing thread.
  """

  warpgroups: int
  stages: int
  registers: int

  @property
  def units_per_tile(self) -> int:
    return 4 * self.warpgroups


class Lists(NamedTuple):
  """What every kernel over query tiles reads; what a call does not have is None.

  `first_BL` and `position_BL` hold the first and the last key that each row of queries may
  see, L = 16 U rows, padded to whole tiles. `bias_BKS` is float32.
  """

  k_BSKD: jax.Array
  v_BSKD: jax.Array
  union_RXC: jax.Array
  count_RX: jax.Array
  entries_RUE: jax.Array
  first_BL: jax.Array
  position_BL: jax.Array
  tokens_RUE: jax.Array | None
  bias_BKS: jax.Array | None


def call(
  name: str,
  own: Sequence[jax.Array],
  lists: Lists,
  *,
  shape: Shape,
  config: Config,
  out_type: Sequence[jax.ShapeDtypeStruct],
  scratch: dict[str, Any],
  num_copies: int,
  copies: Callable,
  load: Callable,
  attend: Callable,
  interpret=None,
) -> list[jax.Array]:
  """Runs a kernel over all tiles.

  Args:
    name: of the kernel, as profilers show it.
    own: arrays that this kernel reads besides the lists.
    lists: the others.
    shape, config: of the call.
    out_type: of what it returns.
    scratch: shared memory by name, an entry for each thread, for what a tile needs.
    num_copies: how many copies `copies` gives.
    copies: `copies(tile, own_refs, scratch_refs)` gives sources, indices into them and
      targets, to be copied before a thread begins a tile.
    load: `load(tile, scratch_refs)` takes into registers all that was copied, so that the
      copies for the next tile can begin; the first thing that a thread does.
    attend: `attend(tile, loaded, out_refs)` is the rest of its work on a tile.
    interpret: of `plgpu.kernel`.
  """
  warps = shape.warps
  num_threads = config.units_per_tile // warps.per_thread
  num_tiles = lists.count_RX.shape[1]
  width = lists.entries_RUE.shape[-1]
  slots = config.stages * shape.group
  names = [name for name, x in lists._asdict().items() if x is not None]

  def body(*refs, walk, own_scratch):
    own_refs, refs = refs[: len(own)], refs[len(own) :]
    list_refs, out_refs = refs[: len(names)], refs[len(names) :]
    gmem = Lists(**dict.fromkeys(Lists._fields) | dict(zip(names, list_refs, strict=True)))
    worker, thread = lax.axis_index("worker"), lax.axis_index("thread")
    num_rows = jnp.int32(shape.num_rows)
    total = shape.num_rows * num_tiles
    num_own = lax.div(total - worker + shape.num_workers - 1, jnp.int32(shape.num_workers))

    def tile_of(i, before) -> Tile:
      """The i-th tile of this worker, the last ones of a row first: they read most."""
      number = total - 1 - (worker + i * shape.num_workers)
      row, x = lax.rem(number, num_rows), lax.div(number, num_rows)
      count = gmem.count_RX[row, x]
      num_stages = lax.div(count + shape.group - 1, jnp.int32(shape.group))
      ring = threads.ring_of(walk, config.stages, shape, thread, before)
      return Tile(shape, config, gmem, walk, ring, row, x, num_stages, thread, i & 1)

    def compute():
      ready = mosaic_barrier.Barriers(walk["ready"], shape.own_barriers)

      def begin_copies(i):
        @pl.when(i < num_own)
        def _begin():
          tile = tile_of(i, jnp.int32(0))
          ready.copy(thread, [*tile.copies(), *copies(tile, own_refs, own_scratch)])

      def work(i, before):
        tile = tile_of(i, before)
        ready.wait(thread, tile.turn)
        loaded = load(tile, own_scratch)
        # All warps have read what the copies for the next tile write over.
        plgpu.commit_smem()
        begin_copies(i + 1)
        attend(tile, loaded, out_refs)
        return before + tile.num_stages

      begin_copies(jnp.int32(0))
      lax.fori_loop(0, num_own, work, jnp.int32(0))

    def fetch(warp):
      def stream(i, before):
        tile = tile_of(i, before)
        tile.stream(warp)
        return before + tile.num_stages

      in_all = lax.fori_loop(0, num_own, stream, jnp.int32(0))
      threads.ring_of(walk, config.stages, shape, thread, in_all).drain()

    num_fetchers = threads.num_fetchers(shape, shape.group)
    threads.set_up(walk, shape, thread, {"ready": 1, "filled": num_fetchers})
    threads.run(thread, num_threads, config.registers, compute, fetch, num_fetchers)

  num_pieces = -(-width // query_tiles.COPY)
  num_list_copies = 1 if num_pieces == 1 else num_pieces * warps.per_thread
  num_ready = 2 + (1 + shape.has_tokens) * num_list_copies + num_copies
  num_filled = (2 + shape.has_bias) * shape.group

  walk = dict(
    k=tiled((slots * shape.block_size, shape.head_dim)),
    v=tiled((slots * shape.block_size, shape.head_dim)),
    # Of a tile, and of the one after it.
    entries=plgpu.SMEM((2, num_threads, warps.per_thread, width), jnp.int32),
    first=plgpu.SMEM((2, num_threads, warps.rows), jnp.int32),
    position=plgpu.SMEM((2, num_threads, warps.rows), jnp.int32),
    ready=mosaic_barrier.scratch(num_threads, num_ready, shape.own_barriers),
    **threads.ring_scratch(config.stages, num_filled, shape, num_threads),
  )
  if shape.has_tokens:
    walk["tokens"] = walk["entries"]
  if shape.has_bias:
    walk["bias"] = plgpu.SMEM((slots, max(32, shape.block_size)), jnp.float32)
  return plgpu.kernel(
    body,
    out_type=out_type,
    grid=(shape.num_workers,),
    grid_names=("worker",),
    num_threads=num_threads + 1,
    thread_name="thread",
    kernel_name=name,
    scratch_types=dict(walk=walk, own_scratch=scratch),
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=interpret,
  )(*own, *(x for x in lists if x is not None))


@dataclasses.dataclass(frozen=True)
class Tile:
  """A tile as one of its threads sees it.

  Attributes:
    shape, config: of the call.
    gmem, smem: refs of the lists, and of the walk's shared memory.
    ring: of blocks.
    row, x: which row R, and which tile of it.
    num_stages: of the union.
    thread: number of the thread.
    turn: which half of what is there twice belongs to this tile.
  """

  shape: Shape
  config: Config
  gmem: Lists
  smem: dict[str, Any]
  ring: mosaic_ring.Ring
  row: jax.Array
  x: jax.Array
  num_stages: jax.Array
  thread: jax.Array
  turn: jax.Array

  def own(self, name: str):
    """The thread's part of what the walk knows of its units."""
    return self.smem[name].at[self.turn, self.thread]

  @property
  def first_unit(self) -> jax.Array:
    """Of the thread."""
    first = self.x * self.config.units_per_tile
    return first + self.thread * self.shape.warps.per_thread

  @property
  def lines(self):
    """The thread's rows of queries among all of a row R."""
    return pl.ds(self.first_unit * UNIT, self.shape.warps.rows)

  def unit_slices(self, array_BVXD, smem):
    """A packed array, the index of a unit's part and its rows of `smem` [rows, D]."""
    b, head = self.shape.batch_and_head(self.row)
    for n in range(self.shape.warps.per_thread):
      v, h = self.shape.place_of_unit(head, self.first_unit + n)
      index = b, v, pl.ds(h, UNIT), pl.ds(0, self.shape.head_dim)
      yield array_BVXD, index, smem.at[pl.ds(n * UNIT, UNIT)]

  def store(self, array_BVXD, x) -> None:
    """Writes the thread's rows of a packed array, bfloat16 [rows, D]."""
    b, head = self.shape.batch_and_head(self.row)
    unit = self.first_unit + self.shape.warps.index()
    v, h = self.shape.place_of_unit(head, unit)
    _, num_v, num_x, _ = array_BVXD.shape
    is_there = unit < self.shape.num_units
    row = (b * num_v + v) * num_x + h
    self.shape.warps.store_global_rows(array_BVXD, row, is_there, x)

  def copies(self):
    """What the walk needs of the thread's units."""
    b, _ = self.shape.batch_and_head(self.row)
    gmem = self.gmem
    yield from self._copies_of_lists(gmem.entries_RUE, self.own("entries"))
    yield gmem.first_BL, (b, self.lines), self.own("first")
    yield gmem.position_BL, (b, self.lines), self.own("position")
    if self.shape.has_tokens:
      yield from self._copies_of_lists(gmem.tokens_RUE, self.own("tokens"))

  def _copies_of_lists(self, array_RUE, target):
    """Copies of the lists of the thread's units: one, or pieces of each where they are long."""
    width, num_units = array_RUE.shape[-1], self.shape.warps.per_thread
    if width <= query_tiles.COPY:
      yield array_RUE, (self.row, pl.ds(self.first_unit, num_units), pl.ds(0, width)), target
      return
    for n in range(num_units):
      for start in range(0, width, query_tiles.COPY):
        piece = pl.ds(start, min(query_tiles.COPY, width - start))
        yield array_RUE, (self.row, self.first_unit + n, piece), target.at[n, piece]

  def walk(self, step: Callable[["Group", Any], Any], start: Any) -> Any:
    """Carries `start` through `step(group, carry)` for all groups of each warp's list."""
    warps, entries = self.shape.warps, self.own("entries")
    # What all rows of a unit see of a block between these two, they see whole.
    (first,) = warps.words(self.own("first"), UNIT - 1, 1)
    (last,) = warps.words(self.own("position"), 0, 1)

    def advance(state):
      e, entry, ready, left, carry = state
      group, ready, left = self._take(e, entry, ready, left, first, last)
      carry = step(group, carry)
      e = e + group.num_taken
      (entry,) = warps.words(entries, e, 1)
      return e, entry, ready, left, carry

    zero = jnp.int32(0)
    (entry,) = warps.words(entries, zero, 1)
    state = zero, entry, zero, zero, start
    *_, ready, left, carry = lax.while_loop(
      lambda state: state[1] < query_tiles.END, advance, state
    )
    self.ring.leave(ready, left, self.num_stages)
    return carry

  def _take(self, e, entry, ready, left, first, last):
    """Leaves the ring below an entry; takes it and as many after it as the ring can hold."""
    shape, ring = self.shape, self.ring
    in_place, shift = (1 << query_tiles.PLACE_BITS) - 1, int(math.log2(shape.group))
    stage = lax.shift_right_logical(entry & in_place, shift)
    ready, left = ring.leave(ready, left, stage)
    entries = shape.warps.words(self.own("entries"), e, shape.group)
    # Further on there is no room before this warp has left the stage it is in.
    limit = (stage + ring.num_stages) * shape.group
    is_taken = [(x < query_tiles.END) & ((x & in_place) < limit) for x in entries]
    is_taken[0] = jnp.bool_(True)
    # Where nothing is taken, the first block stands in, and is masked.
    places = [
      jnp.where(taken, x & in_place, entry & in_place)
      for x, taken in zip(entries, is_taken, strict=True)
    ]
    furthest = places[0]
    for place in places[1:]:
      furthest = jnp.maximum(furthest, place)
    ready = ring.wait(ready, lax.shift_right_logical(furthest, shift) + 1)
    group = Group(self, entries, is_taken, places, e, first, last)
    return group, ready, left

  def stream(self, warp) -> None:
    """Fills the ring with the blocks of the union: one warp's part of each stage."""
    shape, gmem, smem = self.shape, self.gmem, self.smem
    warps, chunk = shape.warps, query_tiles.CHUNK
    b, head = shape.batch_and_head(self.row)
    union = gmem.union_RXC.at[self.row, self.x]
    per_chunk = chunk // shape.group

    def copies_of_block(slot, block):
      keys = pl.ds(block * shape.block_size, shape.block_size)
      lines = pl.ds(slot * shape.block_size, shape.block_size)
      index = b, keys, head, pl.ds(0, shape.head_dim)
      yield gmem.k_BSKD, index, smem["k"].at[lines]
      yield gmem.v_BSKD, index, smem["v"].at[lines]
      if shape.has_bias:
        target = smem["bias"].at[slot, pl.ds(0, shape.block_size)]
        yield gmem.bias_BKS, (b, head, keys), target

    def stream_chunk(c, handle):
      # The numbers of the next chunk are on their way while this one is copied.
      last_chunk = gmem.union_RXC.shape[-1] - chunk
      ahead = warps.fetch(union, jnp.minimum((c + 1) * chunk, last_chunk))

      def stream_stage(n, _):
        def copies(place):
          for j in threads.own_parts(warp, shape, shape.group):
            block = warps.fetched(union, handle, n * shape.group + j)
            yield from copies_of_block(place * shape.group + j, block)

        self.ring.fill(c * per_chunk + n, copies)

      num_left = self.num_stages - c * per_chunk
      lax.fori_loop(0, jnp.minimum(per_chunk, num_left), stream_stage, None)
      return ahead

    num_chunks = lax.div(self.num_stages + per_chunk - 1, jnp.int32(per_chunk))
    lax.fori_loop(0, num_chunks, stream_chunk, warps.fetch(union, jnp.int32(0)))


@dataclasses.dataclass(frozen=True)
class Group:
  """The blocks that a warp takes in one step.

  Attributes:
    tile: that it walks along.
    entries: of the blocks, ascending.
    is_taken: which of them count: the first ones.
    places: of the blocks in the union.
    e: number of the first entry in its list.
    first, last: keys between which every row of the unit sees everything.
  """

  tile: Tile
  entries: list[jax.Array]
  is_taken: list[jax.Array]
  places: list[jax.Array]
  e: jax.Array
  first: jax.Array
  last: jax.Array

  @property
  def num_taken(self) -> jax.Array:
    return sum(taken.astype(jnp.int32) for taken in self.is_taken)

  @property
  def _slots(self) -> list[jax.Array]:
    """Places of the blocks in the ring."""
    ring, group = self.tile.ring, self.tile.shape.group
    size = ring.num_stages * group
    return [mosaic_ring.wrap(ring.before * group + place, size) for place in self.places]

  @property
  def pieces(self) -> list[jax.Array]:
    """Numbers of the group's pieces, 16 keys each, in the ring."""
    per_block = self.tile.shape.pieces_per_block
    return [slot * per_block + i for slot in self._slots for i in range(per_block)]

  def biases(self, numbers: range) -> jax.Array:
    """Biases of the keys of some of its pieces, [rows, 16 len(numbers)]."""
    shape, slots = self.tile.shape, self._slots
    per_block = shape.pieces_per_block
    places = [(slots[n // per_block], UNIT * (n % per_block)) for n in numbers]
    return shape.warps.columns(self.tile.smem["bias"], places)

  def masked(self, scores, numbers: range) -> jax.Array:
    """The scores of some of its pieces, with what a row does not see put out of reach."""
    if self.tile.shape.has_tokens:
      return self._mask(scores, numbers)
    # Entries ascend, so the outer blocks tell. What is not taken has to go in any case.
    begins, size = self._begins, self.tile.shape.block_size
    is_edge = ~self.is_taken[-1]
    is_edge |= (begins[0] < self.first) | (begins[-1] + (size - 1) > self.last)
    return lax.cond(is_edge, lambda s: self._mask(s, numbers), lambda s: s, scores)

  @property
  def _begins(self) -> list[jax.Array]:
    """First keys of the blocks."""
    shift, size = query_tiles.PLACE_BITS, self.tile.shape.block_size
    return [lax.shift_right_logical(x, shift) * size for x in self.entries]

  def _mask(self, scores, numbers):
    tile, shape = self.tile, self.tile.shape
    warps, per_block = shape.warps, shape.pieces_per_block
    first = warps.load_vector(tile.own("first"))
    position = warps.load_vector(tile.own("position"))
    column = warps.iota(1)
    if shape.has_tokens:
      bits = warps.words(tile.own("tokens"), self.e, shape.group)
      token = token_of_row(shape)
    parts = []
    for i, n in enumerate(numbers):
      block = n // per_block
      begin = self._begins[block] + UNIT * (n % per_block)
      # What is not taken begins beyond all positions.
      seen_from = jnp.where(self.is_taken[block], begin, jnp.int32(2**30))
      low, high = (along_rows(x, column.shape) for x in (first - begin, position - seen_from))
      is_seen = (column >= low) & (column <= high)
      if shape.has_tokens:
        is_seen &= (lax.shift_right_logical(bits[block], token) & 1) == 1
      parts.append(jnp.where(is_seen, scores[:, UNIT * i : UNIT * (i + 1)], MASKED))
    return jnp.concatenate(parts, axis=1)


def token_of_row(shape: Shape, axis: int = 0):
  """[rows, 16]: which of its unit's tokens each row (or column) belongs to."""
  rows_per_token = UNIT // shape.tokens_per_unit
  return lax.div(shape.warps.iota(axis) & (UNIT - 1), jnp.int32(rows_per_token))


def tiled(shape):
  """Shared memory for bfloat16 arrays that take part in products."""
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=mosaic_inline.TRANSFORMS)


def along_rows(x_rows, shape):
  """[rows] as the same number in every column."""
  return lax.broadcast_in_dim(x_rows, shape, [0])
