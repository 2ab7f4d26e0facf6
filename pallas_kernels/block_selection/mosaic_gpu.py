"""Block selection on Hopper GPUs: scores, their softmax, their sum and the best, in one go.

This is the call, arrays in and lists out; `mosaic_gpu_tile` is what is done with a tile of
32 queries. No score reaches device memory.

Extra shape letters:
  X tiles   L = 64 rows of a product   P pairs of heads   I spans of blocks
"""

import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import devices, mosaic_top
from pallas_kernels.block_selection import mosaic_gpu_sizes, mosaic_gpu_tile, plan
from pallas_kernels.block_selection.mosaic_gpu_sizes import (
  HALO,
  MOST_SHARED,
  ROWS,
  ROWS_OF_BOUNDS,
  TILE,
  WARPGROUPS,
  WIDE,
  Config,
)
from pallas_kernels.block_selection.problem import Problem, Rules

_LOG2E = math.log2(math.e)
# Bytes of shared memory that a block may have. Every array takes a multiple of 1 KiB: four of
# barriers, two of counts and ranges for each span. The warpgroups' meeting has 8 bytes, and
# 2 KiB are Mosaic's own.
_SHARED_MEMORY = 227 * 1024
_BARRIERS = 6 * 1024 + 8
_OF_A_SPAN = 2 * 1024

HEAD_DIMS = (64, 128)


def config(head_dim: int, num_heads: int, num_slots: int, num_spans: int) -> Config:
  """The largest segments that shared memory has room for.

  Args:
    head_dim: D.
    num_heads: per key head.
    num_slots: blocks that a query may keep, of all spans.
    num_spans: ranges that blocks are chosen from.
  """
  num_pairs = -(-num_heads // 2)
  pairs, stages = min(512 // head_dim, num_pairs), 128 // head_dim
  rest = 2 * head_dim * (pairs * ROWS + WARPGROUPS * stages * WIDE)
  norms = 2 * WARPGROUPS * min(pairs, MOST_SHARED)
  sums = -(-num_pairs // 4) * 4
  rest += 4 * ROWS * (norms + sums + ROWS_OF_BOUNDS + num_slots)
  rest += _BARRIERS + _OF_A_SPAN * num_spans
  room = (_SHARED_MEMORY - rest) // (4 * TILE) - HALO
  return Config(segment=min(room // WIDE, 8) * WIDE, stages=stages, pairs=pairs)


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
  if rules.normalizer is not None:
    size, stride = rules.normalizer.size, rules.normalizer.stride
    return (
      f"normalises over the windows it scores, not over those of {size} keys every {stride}"
    )
  if pooling.count > HALO or abs(pooling.first) > HALO:
    return f"takes up to {HALO} windows per block, next to it, not {pooling}"
  num_slots = mosaic_top.LANES * -(-rules.num_by_query // mosaic_top.LANES)
  # The two halves of `half_local` want room for one and a half times as many.
  num_spans = 2 if rules.rule == "half_local" else 1
  if config(q_BTHD.shape[-1], heads, num_spans * num_slots, num_spans).segment < WIDE:
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
    self.batch, self.length, self.num_kv_heads = b, t, k
    self.num_tiles = -(-t // TILE)
    self.rules, self.spans, self.interpret = rules, spans, interpret
    pooling, size = rules.pooling, rules.block_size
    layout = config(d, h // k, _num_slots(spans), len(spans))
    # A segment completes its own blocks and, at the end, those that no window is left for.
    extra = -(-(abs(pooling.first) + pooling.count) * pooling.stride // size)
    extra += -(-pooling.size // size) + 2
    scores = mosaic_top.Scores(
      per_block=size // pooling.stride,
      first=pooling.first,
      count=pooling.count,
      weights=pooling.weights,
      halo=HALO,
      most_blocks=layout.segment * pooling.stride // size + extra,
    )
    self.sizes = mosaic_gpu_sizes.Sizes(
      config=layout,
      head_dim=d,
      num_heads=h // k,
      factor=rules.scale * _LOG2E,
      scores=scores,
      is_interpreted=interpret is not None,
    )

  @property
  def num_workers(self) -> int:
    return 2 if self.sizes.is_interpreted else devices.num_multiprocessors()

  def slots(self, span: plan.Span) -> int:
    """Room for chosen blocks, a multiple of what a warp holds."""
    return -(-span.slots // mosaic_top.LANES) * mosaic_top.LANES

  def run(self, problem: Problem, bounds: plan.Bounds) -> list[jax.Array]:
    keys_BKWD = problem.keys_of_windows(self.rules.pooling).transpose(0, 2, 1, 3)
    # Copies take whole tiles of 8 rows; and there must be something to copy from.
    num_windows = max(keys_BKWD.shape[2], 1)
    missing = num_windows + -num_windows % WIDE - keys_BKWD.shape[2]
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
    row = jnp.arange(ROWS)
    query, is_second = 8 * (row // 16) + row % 8, row // 8 % 2 == 1
    first, end = (
      self._by_tile(x)[..., query] for x in (bounds.first_window, bounds.end_window)
    )
    is_missing = is_second & (self.sizes.num_heads % 2 == 1)
    last_end = jnp.where(is_missing[None, None], 0, end)
    return jnp.stack([first, end, first, last_end], axis=2)

  def _ranges(self) -> jax.Array:
    """Begin, end and number of blocks to choose, [B, X, 3 I, 32]."""
    numbers = [x for span in self.spans for x in span[:3]]
    return jnp.stack([self._by_tile(x) for x in numbers], axis=2)

  def _by_tile(self, x_BT):
    x_BT = jnp.pad(x_BT, [(0, 0), (0, -self.length % TILE)], mode="edge")
    return x_BT.reshape(self.batch, self.num_tiles, TILE)

  def _kernel(self, q_BTHD, keys_BKWD, bounds_BXCL, ranges_BXCT):
    num_rows = self.batch * self.num_kv_heads
    slots = [self.slots(span) for span in self.spans]
    out_type = [
      jax.ShapeDtypeStruct((num_rows, self.num_tiles * TILE, n), jnp.int32) for n in slots
    ]

    def body(q_gmem, keys_gmem, bounds_gmem, ranges_gmem, *out_gmem, smem):
      worker, wg = lax.axis_index("worker"), lax.axis_index("warpgroup")
      total = num_rows * self.num_tiles
      workers = jnp.int32(self.num_workers)
      num_own = lax.div(total - worker + workers - 1, workers)

      def tile_of(i) -> mosaic_gpu_tile.Tile:
        """The i-th tile of this worker, the last ones first: they see most."""
        number = total - 1 - (worker + i * self.num_workers)
        row, x = lax.rem(number, jnp.int32(num_rows)), lax.div(number, jnp.int32(num_rows))
        heads = jnp.int32(self.num_kv_heads)
        b, head = lax.div(row, heads), lax.rem(row, heads)
        return mosaic_gpu_tile.Tile(
          self.sizes,
          smem,
          q_gmem,
          keys_gmem,
          bounds_gmem,
          ranges_gmem,
          [out.at[row, pl.ds(x * TILE, TILE)] for out in out_gmem],
          wg,
          batch=b,
          head=head,
          x=x,
          turn=i & 1,
        )

      def begin(i):
        pl.when(i < num_own)(lambda: tile_of(i).begin())

      def work(i, done):
        return tile_of(i).run(lambda: begin(i + 1), done)

      mosaic_gpu_sizes.set_up(self.sizes, smem, wg)
      begin(jnp.int32(0))
      lax.fori_loop(0, num_own, work, mosaic_gpu_sizes.nothing_done())

    return plgpu.kernel(
      body,
      out_type=out_type if len(out_type) > 1 else out_type[0],
      grid=(self.num_workers,),
      grid_names=("worker",),
      num_threads=mosaic_gpu_sizes.WARPGROUPS,
      thread_name="warpgroup",
      kernel_name="block_selection",
      scratch_types=dict(smem=mosaic_gpu_sizes.scratch(self.sizes, slots)),
      compiler_params=plgpu.CompilerParams(approx_math=True),
      interpret=self.interpret,
    )(q_BTHD, keys_BKWD, bounds_BXCL, ranges_BXCT)
