"""A worker's windows of one tile of keys; see `mosaic_gpu_dkv`."""

from collections.abc import Callable
import dataclasses
import functools
import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_ring
from pallas_kernels.block_lists import key_tiles
from pallas_kernels.block_sparse_attention import mosaic_gpu_arrays as arrays
from pallas_kernels.block_sparse_attention import mosaic_gpu_threads as threads
from pallas_kernels.block_sparse_attention.mosaic_gpu_pair import DELTA, LSE, Pair, lowest
from pallas_kernels.block_sparse_attention.mosaic_gpu_shape import UNIT, Shape

_LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """What may change speed but never the answer.

  Attributes:
    warpgroups: that compute, each with four pieces of keys.
    stages: of the ring.
    units_per_stage: a power of two that divides a window.
    registers: of each computing thread.
    keys_in_registers: whether there is room there for keys and values, beside their sums;
      else they are read from shared memory again and again.
    rounds: that the work is done in. What all workers read in one round, of queries, is
      the less the more there are, and stays in the cache of the device.
    whole_blocks: whether a tile is a block of 64 keys, which the warpgroups hold together;
      see `mosaic_gpu_block_share`.
  """

  warpgroups: int
  stages: int
  units_per_stage: int
  registers: int
  keys_in_registers: bool
  rounds: int
  whole_blocks: bool = False

  @property
  def keys_per_tile(self) -> int:
    return 64 if self.whole_blocks else 64 * self.warpgroups


@dataclasses.dataclass(frozen=True)
class Share:
  """A worker's windows of one tile in one part of the work.

  Attributes:
    shape, config: of the call.
    gmem, smem: refs by name.
    ring: of units.
    tile: number of the tile among those of all rows R.
    part: number of the part.
    tiles_per_row: tiles of a row.
    window, end: the first window, and the one after the last.
  """

  shape: Shape
  config: Config
  gmem: dict
  smem: dict
  ring: mosaic_ring.Ring
  tile: jax.Array
  part: jax.Array
  tiles_per_row: int
  window: jax.Array
  end: jax.Array

  @property
  def row(self) -> jax.Array:
    return lax.div(self.tile, jnp.int32(self.tiles_per_row))

  @property
  def first_key(self) -> jax.Array:
    x = lax.rem(self.tile, jnp.int32(self.tiles_per_row))
    return x * self.config.keys_per_tile

  def first_own_key(self, thread) -> jax.Array:
    """Of a thread."""
    return self.first_key + thread * self.shape.warps.rows

  def keys_and_values(self, thread) -> list[Callable[[], jax.Array]]:
    """What gives each warp's keys, and its values, [rows, D] both."""
    shape, warps = self.shape, self.shape.warps
    b, head = shape.batch_and_head(self.row)
    key = self.first_own_key(thread) + UNIT * warps.index()
    # Behind the last key anything will do: no unit reads it.
    key = jnp.minimum(key, shape.num_keys - UNIT)
    row = (b * shape.num_keys + key) * shape.num_kv_heads + head
    loaded = [
      warps.load_global_rows(self.gmem[name], row, shape.num_kv_heads) for name in ("k", "v")
    ]
    if self.config.keys_in_registers:
      return [functools.partial(lambda x: x, x) for x in loaded]
    places = [self.smem["own_keys"].at[i, thread] for i in range(len(loaded))]
    # A warp writes and reads its own 16 rows alone.
    for place, x in zip(places, loaded, strict=True):
      place[...] = x
    warps.synchronize()
    return [functools.partial(warps.load_rows, place) for place in places]

  def biases(self, thread) -> jax.Array:
    """Biases of the thread's keys, [rows], in base 2."""
    b, head = self.shape.batch_and_head(self.row)
    warps, target = self.shape.warps, self.smem["bias"].at[thread]
    # Those of the tile before have been read by every warp.
    plgpu.commit_smem()
    keys = pl.ds(self.first_own_key(thread), warps.rows)
    barrier = self.smem["bias_ready"].at[thread]
    plgpu.copy_gmem_to_smem(self.gmem["bias"].at[b, head, keys], target, barrier)
    plgpu.barrier_wait(barrier)
    return _LOG2E * warps.load_vector(target)

  def sums(self, thread, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The thread's sums over the windows: dk / scale, dv and dbias."""
    shape, smem, warps = self.shape, self.smem, self.shape.warps
    k, v = self.keys_and_values(thread)
    bias = self.biases(thread) if shape.has_bias else None

    def step(pair, sums):
      dk, dv, dbias = sums
      pieces = pair.slots
      scores, factor = warps.products(k(), smem["q"], pieces), scale * _LOG2E
      if shape.has_bias:
        scores = scores * factor + arrays.along_rows(bias, scores.shape)
        factor = 1.0
      scores = pair.masked(scores)
      weights = jnp.exp2(scores * factor - pair.columns(LSE))
      dv = warps.add_products(dv, weights.astype(jnp.bfloat16), smem["dout"], pieces)
      dweights = warps.products(v(), smem["dout"], pieces)
      dscores = weights * (dweights - pair.columns(DELTA))
      if shape.has_bias:
        dbias = dbias + dscores.sum(axis=1)
      dk = warps.add_products(dk, dscores.astype(jnp.bfloat16), smem["q"], pieces)
      return dk, dv, dbias

    d = shape.head_dim
    start = warps.zeros(d), warps.zeros(d), warps.filled(0.0)
    return self._walk(step, start, thread)

  def _walk(self, step, start, thread):
    """Carries `start` through `step(pair, carry)` for all units that read a warp's piece."""
    warps, ring, stage_units = self.shape.warps, self.ring, self.config.units_per_stage
    shift = int(math.log2(stage_units))
    pieces, per_window = self.gmem["pieces"], key_tiles.WINDOW // stage_units
    own_piece = thread * warps.per_thread + warps.index()

    def stage_of(slot):
      return lax.shift_right_logical(slot, shift)

    def votes(window):
      """Which units of a window read the warp's piece, and which are at an edge."""
      start = window * key_tiles.WINDOW
      edge = jnp.int32(key_tiles.EDGE_BIT)
      return warps.ballot(pieces, start, own_piece), warps.ballot(pieces, start, edge)

    def walk_window(window, state):
      ready, left, (bits, edges), carry = state
      # The votes on the next window are on their way while this one is worked on.
      ahead = votes(window + 1)
      first_slot = (window - self.window) * key_tiles.WINDOW

      def advance(state):
        bits, ready, left, carry = state
        i = lowest(bits)
        stage = stage_of(first_slot + i)
        ready, left = ring.leave(ready, left, stage)
        others = bits & (bits - 1)
        j = lowest(others)
        # Further on there is no room before this warp has left the stage it is in.
        is_pair = (others != 0) & (stage_of(first_slot + j) < stage + ring.num_stages)
        j = jnp.where(is_pair, j, i)
        ready = ring.wait(ready, stage_of(first_slot + j) + 1)
        pair = Pair(self, own_piece, window, (i, j), first_slot, is_pair, edges)
        carry = step(pair, carry)
        return jnp.where(is_pair, others & (others - 1), others), ready, left, carry

      _, ready, left, carry = lax.while_loop(
        lambda state: state[0] != 0, advance, (bits, ready, left, carry)
      )
      ready, left = ring.leave(ready, left, (window - self.window + 1) * per_window)
      return ready, left, ahead, carry

    zero = jnp.int32(0)
    state = zero, zero, votes(self.window), start
    *_, carry = lax.fori_loop(self.window, self.end, walk_window, state)
    return carry

  def rows_of_unit(self, rows, place, i):
    """Where the rows of the i-th unit of a stage lie in shared memory."""
    return rows.at[pl.ds((place * self.config.units_per_stage + i) * UNIT, UNIT)]

  def stream(self, warp) -> None:
    """Fills the ring with the units of the windows: one warp's part of each stage."""
    shape, gmem, smem = self.shape, self.gmem, self.smem
    warps, stage_units = shape.warps, self.config.units_per_stage
    b, head = shape.batch_and_head(self.row)
    per_window = key_tiles.WINDOW // stage_units

    def copies_of_unit(place, i, unit):
      v, h = shape.place_of_unit(head, unit)
      for name in ("q", "dout"):
        index = b, v, pl.ds(h, UNIT), pl.ds(0, shape.head_dim)
        yield gmem[name], index, self.rows_of_unit(smem[name], place, i)
      index = self.row, unit, pl.ds(0, 4 * UNIT)
      yield gmem["numbers"], index, smem["numbers"].at[place * stage_units + i]

    def stream_window(window, handle):
      ahead = warps.fetch(gmem["units"], (window + 1) * key_tiles.WINDOW)

      def stream_stage(n, _):
        def copies(place):
          for i in threads.own_parts(warp, shape, stage_units):
            unit = warps.fetched(gmem["units"], handle, n * stage_units + i)
            if self.config.whole_blocks:
              # Here all of a stage is multiplied, and room left at a window's end, where units
              # are 0, by weights of 0: what is there must be the tile's own, for 0 times a NaN
              # is one. Units ascend.
              unit = jnp.maximum(unit, warps.fetched(gmem["units"], handle, 0))
            yield from copies_of_unit(place, i, unit)

        self.ring.fill((window - self.window) * per_window + n, copies)

      lax.fori_loop(0, per_window, stream_stage, None)
      return ahead

    handle = warps.fetch(gmem["units"], self.window * key_tiles.WINDOW)
    lax.fori_loop(self.window, self.end, stream_window, handle)
