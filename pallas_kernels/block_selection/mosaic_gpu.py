"""Block selection on Hopper GPUs: scores, their softmax, their sum and the best, in one go.

A tile is 32 queries. A product takes 64 rows, eight queries under each of two heads for
every warp, so that each warp has all heads of its own queries. Windows are divided among
the warpgroups. The first time through them each finds, for every head, the largest score
and the sum of exponentials; with those of all warpgroups put together, the second time
through gives probabilities, which are added up over the heads in registers. Then every warp
chooses the best blocks of one query after the other. No score reaches device memory; where
there are more windows than shared memory holds, they are taken a segment at a time, and the
best so far are carried along.

Extra shape letters:
  X tiles   L = 64 rows of a product   P pairs of heads   I spans of blocks
"""

import dataclasses
import math
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import devices, mosaic_fold, mosaic_inline, mosaic_top
from pallas_kernels.block_selection import plan
from pallas_kernels.block_selection import pooling as poolings
from pallas_kernels.block_selection.problem import Problem, Rules

_LOG2E = math.log2(math.e)
_MASKED = -1e30
_LOWEST = -1e20
_TILE = 32
_ROWS = 64
_CHUNK = 64
_WARPGROUPS = 4
_HALO = 8
# Bytes of a multiprocessor's shared memory, less what barriers and small arrays take.
_SHARED_MEMORY = 224 * 1024

HEAD_DIMS = (64, 128)
_ROWS_OF_BOUNDS = 4
_FIRST, _END = 0, 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """What may change speed but never the answer.

  Attributes:
    segment: windows whose scores are in shared memory, a multiple of 64.
    stages: of 64 windows for each warpgroup.
    pairs: of heads whose queries are in shared memory at the same time.
  """

  segment: int
  stages: int
  pairs: int


def config(head_dim: int, num_heads: int, num_slots: int) -> Config:
  """The largest segments that shared memory has room for.

  Args:
    head_dim: D.
    num_heads: per key head.
    num_slots: blocks that a query may keep, of all spans.
  """
  num_pairs = -(-num_heads // 2)
  pairs, stages = min(512 // head_dim, num_pairs), 128 // head_dim
  rest = 2 * head_dim * (pairs * _ROWS + _WARPGROUPS * stages * _CHUNK)
  rest += 4 * _ROWS * (2 * _WARPGROUPS * pairs + num_pairs + _ROWS_OF_BOUNDS + num_slots)
  room = (_SHARED_MEMORY - rest) // (4 * _TILE) - _HALO
  return Config(segment=min(room // _CHUNK, 8) * _CHUNK, stages=stages, pairs=pairs)


def _num_slots(spans: list[plan.Span]) -> int:
  """Room for chosen blocks, a multiple of what a warp holds for each span."""
  return sum(mosaic_top.LANES * -(-span.slots // mosaic_top.LANES) for span in spans)


def why_not(problem: Problem, rules: Rules) -> str | None:
  """Why this kernel cannot take a problem; None if it can."""
  q_BTHD, k_BSKD = problem.q_BTHD, problem.k_BSKD
  pooling, heads = rules.pooling, q_BTHD.shape[2] // k_BSKD.shape[2]
  if q_BTHD.dtype != jnp.bfloat16 or k_BSKD.dtype != jnp.bfloat16:
    return f"takes bfloat16, not {q_BTHD.dtype.name} and {k_BSKD.dtype.name}"
  if q_BTHD.shape[-1] not in HEAD_DIMS:
    return f"takes head sizes {HEAD_DIMS}, not {q_BTHD.shape[-1]}"
  if heads > 32:
    return f"takes up to 32 query heads per key head, not {heads}"
  if pooling.count > _HALO or abs(pooling.first) > _HALO:
    return f"takes up to {_HALO} windows per block, next to it, not {pooling}"
  num_slots = mosaic_top.LANES * -(-rules.num_by_query // mosaic_top.LANES)
  # The two halves of `half_local` want room for one and a half times as many.
  num_slots *= 2 if rules.rule == "half_local" else 1
  if config(q_BTHD.shape[-1], heads, num_slots).segment < _CHUNK:
    return f"has no room in shared memory for num_blocks={rules.num_by_query}"
  if pooling.reach() < rules.block_size:
    return f"takes windows that reach the end of their block, not {pooling}"
  return None


def choose(
  problem: Problem,
  rules: Rules,
  bounds: plan.Bounds,
  spans: list[plan.Span],
  interpret=None,
) -> list[jax.Array]:
  """The best blocks of every span, [B, T, K, slots], ascending, -1 behind them."""
  spans_with_room = [span for span in spans if span.slots > 0]
  chosen = _Call(problem, rules, spans_with_room, interpret).run(problem, bounds)
  b, t = bounds.own_block.shape
  k = problem.k_BSKD.shape[2]
  empty = jnp.zeros((b, t, k, 0), jnp.int32)
  return [chosen.pop(0) if span.slots else empty for span in spans]


class _Call:
  """One call of the kernel; what all of its parts know."""

  def __init__(self, problem: Problem, rules: Rules, spans: list[plan.Span], interpret):
    (b, t, h, d), k = problem.q_BTHD.shape, problem.k_BSKD.shape[2]
    self.batch, self.length, self.num_kv_heads, self.head_dim = b, t, k, d
    self.num_heads = h // k
    self.num_pairs = -(-self.num_heads // 2)
    self.config = config(d, self.num_heads, _num_slots(spans))
    self.rules, self.spans, self.interpret = rules, spans, interpret
    self.is_interpreted = interpret is not None
    self.num_tiles = -(-t // _TILE)
    self.num_rounds = -(-self.num_pairs // self.config.pairs)
    self.factor = rules.scale * _LOG2E
    pooling, size = rules.pooling, rules.block_size
    # A segment completes its own blocks and, at the end, those that no window is left for.
    extra = -(-(abs(pooling.first) + pooling.count) * pooling.stride // size)
    extra += -(-pooling.size // size) + 2
    self.scores = mosaic_top.Scores(
      per_block=size // pooling.stride,
      first=pooling.first,
      count=pooling.count,
      halo=_HALO,
      most_blocks=self.config.segment * pooling.stride // size + extra,
    )

  @property
  def num_workers(self) -> int:
    return 2 if self.is_interpreted else devices.num_multiprocessors()

  def slots(self, span: plan.Span) -> int:
    """Room for chosen blocks, a multiple of what a warp holds."""
    return -(-span.slots // mosaic_top.LANES) * mosaic_top.LANES

  def run(self, problem: Problem, bounds: plan.Bounds) -> list[jax.Array]:
    k_BSKD, pooling = problem.k_BSKD, self.rules.pooling
    keys_BWKD = poolings.mean_windows(k_BSKD, problem.segments_BS, pooling)
    keys_BKWD = keys_BWKD.astype(k_BSKD.dtype).transpose(0, 2, 1, 3)
    # Copies take whole tiles of 8 rows; and there must be something to copy from.
    num_windows = max(keys_BKWD.shape[2], 1)
    missing = num_windows + -num_windows % _CHUNK - keys_BKWD.shape[2]
    keys_BKWD = jnp.pad(keys_BKWD, [(0, 0), (0, 0), (0, missing), (0, 0)])
    q_BTHD = jnp.pad(problem.q_BTHD, [(0, 0), (0, -self.length % 8), (0, 0), (0, 0)])
    outs = self._kernel(q_BTHD, keys_BKWD, self._row_bounds(bounds), self._ranges())
    outs = [outs] if len(self.spans) == 1 else outs
    lists = []
    for out_RTM, span in zip(outs, self.spans, strict=True):
      out = out_RTM[:, : self.length, : span.slots]
      out = out.reshape(self.batch, self.num_kv_heads, self.length, span.slots)
      lists.append(out.transpose(0, 2, 1, 3))
    return lists

  def _row_bounds(self, bounds: plan.Bounds) -> jax.Array:
    """First and last windows of the rows of a product, [B, X, 4, L].

    The latter half is for the last pair of heads, where an odd one out sees nothing.
    """
    row = jnp.arange(_ROWS)
    query, is_second = 8 * (row // 16) + row % 8, row // 8 % 2 == 1
    first, end = (
      self._by_tile(x)[..., query] for x in (bounds.first_window, bounds.end_window)
    )
    is_missing = is_second & (self.num_heads % 2 == 1)
    last_end = jnp.where(is_missing[None, None], 0, end)
    return jnp.stack([first, end, first, last_end], axis=2)

  def _ranges(self) -> jax.Array:
    """Begin, end and number of blocks to choose, [B, X, 3 I, 32]."""
    numbers = [x for span in self.spans for x in span[:3]]
    return jnp.stack([self._by_tile(x) for x in numbers], axis=2)

  def _by_tile(self, x_BT):
    x_BT = jnp.pad(x_BT, [(0, 0), (0, -self.length % _TILE)], mode="edge")
    return x_BT.reshape(self.batch, self.num_tiles, _TILE)

  def _kernel(self, q_BTHD, keys_BKWD, bounds_BXCL, ranges_BXCT):
    num_rows = self.batch * self.num_kv_heads
    d, pairs, config = self.head_dim, self.config.pairs, self.config
    scratch = dict(
      q=_tiled((pairs * _ROWS, d)),
      keys=_tiled((_WARPGROUPS * config.stages, _CHUNK, d)),
      # Eight more numbers put the rows of a warp on different banks.
      scores=plgpu.SMEM((_TILE, _HALO + config.segment), jnp.float32),
      kept=[plgpu.SMEM((2 * _TILE, self.slots(span)), jnp.int32) for span in self.spans],
      # More than there are queries: a warpgroup fills whole vectors of 128.
      counts=[plgpu.SMEM((128,), jnp.int32) for _ in self.spans],
      ranges=[plgpu.SMEM((3, _TILE), jnp.int32) for _ in self.spans],
      norms=plgpu.SMEM((_WARPGROUPS, 2, pairs, _ROWS), jnp.float32),
      lse=plgpu.SMEM((self.num_pairs, _ROWS), jnp.float32),
      bounds=plgpu.SMEM((_ROWS_OF_BOUNDS, _ROWS), jnp.int32),
      bounds_ready=plgpu.Barrier(num_arrivals=1 + len(self.spans)),
      q_ready=plgpu.Barrier(num_arrivals=8 * pairs),
      keys_ready=plgpu.Barrier(num_barriers=_WARPGROUPS * config.stages),
      met=plgpu.Barrier(num_arrivals=_WARPGROUPS),
    )
    out_type = [
      jax.ShapeDtypeStruct((num_rows, self.num_tiles * _TILE, self.slots(span)), jnp.int32)
      for span in self.spans
    ]

    def body(q_gmem, keys_gmem, bounds_gmem, ranges_gmem, *out_gmem, smem):
      worker, wg = lax.axis_index("worker"), lax.axis_index("warpgroup")
      total = num_rows * self.num_tiles

      def work(i, _):
        # The last tiles first: they see most.
        number = total - 1 - (worker + i * self.num_workers)
        row, x = lax.rem(number, jnp.int32(num_rows)), lax.div(number, jnp.int32(num_rows))
        heads = jnp.int32(self.num_kv_heads)
        b, head = lax.div(row, heads), lax.rem(row, heads)
        tile = _Tile(self, smem, q_gmem.at[b], keys_gmem.at[b, head], wg, x * _TILE, head)
        tile.run(
          bounds_gmem.at[b, x],
          ranges_gmem.at[b, x],
          [out.at[row, pl.ds(x * _TILE, _TILE)] for out in out_gmem],
        )

      workers = jnp.int32(self.num_workers)
      num_own = lax.div(total - worker + workers - 1, workers)
      lax.fori_loop(0, num_own, work, None)

    return plgpu.kernel(
      body,
      out_type=out_type if len(out_type) > 1 else out_type[0],
      grid=(self.num_workers,),
      grid_names=("worker",),
      num_threads=_WARPGROUPS,
      thread_name="warpgroup",
      scratch_types=dict(smem=scratch),
      compiler_params=plgpu.CompilerParams(approx_math=True),
      interpret=self.interpret,
    )(q_BTHD, keys_BKWD, bounds_BXCL, ranges_BXCT)


@dataclasses.dataclass(frozen=True)
class _Tile:
  """A tile as one of the warpgroups sees it.

  Attributes:
    call: that it belongs to.
    smem: shared memory, by name.
    q_gmem: queries of the batch row, [T, H, D].
    keys_gmem: windows of the row, [W, D].
    wg: number of the warpgroup.
    first_query: of the tile.
    head: key head.
  """

  call: _Call
  smem: dict
  q_gmem: Any
  keys_gmem: Any
  wg: jax.Array
  first_query: jax.Array
  head: jax.Array

  def run(self, bounds_gmem, ranges_gmem, out_gmem) -> None:
    call, smem, config = self.call, self.smem, self.call.config
    # Everyone has read what the tile before has left.
    self._meet()

    @pl.when(self.wg == 0)
    def _begin():
      plgpu.copy_gmem_to_smem(bounds_gmem, smem["bounds"], smem["bounds_ready"])
      for i, ranges in enumerate(smem["ranges"]):
        source = ranges_gmem.at[pl.ds(3 * i, 3)]
        plgpu.copy_gmem_to_smem(source, ranges, smem["bounds_ready"])
      for kept, counts in zip(smem["kept"], smem["counts"], strict=True):
        kept[...] = jnp.full(kept.shape, -1, jnp.int32)
        counts[...] = jnp.zeros(counts.shape, jnp.int32)

    plgpu.barrier_wait(smem["bounds_ready"])
    # Queries ascend, and so do the windows that they see.
    chunk, last = jnp.int32(_CHUNK), _ROWS - 1
    begin = lax.div(smem["bounds"][_FIRST, 0], chunk)
    end = lax.div(smem["bounds"][_END, last] + chunk - 1, chunk)
    end = jnp.maximum(begin, end)

    for n in range(call.num_rounds):
      self._load_queries(n)
      self._normalize(n, begin, end)
    self._meet()

    per_segment = jnp.int32(config.segment // _CHUNK)
    num_segments = jnp.maximum(lax.div(end - begin + per_segment - 1, per_segment), 1)

    def segment(i, _):
      first = begin + i * per_segment
      after = jnp.minimum(first + per_segment, end)
      for n in range(call.num_rounds):
        if call.num_rounds > 1:
          self._load_queries(n)
        self._add_probabilities(n, first, after)
      self._meet()
      first_block = self._complete_blocks(first)
      end_block = jnp.where(
        i == num_segments - 1, jnp.int32(2**30), self._complete_blocks(after)
      )
      windows = first * _CHUNK, begin * _CHUNK, end * _CHUNK
      self._choose((first_block, end_block, *windows))
      self._meet()

    lax.fori_loop(0, num_segments, segment, None)

    @pl.when(self.wg == 0)
    def _write():
      plgpu.commit_smem()
      for kept, out in zip(smem["kept"], out_gmem, strict=True):
        plgpu.copy_smem_to_gmem(kept.at[pl.ds(0, _TILE)], out)
      plgpu.wait_smem_to_gmem(0)

  def _complete_blocks(self, chunk):
    """How many blocks have all of their windows before a chunk."""
    scores = self.call.scores
    windows = chunk * _CHUNK - (scores.first + scores.count)
    return jnp.maximum(lax.div(windows, jnp.int32(scores.per_block)) + 1, 0) * (windows >= 0)

  def _meet(self) -> None:
    """Waits for all warpgroups."""
    plgpu.commit_smem()
    plgpu.barrier_arrive(self.smem["met"])
    plgpu.barrier_wait(self.smem["met"])

  def _load_queries(self, n: int) -> None:
    """Loads the queries of a round's pairs of heads; each warpgroup eight of every head."""
    call, pairs = self.call, self.call.config.pairs
    if n or call.num_rounds > 1:
      self._meet()
    for p in range(pairs):
      for second in range(2):
        # Where there is no such head, the last one stands in, and counts for nothing.
        h = min(2 * (n * pairs + p) + second, call.num_heads - 1)
        queries = pl.ds(self.first_query + 8 * self.wg, 8)
        source = self.q_gmem.at[queries, self.head * call.num_heads + h]
        rows = pl.ds(_ROWS * p + 16 * self.wg + 8 * second, 8)
        plgpu.copy_gmem_to_smem(source, self.smem["q"].at[rows], self.smem["q_ready"])
    plgpu.barrier_wait(self.smem["q_ready"])

  def _num_pairs(self, n: int) -> int:
    """Pairs of heads of a round that exist."""
    pairs = self.call.config.pairs
    return min(pairs, self.call.num_pairs - n * pairs)

  def _for_chunks(self, begin, end, step):
    """Calls `step(keys_ref, first_window)` for the chunks of the warpgroup."""
    stages, smem = self.call.config.stages, self.smem
    count = jnp.maximum(lax.div(end - begin - self.wg + _WARPGROUPS - 1, _WARPGROUPS), 0)

    def window(i):
      return (begin + self.wg + i * _WARPGROUPS) * _CHUNK

    def load(i):
      place = self.wg * stages + lax.rem(i, jnp.int32(stages))

      @pl.when(i < count)
      def _copy():
        source = self.keys_gmem.at[pl.ds(window(i), _CHUNK)]
        plgpu.copy_gmem_to_smem(source, smem["keys"].at[place], smem["keys_ready"].at[place])

    def advance(i, _):
      place = self.wg * stages + lax.rem(i, jnp.int32(stages))
      plgpu.barrier_wait(smem["keys_ready"].at[place])
      step(smem["keys"].at[place], window(i))
      plgpu.commit_smem()
      load(i + stages)

    for i in range(stages):
      load(jnp.int32(i))
    lax.fori_loop(0, count, advance, None)

  def _products(self, n, p, keys_ref, window):
    """Products [L, 64] of a pair of heads, with what a row does not see put out of reach."""
    queries = self.smem["q"].at[pl.ds(_ROWS * p, _ROWS)]

    def multiply(sums):
      plgpu.wgmma(sums, queries, keys_ref.transpose((1, 0)))
      return sums[...]

    scores = pl.run_scoped(multiply, plgpu.ACC((_ROWS, _CHUNK), jnp.float32))
    # The last pair may lack a head, and then has bounds of its own.
    is_odd = self.call.num_heads % 2 == 1
    is_last = n * self.call.config.pairs + p == self.call.num_pairs - 1
    base = jnp.where(is_odd & is_last, 2, 0)
    bounds, last = self.smem["bounds"], _ROWS - 1

    def mask(scores):
      first, end = (self._vector(bounds.at[base + i]) for i in (_FIRST, _END))
      column = window + self._columns()
      first, end = (lax.broadcast_in_dim(x, column.shape, [0]) for x in (first, end))
      return jnp.where((column >= first) & (column < end), scores, _MASKED)

    # Queries ascend, and so do their bounds: most chunks are seen whole by all of them.
    is_edge = (window < bounds[_FIRST, last]) | (window + _CHUNK > bounds[_END, 0]) | (base > 0)
    return lax.cond(is_edge, mask, lambda scores: scores, scores)

  def _normalize(self, n: int, begin, end) -> None:
    """Finds the logarithms of the sums of exponentials, base 2, of a round's heads."""
    smem, num_pairs = self.smem, self._num_pairs(n)
    norms = smem["norms"].at[self.wg]

    def begin_pair(p, _):
      norms.at[0, p][...] = self._filled(_LOWEST)
      norms.at[1, p][...] = self._filled(0.0)

    def step(keys_ref, window):
      def add_pair(p, _):
        scores = self._products(n, p, keys_ref, window)
        highest = self._vector(norms.at[0, p])
        # The scale enters in one multiply-add with the maximum.
        new_highest = jnp.maximum(highest, scores.max(axis=1) * self.call.factor)
        weights = jnp.exp2(self._minus(scores, new_highest))
        norm = self._vector(norms.at[1, p]) * jnp.exp2(highest - new_highest)
        norms.at[0, p][...] = new_highest
        norms.at[1, p][...] = norm + weights.sum(axis=1)

      lax.fori_loop(0, num_pairs, add_pair, None)

    def combine(i, _):
      p = self.wg + i * _WARPGROUPS
      parts = [
        [self._vector(smem["norms"].at[w, j, p]) for j in range(2)] for w in range(_WARPGROUPS)
      ]
      highest = parts[0][0]
      for other, _ in parts[1:]:
        highest = jnp.maximum(highest, other)
      norm = sum(part * jnp.exp2(other - highest) for other, part in parts)
      # A row that sees nothing gives every window a probability of 0.
      lse = jnp.where(norm > 0.0, highest + jnp.log2(jnp.maximum(norm, 1e-37)), -_MASKED)
      smem["lse"].at[n * self.call.config.pairs + p][...] = lse

    lax.fori_loop(0, num_pairs, begin_pair, None)
    self._for_chunks(begin, end, step)
    self._meet()
    num_own = lax.div(num_pairs - self.wg + _WARPGROUPS - 1, jnp.int32(_WARPGROUPS))
    lax.fori_loop(0, num_own, combine, None)

  def _add_probabilities(self, n: int, begin, end) -> None:
    """Adds probabilities of a round's heads to the scores of windows."""
    smem, first = self.smem, begin * _CHUNK

    def step(keys_ref, window):
      def add_pair(p, total):
        scores = self._products(n, p, keys_ref, window)
        lse = self._vector(smem["lse"].at[n * self.call.config.pairs + p])
        return total + jnp.exp2(self._minus(scores, lse))

      total = lax.fori_loop(0, self._num_pairs(n), add_pair, self._zeros())
      column = _HALO + window - first
      fold = mosaic_fold.interpreted if self.call.is_interpreted else mosaic_fold.fold
      fold(smem["scores"], column, total, is_first=n == 0)

    self._for_chunks(begin, end, step)

  def _choose(self, segment) -> None:
    smem = self.smem
    arrays = zip(smem["ranges"], smem["kept"], smem["counts"], strict=True)
    for ranges, kept, counts in arrays:
      for i in range(_TILE // (4 * _WARPGROUPS)):
        row = i * _WARPGROUPS + self.wg
        arguments = smem["scores"], ranges, kept, counts, row, segment, self.call.scores
        if self.call.is_interpreted:
          mosaic_top.choose_interpreted(*arguments)
        else:
          mosaic_top.choose(*arguments)

  def _minus(self, scores, x):
    """Scaled scores less a number for each row."""
    return scores * self.call.factor + lax.broadcast_in_dim(-x, scores.shape, [0])

  # Arrays.

  def _vector(self, ref):
    if self.call.is_interpreted:
      return ref[...]
    return plgpu.load(ref, layout=mosaic_inline.LAYOUT.reduce(1))

  def _filled(self, value: float):
    x = jnp.full((_ROWS,), value, jnp.float32)
    if self.call.is_interpreted:
      return x
    return plgpu.layout_cast(x, mosaic_inline.LAYOUT.reduce(1))

  def _zeros(self):
    x = jnp.zeros((_ROWS, _CHUNK), jnp.float32)
    return x if self.call.is_interpreted else plgpu.layout_cast(x, mosaic_inline.LAYOUT)

  def _columns(self):
    shape = (_ROWS, _CHUNK)
    if self.call.is_interpreted:
      return lax.broadcasted_iota(jnp.int32, shape, 1)
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=mosaic_inline.LAYOUT)


def _tiled(shape):
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=mosaic_inline.TRANSFORMS)
