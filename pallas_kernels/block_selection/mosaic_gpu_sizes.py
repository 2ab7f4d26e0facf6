"""What all tiles of a call of block selection on Hopper GPUs share; see `mosaic_gpu_tile`.

Sizes, shared memory and its barriers, and how far a warpgroup has come with them.
"""

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_barrier, mosaic_inline, mosaic_top

TILE = 32
ROWS = 64
WARPGROUPS = 4
HALO = 8
# Windows of a product, the first and the second time through.
WIDE, NARROW = 64, 32
ROWS_OF_BOUNDS = 4
# With so many pairs of heads or fewer, several warpgroups work on the same pair.
MOST_SHARED = WARPGROUPS - 1


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """What all tiles of a call have in common.

  Attributes:
    config: see there.
    head_dim: D.
    num_heads: per key head.
    factor: of products, for exponentials in base 2.
    scores: where scores of windows lie.
    is_interpreted: whether the kernel runs in the interpreter.
  """

  config: Config
  head_dim: int
  num_heads: int
  factor: float
  scores: mosaic_top.Scores
  is_interpreted: bool

  @property
  def own_barriers(self) -> bool:
    """Whether to use those of `mosaic_barrier`, which the interpreter does not know."""
    return not self.is_interpreted

  @property
  def num_pairs(self) -> int:
    return -(-self.num_heads // 2)

  @property
  def num_rounds(self) -> int:
    """How often queries are loaded, some pairs of heads at a time."""
    return -(-self.num_pairs // self.config.pairs)

  def pairs_of_round(self, n: int) -> int:
    return min(self.config.pairs, self.num_pairs - n * self.config.pairs)


class Done(NamedTuple):
  """What a warpgroup has done since the kernel began; it tells how barriers stand.

  Attributes:
    queries: how often queries have been loaded.
    wide, narrow: products' worth of windows that the warpgroup has taken, of either width.
  """

  queries: jax.Array
  wide: jax.Array
  narrow: jax.Array


def nothing_done() -> Done:
  """Where a warpgroup begins."""
  return Done(jnp.int32(0), jnp.int32(0), jnp.int32(0))


# How many calls of `copy` complete each kind of barrier, by name.
_NUM_CALLS = dict(bounds_ready=1, q_ready=WARPGROUPS, wide_ready=1, narrow_ready=1)


def _num_copies(sizes: Sizes, num_spans: int) -> dict[str, int]:
  """How many copies complete each kind of barrier, by name."""
  return dict(
    bounds_ready=1 + num_spans,
    q_ready=2 * WARPGROUPS * sizes.config.pairs,
    wide_ready=1,
    narrow_ready=1,
  )


def scratch(sizes: Sizes, slots: Sequence[int]) -> dict:
  """Shared memory by name; `slots` is the room for chosen blocks of every span."""
  config, d = sizes.config, sizes.head_dim
  keys = WARPGROUPS * config.stages * WIDE
  num_barriers = dict(
    bounds_ready=1, q_ready=1, wide_ready=keys // WIDE, narrow_ready=keys // NARROW
  )
  barriers = {
    name: mosaic_barrier.scratch(num_barriers[name], num_copies, sizes.own_barriers)
    for name, num_copies in _num_copies(sizes, len(slots)).items()
  }
  return dict(
    q=_tiled((config.pairs * ROWS, d)),
    keys=_tiled((keys, d)),
    # Eight more numbers put the rows of a warp on different banks.
    scores=plgpu.SMEM((TILE, HALO + config.segment), jnp.float32),
    kept=[plgpu.SMEM((2 * TILE, n), jnp.int32) for n in slots],
    counts=[plgpu.SMEM((TILE,), jnp.int32) for _ in slots],
    # Of a tile, and of the one after it.
    ranges=[plgpu.SMEM((2, 3, TILE), jnp.int32) for _ in slots],
    norms=plgpu.SMEM((WARPGROUPS, 2, min(config.pairs, MOST_SHARED), ROWS), jnp.float32),
    lse=plgpu.SMEM((sizes.num_pairs, ROWS), jnp.float32),
    bounds=plgpu.SMEM((ROWS_OF_BOUNDS, ROWS), jnp.int32),
    met=plgpu.Barrier(num_arrivals=WARPGROUPS),
    **barriers,
  )


def set_up(sizes: Sizes, smem: dict, wg) -> None:
  """Sets up our own barriers; what every warpgroup begins with."""
  if not sizes.own_barriers:
    return

  @pl.when(wg == 0)
  def _initialize():
    barriers = [(smem[name], num) for name, num in _NUM_CALLS.items()]
    mosaic_barrier.initialize(barriers, [])

  plgpu.barrier_arrive(smem["met"])
  plgpu.barrier_wait(smem["met"])


def _tiled(shape):
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=mosaic_inline.TRANSFORMS)
