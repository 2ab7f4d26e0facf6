"""What one warp of the decoding kernel does: its pieces, through a ring of its own.

Nobody else reads what a warp copies, so it starts its own copies, as many ahead as there is
room for, and waits for nobody but those.
"""

import dataclasses
import math
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_barrier, mosaic_ring
from pallas_kernels.decode_attention import mosaic_gpu_clear as clearing
from pallas_kernels.decode_attention import mosaic_gpu_list as lists
from pallas_kernels.decode_attention.mosaic_gpu_shape import PIECE, WARPS, Config, Shape

_LOG2E = math.log2(math.e)
# Far below any score, and still finite after the subtraction of another one.
_MASKED = -1e30
# A maximum to begin with: below any score, and far above masked ones under any scale.
_LOWEST = -1e20
# The maximum that weights are relative to, base 2, lags behind the highest score by less.
_LAG = 8.0


@dataclasses.dataclass(frozen=True)
class Worker:
  """A warp; or, with one number for each of them, the warps of a thread.

  Attributes:
    shape, config: of the call.
    scale: factor on the scores.
    gmem, smem: refs by name.
    block: number of the thread block.
    thread: number of the thread.
  """

  shape: Shape
  config: Config
  scale: float
  gmem: dict[str, Any]
  smem: dict[str, Any]
  block: jax.Array
  thread: jax.Array

  @property
  def row(self) -> jax.Array:
    return lax.div(self.block, jnp.int32(self.shape.num_splits))

  @property
  def warp(self) -> jax.Array:
    """Its number in the thread block."""
    return self.thread * self.shape.warps.per_thread + self.shape.warps.index()

  @property
  def unit(self) -> jax.Array:
    return self.warp & (self.shape.num_units - 1)

  @property
  def taker(self) -> jax.Array:
    split = lax.rem(self.block, jnp.int32(self.shape.num_splits))
    per_block = WARPS // self.shape.num_units
    return split * per_block + lax.div(self.warp, jnp.int32(self.shape.num_units))

  def run(self) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted values [rows, D], the maximum that weights are relative to, and their sum."""
    warps, config = self.shape.warps, self.config
    first = self.row * self.shape.num_units + self.unit
    q = warps.load_global_rows(self.gmem["q"], first * PIECE, 1)
    zero = jnp.int32(0)
    ahead = zero, zero, lists.nothing(self.shape)
    ahead = lax.fori_loop(0, config.stages, lambda _, ahead: self._begin(ahead), ahead)

    def step(state):
      done, ahead, sums = state
      begun = ahead[0]
      sums = self._add_group(q, done, begun, sums)
      taken = jnp.minimum(begun - done, config.group)
      if self.shape.interpreted:
        # There, reads are ordered before copies by this alone.
        plgpu.commit_smem()
      warps.synchronize()
      ahead = lax.fori_loop(0, taken, lambda _, ahead: self._begin(ahead), ahead)
      return done + taken, ahead, sums

    sums = warps.zeros(self.shape.head_dim), warps.filled(_LOWEST), warps.filled(0.0)
    *_, sums = lax.while_loop(lambda state: state[0] < state[1][0], step, (zero, ahead, sums))
    return sums

  # Copies.

  @property
  def _filled(self) -> mosaic_barrier.Barriers:
    own = not self.shape.interpreted
    return mosaic_barrier.Barriers(self.smem["filled"], own, by_warp=True)

  def _place(self, number) -> jax.Array:
    """Where in the warp's ring a piece lies, of those begun."""
    return mosaic_ring.wrap(number, self.config.stages)

  def _slot(self, place) -> jax.Array:
    """The number of a place among those of all warps."""
    return self.warp * self.config.stages + place

  def _begin(self, ahead):
    """Starts to copy the next piece, if there is one.

    Args:
      ahead: how many pieces have been begun, how many looked at, and the last of those.

    Returns:
      The new `ahead`.
    """
    shape, stride = self.shape, lists.LANES * self.shape.num_takers
    refs = [self.gmem[name] for name in ("pages", "begin", "end")]

    def look(state):
      first, _ = state
      return first + stride, lists.look(refs, self.row, self.taker + first, shape)

    def is_looking(state):
      first, pieces = state
      return (pieces.left == 0) & (self.taker + first < shape.num_pieces)

    begun, first, pieces = ahead
    first, pieces = lax.while_loop(is_looking, look, (first, pieces))
    left, has_piece = pieces.left, pieces.left != 0

    @pl.when(has_piece)
    def _copy():
      i = lists.lowest(left)
      number, range_ = (lists.of_lane(x, i, shape) for x in pieces[1:])
      place = self._place(begun)
      self._set_range(place, range_)
      slot = self._slot(place)
      index = number, pl.ds(0, PIECE), pl.ds(0, shape.head_dim)
      target = pl.ds(slot * PIECE, PIECE)
      copies = [(self.gmem[x], index, self.smem[x].at[target]) for x in ("k", "v")]
      if shape.has_bias:
        target = self.smem["bias"].at[slot, pl.ds(0, PIECE)]
        copies.append((self.gmem["bias"], index[:2], target))
      self._filled.copy(slot, copies)

    begun = begun + has_piece.astype(jnp.int32)
    return begun, first, pieces._replace(left=left & (left - 1))

  def _set_range(self, place, range_) -> None:
    ref = self.smem["ranges"].at[self.thread]
    if self.shape.interpreted:
      ref[0, place] = range_
    else:
      number = self.shape.warps.index() * self.config.stages + place
      mosaic_barrier.set_counter(ref, number, range_)

  def _range(self, place) -> jax.Array:
    (range_,) = self.shape.warps.words(self.smem["ranges"].at[self.thread], place, 1)
    return range_

  # Products.

  def _add_group(self, q, done, begun, sums):
    """Adds the first of the pieces from `done` to `begun - 1`."""
    total, highest, norm = sums
    shape, warps, group = self.shape, self.shape.warps, range(self.config.group)
    is_taken = [done + j < begun for j in group]
    # Where there are no more, the first piece stands in, and is masked.
    numbers = [
      jnp.where(taken, done + j, done) for j, taken in zip(group, is_taken, strict=True)
    ]
    places = [self._place(number) for number in numbers]
    slots = [self._slot(place) for place in places]
    for number, slot, taken in zip(numbers, slots, is_taken, strict=True):
      times_round = lax.div(number, jnp.int32(self.config.stages))
      pl.when(taken)(lambda slot=slot, times=times_round: self._filled.wait(slot, times & 1))
    warps.synchronize()
    ranges = [self._range(place) for place in places]
    is_edge = ~is_taken[-1]
    for range_ in ranges:
      is_edge |= range_ != lists.WHOLE
    pl.when(is_edge)(lambda: self._clear(slots, ranges))

    scores, factor = warps.products(q, self.smem["k"], slots), self.scale * _LOG2E
    if shape.has_bias:
      biases = warps.columns(self.smem["bias"], [(slot, 0) for slot in slots])
      scores = scores * factor + _LOG2E * biases
      factor = 1.0
    scores = lax.cond(is_edge, lambda s: self._mask(s, ranges, is_taken), lambda s: s, scores)
    found = scores.max(axis=1) * factor

    def follow(total, highest, norm):
      new_highest = jnp.maximum(highest, found)
      shrink = jnp.exp2(highest - new_highest)
      return total * _along_rows(shrink, total.shape), new_highest, norm * shrink

    total, highest, norm = lax.cond(
      warps.any_above(found - highest, _LAG), follow, lambda *x: x, total, highest, norm
    )
    weights = jnp.exp2(scores * factor + _along_rows(-highest, scores.shape))
    weights = weights.astype(jnp.bfloat16)
    norm = norm + warps.row_sums(weights)
    return warps.add_products(total, weights, self.smem["v"], slots), highest, norm

  def _clear(self, slots, ranges) -> None:
    clear = clearing.interpreted if self.shape.interpreted else clearing.clear
    for slot, range_ in zip(slots, ranges, strict=True):
      clear(self.smem["v"], slot, *_begin_and_end(range_))

  def _mask(self, scores, ranges, is_taken):
    column = self.shape.warps.iota(1)
    parts = []
    for j, (range_, taken) in enumerate(zip(ranges, is_taken, strict=True)):
      begin, end = _begin_and_end(range_)
      is_read = (column >= begin) & (column < jnp.where(taken, end, 0))
      parts.append(jnp.where(is_read, scores[:, PIECE * j : PIECE * (j + 1)], _MASKED))
    return jnp.concatenate(parts, axis=1)


def _begin_and_end(range_):
  return range_ & ((1 << lists.END_SHIFT) - 1), lax.shift_right_logical(range_, lists.END_SHIFT)


def _along_rows(x_rows, shape):
  """[rows] as the same number in every column."""
  return lax.broadcast_in_dim(x_rows, shape, [0])
