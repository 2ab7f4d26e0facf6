"""The kernel for the gradients of keys and values on Hopper GPUs.

A warp holds a piece of 16 keys and values; a tile is the pieces of all warps of a
multiprocessor. The units that read the tile stream through a ring, in the order of
`block_lists.key_tiles`, and each warp takes those that read its piece. Scores stand on
their side here, keys down the rows and a unit's 16 queries along the columns.

No two warps write to the same place and every sum has a fixed order, so gradients are the
same every time. A tile that several workers share has a partial sum of each; `mosaic_gpu_parts`
adds them up.

See `mosaic_gpu_shape` for the letters. More: W windows of 32 units, P pieces of a tile,
X tiles, Y partial sums.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_ring
from pallas_kernels.block_lists import key_tiles
from pallas_kernels.block_sparse_attention import mosaic_gpu_threads as threads
from pallas_kernels.block_sparse_attention import mosaic_gpu_walk as walk
from pallas_kernels.block_sparse_attention.mosaic_gpu_shape import UNIT, Shape

_LOG2E = math.log2(math.e)
# Units that a warp takes in one step.
_PAIR = 2
# Numbers of every row of queries, 16 of each: lse in base 2, delta, and the first and the
# last key that it may see. As float32, which holds positions up to 2**24 exactly.
LSE, DELTA, FIRST, LAST = range(0, 4 * UNIT, UNIT)


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
  """

  warpgroups: int
  stages: int
  units_per_stage: int
  registers: int
  keys_in_registers: bool
  rounds: int

  @property
  def keys_per_tile(self) -> int:
    return 64 * self.warpgroups


class Sums(NamedTuple):
  """Partial sums of all tiles, float32; `dbias_YN` is None where keys have no biases.

  Attributes:
    dk_YND, dv_YND, dbias_YN: N keys of a tile.
  """

  dk_YND: jax.Array
  dv_YND: jax.Array
  dbias_YN: jax.Array | None


def dkv(
  q_BVXD,
  dout_BVXD,
  numbers_RUC,
  k_BSKD,
  v_BSKD,
  bias_BKS,
  tiles: key_tiles.KeyTiles,
  *,
  shape: Shape,
  config: Config,
  scale: float,
  interpret=None,
) -> Sums:
  """Returns partial sums; that of tile x in part p of the work is at x + p.

  Args:
    q_BVXD, dout_BVXD: queries and the cotangent of the output.
    numbers_RUC: of each unit's rows, see `LSE`; C = 64.
    k_BSKD, v_BSKD: keys and values.
    bias_BKS: float32, or None.
    tiles: of the lists.
    shape, config, scale, interpret: of the call.
  """
  warps = shape.warps
  num_threads = 4 * config.warpgroups // warps.per_thread
  num_tiles = len(tiles.first_window_X) - 1
  tiles_per_row = num_tiles // shape.num_rows
  tile_keys, d, rows = config.keys_per_tile, shape.head_dim, warps.rows
  slots = config.stages * config.units_per_stage
  per_window = key_tiles.WINDOW // config.units_per_stage
  # A window ahead of the last is begun to be read.
  units_W, pieces_W = (
    jnp.pad(x, (0, key_tiles.WINDOW)) for x in (tiles.units_W, tiles.pieces_W)
  )
  inputs = dict(
    q=q_BVXD,
    dout=dout_BVXD,
    numbers=numbers_RUC,
    k=k_BSKD,
    v=v_BSKD,
    units=units_W,
    pieces=pieces_W,
    first_window=tiles.first_window_X,
    bounds=tiles.bounds_W,
    first_tile=tiles.first_tile_W,
    last_tile=tiles.last_tile_W,
  )
  if shape.has_bias:
    inputs["bias"] = bias_BKS
  if shape.has_tokens:
    inputs["tokens"] = tiles.tokens_WP

  def body(*refs, smem):
    gmem = dict(zip(inputs, refs, strict=False))
    outs = refs[len(inputs) :]
    worker, thread = lax.axis_index("worker"), lax.axis_index("thread")

    def share_of(tile, part, done):
      """What this worker does of a tile in a part of the work, after so many windows."""
      first, last = gmem["bounds"][part], gmem["bounds"][part + 1]
      window = jnp.maximum(gmem["first_window"][tile], first)
      end = jnp.minimum(gmem["first_window"][tile + 1], last)
      before = (done + window - first) * per_window
      ring = threads.ring_of(smem, config.stages, shape, thread, before)
      return Share(shape, config, gmem, smem, ring, tile, part, tiles_per_row, window, end)

    def for_all_shares(function):
      """Calls `function(share)` for one tile after the other; returns windows in all."""

      def work_on_part(i, done):
        # There and back: what one round has more of than thought, the next has less of.
        turned = shape.num_workers - 1 - worker
        part = i * shape.num_workers + jnp.where(i % 2 == 0, worker, turned)

        def step(tile, _):
          share = share_of(tile, part, done)

          @pl.when(share.end > share.window)
          def _work():
            function(share)

        begin, end = gmem["first_tile"][part], gmem["last_tile"][part]
        lax.fori_loop(begin, end + 1, step, None)
        return done + gmem["bounds"][part + 1] - gmem["bounds"][part]

      return lax.fori_loop(0, config.rounds, work_on_part, jnp.int32(0))

    def compute():
      def work(share):
        dk, dv, dbias = share.sums(thread, scale)
        y, lines = share.tile + share.part, pl.ds(thread * rows, rows)
        outs[0][y, lines, :] = dk * scale
        outs[1][y, lines, :] = dv
        if shape.has_bias:
          outs[2][y, lines] = dbias

      for_all_shares(work)

    def fetch(warp):
      in_all = for_all_shares(lambda share: share.stream(warp)) * per_window
      threads.ring_of(smem, config.stages, shape, thread, in_all).drain()

    num_fetchers = threads.num_fetchers(shape, config.units_per_stage)
    threads.set_up(smem, shape, thread, {"filled": num_fetchers})
    threads.run(thread, num_threads, config.registers, compute, fetch, num_fetchers)

  num_filled = 3 * config.units_per_stage
  num_sums = num_tiles + config.rounds * shape.num_workers
  whole = jax.ShapeDtypeStruct((num_sums, tile_keys, d), jnp.float32)
  out_type = [whole, whole]
  if shape.has_bias:
    out_type.append(jax.ShapeDtypeStruct((num_sums, tile_keys), jnp.float32))
  smem = dict(
    q=walk.tiled((slots * UNIT, d)),
    dout=walk.tiled((slots * UNIT, d)),
    numbers=plgpu.SMEM((slots, 4 * UNIT), jnp.float32),
    **threads.ring_scratch(config.stages, num_filled, shape, num_threads),
  )
  if not config.keys_in_registers:
    smem["own_keys"] = walk.tiled((2, num_threads, rows, d))
  if shape.has_bias:
    smem["bias"] = plgpu.SMEM((num_threads, rows), jnp.float32)
    smem["bias_ready"] = plgpu.Barrier(num_barriers=num_threads)
  outs = plgpu.kernel(
    body,
    out_type=out_type,
    grid=(shape.num_workers,),
    grid_names=("worker",),
    num_threads=num_threads + 1,
    thread_name="thread",
    kernel_name="block_sparse_dkv",
    scratch_types=dict(smem=smem),
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=interpret,
  )(*inputs.values())
  return Sums(*outs, *[None] * (3 - len(outs)))


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

  def keys_and_values(self, thread) -> list[Callable[[], jax.Array]]:
    """What gives each warp's keys, and its values, [rows, D] both."""
    shape, warps = self.shape, self.shape.warps
    b, head = shape.batch_and_head(self.row)
    key = self.first_key + UNIT * (thread * warps.per_thread + warps.index())
    # Behind the last key anything will do: no unit reads it.
    key = jnp.minimum(key, shape.num_keys - UNIT)
    row = (b * shape.num_keys + key) * shape.num_kv_heads + head
    arrays = [
      warps.load_global_rows(self.gmem[name], row, shape.num_kv_heads) for name in ("k", "v")
    ]
    if self.config.keys_in_registers:
      return [functools.partial(lambda x: x, x) for x in arrays]
    places = [self.smem["own_keys"].at[i, thread] for i in range(len(arrays))]
    for place, x in zip(places, arrays, strict=True):
      place[...] = x
    warps.synchronize()
    return [functools.partial(warps.load_rows, place) for place in places]

  def biases(self, thread) -> jax.Array:
    """Biases of the thread's keys, [rows], in base 2."""
    b, head = self.shape.batch_and_head(self.row)
    warps, target = self.shape.warps, self.smem["bias"].at[thread]
    # Those of the tile before have been read by every warp.
    plgpu.commit_smem()
    keys = pl.ds(self.first_key + thread * warps.rows, warps.rows)
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
        scores = scores * factor + walk.along_rows(bias, scores.shape)
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

  def stream(self, warp) -> None:
    """Fills the ring with the units of the windows: one warp's part of each stage."""
    shape, gmem, smem = self.shape, self.gmem, self.smem
    warps, stage_units = shape.warps, self.config.units_per_stage
    b, head = shape.batch_and_head(self.row)
    per_window = key_tiles.WINDOW // stage_units

    def copies_of_unit(slot, unit):
      v, h = shape.place_of_unit(head, unit)
      lines = pl.ds(slot * UNIT, UNIT)
      for name in ("q", "dout"):
        index = b, v, pl.ds(h, UNIT), pl.ds(0, shape.head_dim)
        yield gmem[name], index, smem[name].at[lines]
      index = self.row, unit, pl.ds(0, 4 * UNIT)
      yield gmem["numbers"], index, smem["numbers"].at[slot]

    def stream_window(window, handle):
      ahead = warps.fetch(gmem["units"], (window + 1) * key_tiles.WINDOW)

      def stream_stage(n, _):
        def copies(place):
          for i in threads.own_parts(warp, shape, stage_units):
            unit = warps.fetched(gmem["units"], handle, n * stage_units + i)
            yield from copies_of_unit(place * stage_units + i, unit)

        self.ring.fill((window - self.window) * per_window + n, copies)

      lax.fori_loop(0, per_window, stream_stage, None)
      return ahead

    handle = warps.fetch(gmem["units"], self.window * key_tiles.WINDOW)
    lax.fori_loop(self.window, self.end, stream_window, handle)


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two units of a window that read a warp's piece, or one of them twice.

  Attributes:
    share: of the tile.
    piece: number of the warp's piece in its tile.
    window: that they are of.
    places: of the units in the window.
    first_slot: units of the share before the window.
    is_pair: whether the second one counts.
    edges: bits of the units of the window that do not see every key of the tile.
  """

  share: Share
  piece: jax.Array
  window: jax.Array
  places: tuple[jax.Array, jax.Array]
  first_slot: jax.Array
  is_pair: jax.Array
  edges: jax.Array

  @property
  def slots(self) -> list[jax.Array]:
    """Places of the units in the ring."""
    ring, per_stage = self.share.ring, self.share.config.units_per_stage
    size, before = ring.num_stages * per_stage, ring.before * per_stage
    return [mosaic_ring.wrap(before + self.first_slot + place, size) for place in self.places]

  def columns(self, what: int):
    """Numbers of the units' rows (see `LSE`), [rows, 32]."""
    share = self.share
    places = [(slot, what) for slot in self.slots]
    return share.shape.warps.columns(share.smem["numbers"], places)

  def masked(self, scores):
    """Scores [rows, 32] with keys that a column's query does not see put out of reach."""
    if self.share.shape.has_tokens:
      return self._mask(scores)
    is_edge = ~self.is_pair
    for i in self.places:
      is_edge |= (lax.shift_right_logical(self.edges, i) & 1) == 1
    return lax.cond(is_edge, self._mask, lambda s: s, scores)

  def _mask(self, scores):
    share, warps = self.share, self.share.shape.warps
    # Rows count on through the warps of a thread; within a piece there are 16.
    key = share.first_key + self.piece * UNIT + (warps.iota(0) & (UNIT - 1))
    key = key.astype(jnp.float32)
    first, last = self.columns(FIRST), self.columns(LAST)
    parts = []
    for n in range(_PAIR):
      part = slice(UNIT * n, UNIT * (n + 1))
      is_seen = (key >= first[:, part]) & (key <= last[:, part])
      if n:
        is_seen &= self.is_pair
      if share.shape.has_tokens:
        index = self.window * key_tiles.WINDOW + self.places[n]
        bits = share.gmem["tokens"][index, self.piece]
        token = walk.token_of_row(share.shape, axis=1)
        is_seen &= (lax.shift_right_logical(bits, token) & 1) == 1
      parts.append(jnp.where(is_seen, scores[:, part], walk.MASKED))
    return jnp.concatenate(parts, axis=1)


def lowest(bits):
  """The number of the lowest bit that is set."""
  return 31 - lax.clz(bits & -bits)
