"""A worker's windows of one block of keys; see `mosaic_gpu_dkv`.

Every unit that reads a block of 64 keys reads all of it, so nothing is wasted where the
warps of a thread multiply as one: 64 keys by the 64 rows of a stage's four units. Threads
hold the same keys and take a stage in turn; each has sums of its own.
"""

import dataclasses
import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_warpgroup
from pallas_kernels.block_lists import key_tiles
from pallas_kernels.block_sparse_attention import mosaic_gpu_arrays as arrays
from pallas_kernels.block_sparse_attention.mosaic_gpu_pair import DELTA, FIRST, LAST, LSE
from pallas_kernels.block_sparse_attention.mosaic_gpu_shape import UNIT
from pallas_kernels.block_sparse_attention.mosaic_gpu_share import Share

_LOG2E = math.log2(math.e)


class BlockShare(Share):
  """A worker's windows of one block, of which each thread works on every so-many-th stage."""

  def first_own_key(self, thread) -> jax.Array:
    del thread
    return self.first_key

  def rows_of_unit(self, rows, place, i):
    return rows.at[place, pl.ds(i * UNIT, UNIT)]

  def sums(self, thread, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    shape, smem, warps = self.shape, self.smem, self.shape.warps
    keys, values = self._copied_keys(thread)
    bias = self.biases(thread) if shape.has_bias else None

    def step(stage, sums):
      dk, dv, dbias = sums
      q, dout = (smem[name].at[stage.place] for name in ("q", "dout"))
      scores, dweights = mosaic_warpgroup.products(
        [(keys, q), (values, dout)], interpreted=shape.interpreted
      )
      factor = scale * _LOG2E
      if shape.has_bias:
        scores = scores * factor + arrays.along_rows(bias, scores.shape)
        factor = 1.0
      scores = stage.masked(scores)
      weights = jnp.exp2(scores * factor - stage.columns(LSE))
      dscores = weights * (dweights - stage.columns(DELTA))
      if shape.has_bias:
        dbias = dbias + dscores.sum(axis=1)
      weights, dscores = (x.astype(jnp.bfloat16) for x in (weights, dscores))
      dv, dk = mosaic_warpgroup.add_products(
        [(dv, weights, dout), (dk, dscores, q)], interpreted=shape.interpreted
      )
      return dk, dv, dbias

    d = shape.head_dim
    start = warps.zeros(d), warps.zeros(d), warps.filled(0.0)
    return self._walk(step, start, thread)

  def _copied_keys(self, thread) -> list:
    """The block's keys and values in shared memory, once all threads have left the last."""
    smem, left, ready = self.smem, self.smem["keys_left"], self.smem["keys_ready"]
    b, head = self.shape.batch_and_head(self.row)
    plgpu.commit_smem()
    plgpu.barrier_arrive(left)
    plgpu.barrier_wait(left)
    places = [smem["own_keys"].at[i] for i in range(2)]

    @pl.when(thread == 0)
    def _copy():
      keys = pl.ds(self.first_key, self.config.keys_per_tile)
      for name, place in zip(("k", "v"), places, strict=True):
        plgpu.copy_gmem_to_smem(self.gmem[name].at[b, keys, head], place, ready)

    plgpu.barrier_wait(ready)
    return places

  def _walk(self, step, start, thread):
    """Carries `start` through `step(stage, carry)` for the thread's stages."""
    warps, ring, config = self.shape.warps, self.ring, self.config
    pieces, per_window = self.gmem["pieces"], key_tiles.WINDOW // config.units_per_stage
    turns = config.warpgroups

    def votes(window):
      """Which units of a window read the block, and which are at an edge."""
      begin = window * key_tiles.WINDOW
      bits = jnp.int32(0), jnp.int32(key_tiles.EDGE_BIT)
      return [warps.ballot(pieces, begin, bit) for bit in bits]

    def walk_window(window, state):
      ready, left, voted, carry = state
      # The votes on the next window are on their way while this one is worked on.
      ahead = votes(window + 1)
      first_stage = (window - self.window) * per_window

      def advance(turn, state):
        ready, left, carry = state
        n = turns * turn + thread
        ready, left = ring.leave(ready, left, first_stage + n)
        ready = ring.wait(ready, first_stage + n + 1)
        bits = [lax.shift_right_logical(x, n * config.units_per_stage) for x in voted]
        stage = _Stage(self, ring.index(first_stage + n), *bits)
        return ready, left, step(stage, carry)

      ready, left, carry = lax.fori_loop(0, per_window // turns, advance, (ready, left, carry))
      return ready, left, ahead, carry

    zero = jnp.int32(0)
    state = zero, zero, votes(self.window), start
    ready, left, _, carry = lax.fori_loop(self.window, self.end, walk_window, state)
    ring.leave(ready, left, (self.end - self.window) * per_window)
    return carry


@dataclasses.dataclass(frozen=True)
class _Stage:
  """The units of a stage.

  Attributes:
    share: of the block.
    place: of the stage in the ring.
    bits: the lowest say which units read the block.
    edges: likewise, which do not see all of it.
  """

  share: BlockShare
  place: jax.Array
  bits: jax.Array
  edges: jax.Array

  def columns(self, what: int):
    """Numbers of the units' rows (see `mosaic_gpu_pair.LSE`), [64, 64]."""
    share, units = self.share, range(self.share.config.units_per_stage)
    places = [(self.place * len(units) + i, what) for i in units]
    return share.shape.warps.columns(share.smem["numbers"], places)

  def masked(self, scores):
    """Scores [64, 64] with keys that a column's query does not see put out of reach."""
    all_units = (1 << self.share.config.units_per_stage) - 1
    is_edge = ((self.bits & ~self.edges) & all_units) != all_units
    return lax.cond(is_edge, self._mask, lambda s: s, scores)

  def _mask(self, scores):
    share = self.share
    key = share.first_key + share.shape.warps.iota(0)
    key = key.astype(jnp.float32)
    first, last = self.columns(FIRST), self.columns(LAST)
    parts = []
    for i in range(share.config.units_per_stage):
      part = slice(UNIT * i, UNIT * (i + 1))
      is_seen = (key >= first[:, part]) & (key <= last[:, part])
      is_seen &= (lax.shift_right_logical(self.bits, i) & 1) == 1
      parts.append(jnp.where(is_seen, scores[:, part], arrays.MASKED))
    return jnp.concatenate(parts, axis=1)
