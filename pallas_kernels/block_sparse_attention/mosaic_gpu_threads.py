"""The threads of a kernel of block-sparse attention: those that compute, and one that fetches.

Between them is a ring (`mosaic_ring`), with our own barriers (`mosaic_barrier`), or those of
Pallas in the interpreter. The four warps of the thread that fetches share the copies of a
stage: with one alone, the forward kernel took 5 % longer.
"""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_barrier, mosaic_ring
from pallas_kernels.block_sparse_attention.mosaic_gpu_shape import Shape


def num_fetchers(shape: Shape, num_parts: int) -> int:
  """Warps that share the copies of a stage of so many parts."""
  return 1 if shape.interpreted else min(4, num_parts)


def own_parts(warp, shape: Shape, num_parts: int) -> list[jax.Array]:
  """The parts of a stage that a warp copies."""
  num_warps = num_fetchers(shape, num_parts)
  return [warp + i * num_warps for i in range(num_parts // num_warps)]


def ring_scratch(num_stages: int, num_filled: int, shape: Shape, num_threads: int) -> dict:
  """What a ring needs of shared memory, for stages of `num_filled` copies in all."""
  if shape.own_barriers:
    free = plgpu.SMEM((num_threads * shape.warps.per_thread,), jnp.int32)
  else:
    free = plgpu.Barrier(num_arrivals=num_threads, num_barriers=num_stages)
  filled = mosaic_barrier.scratch(num_stages, num_filled, shape.own_barriers)
  return dict(filled=filled, free=free, set_up=plgpu.Barrier(num_arrivals=num_threads + 1))


def ring_of(smem: dict, num_stages: int, shape: Shape, thread, before) -> mosaic_ring.Ring:
  """The ring of `ring_scratch` as a stretch of a thread's work sees it."""
  filled = mosaic_barrier.Barriers(smem["filled"], shape.own_barriers, by_warp=True)
  reader = thread * shape.warps.per_thread + shape.warps.index()
  return mosaic_ring.Ring(filled, smem["free"], num_stages, before, reader)


def set_up(smem: dict, shape: Shape, thread, num_calls: dict[str, int]) -> None:
  """Sets up our own barriers, by name, of so many calls of `copy`, and the ring's counters."""
  if not shape.own_barriers:
    return

  @pl.when(thread == 0)
  def _initialize():
    barriers = [(smem[name], num) for name, num in num_calls.items()]
    mosaic_barrier.initialize(barriers, [smem["free"]])

  plgpu.barrier_arrive(smem["set_up"])
  plgpu.barrier_wait(smem["set_up"])


def run(thread, num_threads, registers, compute, fetch, num_fetchers: int) -> None:
  """Runs the computing threads, and `fetch(warp)` in so many warps of the last thread."""

  @pl.when(thread < num_threads)
  def _compute():
    plgpu.set_max_registers(registers, action="increase")
    compute()

  @pl.when(thread == num_threads)
  def _fetch():
    plgpu.set_max_registers(32, action="decrease")

    @plgpu.warp_map
    def _each(warp):
      @pl.when(warp < num_fetchers)
      def _fetch():
        fetch(warp)
