"""What the warpgroups of a multiprocessor do with a tile of 32 queries; see `mosaic_gpu`.

A product takes 64 rows, eight queries under each of two heads for every warp, so that each
warp has all heads of its own queries. The first time through the windows finds, for every
head, the largest score and the sum of exponentials; here pairs of heads are divided among
the warpgroups. The second time through gives probabilities, which are added up over the
heads in registers; here windows are divided. Then every warp chooses the best blocks of one
query after the other. Where there are more windows than shared memory holds, they are taken
a segment at a time, and the best so far are carried along.

While blocks are chosen, the queries of the next tile are on their way.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_barrier, mosaic_fold, mosaic_inline, mosaic_top
from pallas_kernels.block_selection.mosaic_gpu_sizes import (
  HALO,
  NARROW,
  ROWS,
  ROWS_OF_BOUNDS,
  TILE,
  WARPGROUPS,
  WIDE,
  Done,
  Sizes,
)

_FIRST, _END = 0, 1
_MASKED = -1e30
_LOWEST = -1e20
# Products of the second time that are under way together; more of them take registers from
# the descriptors of what is multiplied.
_TOGETHER = 2


@dataclasses.dataclass(frozen=True)
class Tile:
  """A tile as one of the warpgroups sees it.

  Attributes:
    sizes: of the call.
    smem: shared memory, by name.
    q_gmem: queries [B, T, H, D].
    keys_gmem: windows [B, K, W, D].
    bounds_gmem, ranges_gmem: of all tiles, [B, X, 4, L] and [B, X, 3 I, 32].
    out_gmem: chosen blocks of every span, [32, slots].
    wg: number of the warpgroup.
    batch, head, x: batch row, key head, and number of the tile in its row.
    turn: which half of what is there twice belongs to this tile.
  """

  sizes: Sizes
  smem: dict
  q_gmem: Any
  keys_gmem: Any
  bounds_gmem: Any
  ranges_gmem: Any
  out_gmem: list
  wg: jax.Array
  batch: jax.Array
  head: jax.Array
  x: jax.Array
  turn: jax.Array

  def _barriers(self, name: str) -> mosaic_barrier.Barriers:
    return mosaic_barrier.Barriers(self.smem[name], self.sizes.own_barriers)

  def begin(self) -> None:
    """Starts the copies that the tile begins with; no warpgroup needs what they replace."""
    smem = self.smem

    @pl.when(self.wg == 0)
    def _copy_bounds():
      ready, place = self._barriers("bounds_ready"), (self.batch, self.x)
      whole = pl.ds(0, ROWS_OF_BOUNDS), pl.ds(0, ROWS)
      copies = [(self.bounds_gmem, (*place, *whole), smem["bounds"])]
      for i, ranges in enumerate(smem["ranges"]):
        index = *place, pl.ds(3 * i, 3), pl.ds(0, TILE)
        copies.append((self.ranges_gmem, index, ranges.at[self.turn]))
      ready.copy(0, copies)

    if self.sizes.num_rounds == 1:
      self._copy_queries(0)

  def run(self, begin_next: Callable[[], None], done: Done) -> Done:
    """Chooses the blocks of all queries; returns what has been done then.

    Args:
      begin_next: called once the copies for the next tile may start.
      done: before.
    """
    sizes, smem, config = self.sizes, self.smem, self.sizes.config
    self._barriers("bounds_ready").wait(0, self.turn)
    # Queries ascend, and so do the windows that they see.
    last = ROWS - 1
    begin = lax.div(smem["bounds"][_FIRST, 0], jnp.int32(WIDE)) * WIDE
    end = lax.div(smem["bounds"][_END, last] + (NARROW - 1), jnp.int32(NARROW)) * NARROW
    end = jnp.maximum(begin, end)

    for n in range(sizes.num_rounds):
      done = self._have_queries(n, done)
      done = self._normalize(n, begin, end, done)

    per_segment = jnp.int32(config.segment)
    num_segments = jnp.maximum(lax.div(end - begin + per_segment - 1, per_segment), 1)

    def segment(i, done):
      first = begin + i * per_segment
      after = jnp.minimum(first + per_segment, end)
      # The first time, everyone has found sums; later, everyone has chosen.
      self._meet()
      for n in range(sizes.num_rounds):
        if sizes.num_rounds > 1:
          done = self._have_queries(n, done)
        done = self._add_probabilities(n, first, after, done)
      self._meet()
      is_last = i == num_segments - 1
      pl.when(is_last)(begin_next)
      end_block = jnp.where(is_last, jnp.int32(2**30), self._complete_blocks(after))
      blocks = self._complete_blocks(first), end_block
      self._choose(i == 0, (*blocks, first, begin, end))
      return done

    done = lax.fori_loop(0, num_segments, segment, done)
    self._write()
    return done

  def _complete_blocks(self, window):
    """How many blocks have all of their windows before a window."""
    scores = self.sizes.scores
    windows = window - (scores.first + scores.count)
    return jnp.maximum(lax.div(windows, jnp.int32(scores.per_block)) + 1, 0) * (windows >= 0)

  def _meet(self) -> None:
    """Waits for all warpgroups."""
    plgpu.commit_smem()
    plgpu.barrier_arrive(self.smem["met"])
    plgpu.barrier_wait(self.smem["met"])

  # Queries and windows.

  def _have_queries(self, n: int, done: Done) -> Done:
    """Waits for the queries of a round's pairs of heads."""
    if self.sizes.num_rounds > 1:
      self._meet()
      self._copy_queries(n)
    self._barriers("q_ready").wait(0, done.queries & 1)
    return done._replace(queries=done.queries + 1)

  def _copy_queries(self, n: int) -> None:
    """Starts to copy the queries of a round; each warpgroup eight of every head."""
    sizes, pairs, copies = self.sizes, self.sizes.config.pairs, []
    for p in range(pairs):
      for second in range(2):
        # Where there is no such head, the last one stands in, and counts for nothing.
        h = min(2 * (n * pairs + p) + second, sizes.num_heads - 1)
        queries = pl.ds(TILE * self.x + 8 * self.wg, 8)
        head = self.head * sizes.num_heads + h
        index = self.batch, queries, head, pl.ds(0, sizes.head_dim)
        rows = pl.ds(ROWS * p + 16 * self.wg + 8 * second, 8)
        copies.append((self.q_gmem, index, self.smem["q"].at[rows]))
    self._barriers("q_ready").copy(0, copies)

  def _for_windows(self, begin, end, width: int, share, before, step, start):
    """Carries `start` through `step(keys_ref, first_window, carry)` for part of the windows.

    Args:
      begin, end: of all of them.
      width: that many at a time.
      share: `(part, num_parts)`: every `num_parts`-th time, from `part` on.
      before: products' worth of this width that were taken before.

    Returns:
      What was taken in all, and the carry.
    """
    part, num_parts = share
    stages = self.sizes.config.stages * (WIDE // width)
    ready = self._barriers("wide_ready" if width == WIDE else "narrow_ready")
    total = lax.div(end - begin + width - 1, jnp.int32(width))
    count = jnp.maximum(lax.div(total - part + num_parts - 1, jnp.int32(num_parts)), 0)

    def window(i):
      return begin + (part + i * num_parts) * width

    def stage(i):
      place = self.wg * stages + lax.rem(before + i, jnp.int32(stages))
      return place, self.smem["keys"].at[pl.ds(place * width, width)]

    def load(i):
      @pl.when(i < count)
      def _copy():
        place, target = stage(i)
        windows = pl.ds(window(i), width), pl.ds(0, self.sizes.head_dim)
        ready.copy(place, [(self.keys_gmem, (self.batch, self.head, *windows), target)])

    def advance(i, carry):
      place, keys = stage(i)
      ready.wait(place, lax.div(before + i, jnp.int32(stages)) & 1)
      carry = step(keys, window(i), carry)
      plgpu.commit_smem()
      load(i + stages)
      return carry

    for i in range(stages):
      load(jnp.int32(i))
    return before + count, lax.fori_loop(0, count, advance, start)

  def _products(self, n: int, pairs: Sequence, keys_ref, window, use, carry):
    """Carries `carry` through `use(i, scores, carry)` for pairs of heads.

    `scores` [L, width] are products, with what a row does not see put out of reach. While
    one is used, those after it are on their way.
    """
    width, num = keys_ref.shape[0], len(pairs)

    def multiply(*sums):
      result = carry
      for total, p in zip(sums, pairs, strict=True):
        queries = self.smem["q"].at[pl.ds(ROWS * p, ROWS)]
        plgpu.wgmma(total, queries, keys_ref.transpose((1, 0)))
      for i, p in enumerate(pairs):
        scores = plgpu.wgmma_accumulator_load(sums[i], wait_n=num - 1 - i)
        result = use(i, self._masked(n, p, window, scores), result)
      return result

    return pl.run_scoped(multiply, *[plgpu.ACC((ROWS, width), jnp.float32)] * num)

  def _masked(self, n: int, p, window, scores):
    sizes, bounds, last = self.sizes, self.smem["bounds"], ROWS - 1
    width = scores.shape[1]
    # The last pair may lack a head, and then has bounds of its own.
    is_odd = sizes.num_heads % 2 == 1
    is_last = n * sizes.config.pairs + p == sizes.num_pairs - 1
    base = jnp.where(is_odd & is_last, 2, 0)

    def mask(scores):
      first, end = (self._vector(bounds.at[base + i]) for i in (_FIRST, _END))
      column = window + self._columns(width)
      first, end = (lax.broadcast_in_dim(x, column.shape, [0]) for x in (first, end))
      return jnp.where((column >= first) & (column < end), scores, _MASKED)

    # Queries ascend, and so do their bounds: most windows are seen by all of them.
    is_edge = (window < bounds[_FIRST, last]) | (window + width > bounds[_END, 0]) | (base > 0)
    return lax.cond(is_edge, mask, lambda scores: scores, scores)

  # The first time through.

  def _normalize(self, n: int, begin, end, done: Done) -> Done:
    """Finds the logarithms of the sums of exponentials, base 2, of a round's heads."""
    num_pairs = self.sizes.pairs_of_round(n)
    # As many groups of warpgroups as there are pairs; in a group, windows are divided.
    num_groups = min(WARPGROUPS, 2 ** int(math.log2(num_pairs)))
    part, group = lax.div(self.wg, jnp.int32(num_groups)), self.wg & (num_groups - 1)
    own = [group + i * num_groups for i in range(-(-num_pairs // num_groups))]
    # Where there is no such pair, the last one stands in, and counts for nothing.
    pairs = [jnp.minimum(p, num_pairs - 1) for p in own]
    factor = self.sizes.factor

    def add(i, scores, sums):
      highest, norm = sums[i]
      # The scale enters in one multiply-add with the maximum.
      new_highest = jnp.maximum(highest, scores.max(axis=1) * factor)
      weights = jnp.exp2(self._minus(scores, new_highest))
      norm = norm * jnp.exp2(highest - new_highest) + weights.sum(axis=1)
      return *sums[:i], (new_highest, norm), *sums[i + 1 :]

    def step(keys_ref, window, sums):
      return self._products(n, pairs, keys_ref, window, add, sums)

    start = tuple((self._filled(_LOWEST), self._filled(0.0)) for _ in pairs)
    share = part, WARPGROUPS // num_groups
    wide, sums = self._for_windows(begin, end, WIDE, share, done.wide, step, start)
    done = done._replace(wide=wide)
    if num_groups == WARPGROUPS:
      for p, (highest, norm) in zip(own, sums, strict=True):
        pl.when(p < num_pairs)(functools.partial(self._set_lse, n, p, highest, norm))
      return done

    norms = self.smem["norms"]
    for p, (highest, norm) in zip(own, sums, strict=True):

      @pl.when(p < num_pairs)
      def _leave(p=p, highest=highest, norm=norm):
        norms.at[self.wg, 0, p][...] = highest
        norms.at[self.wg, 1, p][...] = norm

    self._meet()

    @pl.when(part == 0)
    def _combine():
      for p in own:
        pl.when(p < num_pairs)(functools.partial(self._combine, n, p, num_groups))

    return done

  def _combine(self, n: int, p, num_groups: int) -> None:
    """Puts together what the warpgroups of a group have found of a pair."""
    group = self.wg & (num_groups - 1)
    norms = [
      [self._vector(self.smem["norms"].at[group + i * num_groups, j, p]) for j in range(2)]
      for i in range(WARPGROUPS // num_groups)
    ]
    highest = functools.reduce(jnp.maximum, [x for x, _ in norms])
    self._set_lse(n, p, highest, sum(norm * jnp.exp2(x - highest) for x, norm in norms))

  def _set_lse(self, n: int, p, highest, norm) -> None:
    # A row that sees nothing gives every window a probability of 0.
    lse = jnp.where(norm > 0.0, highest + jnp.log2(jnp.maximum(norm, 1e-37)), -_MASKED)
    self.smem["lse"].at[n * self.sizes.config.pairs + p][...] = lse

  # The second time through.

  def _add_probabilities(self, n: int, begin, end, done: Done) -> Done:
    """Adds probabilities of a round's heads to the scores of windows."""
    smem, num_pairs = self.smem, self.sizes.pairs_of_round(n)
    first_lse = n * self.sizes.config.pairs
    size = min(_TOGETHER, num_pairs)
    num_whole = num_pairs // size

    def step(keys_ref, window, _):
      def add_some(first, num, total):
        pairs = [first + i for i in range(num)]

        def add(i, scores, total):
          lse = self._vector(smem["lse"].at[first_lse + pairs[i]])
          return total + jnp.exp2(self._minus(scores, lse))

        return self._products(n, pairs, keys_ref, window, add, total)

      total = lax.fori_loop(
        0, num_whole, lambda j, total: add_some(j * size, size, total), self._zeros(NARROW)
      )
      if num_pairs % size:
        total = add_some(jnp.int32(num_whole * size), num_pairs % size, total)
      fold = mosaic_fold.interpreted if self.sizes.is_interpreted else mosaic_fold.fold
      fold(smem["scores"], HALO + window - begin, total, is_first=n == 0)

    share = self.wg, WARPGROUPS
    narrow, _ = self._for_windows(begin, end, NARROW, share, done.narrow, step, None)
    return done._replace(narrow=narrow)

  # The choice.

  def _choose(self, is_first, segment) -> None:
    smem, sizes = self.smem, self.sizes
    choose = mosaic_top.choose_interpreted if sizes.is_interpreted else mosaic_top.choose
    for arrays in zip(smem["ranges"], smem["kept"], smem["counts"], strict=True):
      ranges, kept, counts = arrays
      for i in range(TILE // (4 * WARPGROUPS)):
        row = i * WARPGROUPS + self.wg
        own_ranges = ranges.at[self.turn]
        choose(smem["scores"], own_ranges, kept, counts, row, segment, sizes.scores, is_first)

  def _write(self) -> None:
    """Writes what the warpgroup's own warps have chosen."""
    plgpu.commit_smem()
    for kept, out in zip(self.smem["kept"], self.out_gmem, strict=True):
      for i in range(TILE // (4 * WARPGROUPS)):
        rows = pl.ds(4 * (i * WARPGROUPS + self.wg), 4)
        plgpu.copy_smem_to_gmem(kept.at[rows], out.at[rows])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  # Arrays.

  def _minus(self, scores, x):
    """Scaled scores less a number for each row."""
    return scores * self.sizes.factor + lax.broadcast_in_dim(-x, scores.shape, [0])

  def _vector(self, ref):
    if self.sizes.is_interpreted:
      return ref[...]
    return plgpu.load(ref, layout=mosaic_inline.LAYOUT.reduce(1))

  def _filled(self, value: float):
    x = jnp.full((ROWS,), value, jnp.float32)
    if self.sizes.is_interpreted:
      return x
    return plgpu.layout_cast(x, mosaic_inline.LAYOUT.reduce(1))

  def _zeros(self, width: int):
    x = jnp.zeros((ROWS, width), jnp.float32)
    return x if self.sizes.is_interpreted else plgpu.layout_cast(x, mosaic_inline.LAYOUT)

  def _columns(self, width: int):
    shape = (ROWS, width)
    if self.sizes.is_interpreted:
      return lax.broadcasted_iota(jnp.int32, shape, 1)
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=mosaic_inline.LAYOUT)
