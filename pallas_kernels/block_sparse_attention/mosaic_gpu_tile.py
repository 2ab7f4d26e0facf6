"""A tile of queries as one of a kernel's threads sees it; see `mosaic_gpu_walk`."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from pallas_kernels import mosaic_ring
from pallas_kernels.block_lists import query_tiles
from pallas_kernels.block_sparse_attention import mosaic_gpu_threads as threads
from pallas_kernels.block_sparse_attention.mosaic_gpu_group import Group
from pallas_kernels.block_sparse_attention.mosaic_gpu_shape import UNIT, Shape


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
