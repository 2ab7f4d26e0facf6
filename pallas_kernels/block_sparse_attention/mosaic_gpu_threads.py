"""The threads of a kernel of block-sparse attention: those that compute, and one that fetches.

Between them is a ring (`mosaic_ring`), with barriers of Pallas or our own (`mosaic_barrier`).
"""

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_barrier, mosaic_ring
from pallas_kernels.block_sparse_attention.mosaic_gpu_shape import Shape


def ring_scratch(num_stages: int, num_filled: int, shape: Shape, num_threads: int) -> dict:
  """What a ring needs of shared memory, for stages of `num_filled` copies."""
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


def set_up(smem: dict, shape: Shape, thread, num_copies: dict[str, int]) -> None:
  """Sets up our own barriers, by name, of so many copies, and the ring's counters."""
  if not shape.own_barriers:
    return

  @pl.when(thread == 0)
  def _initialize():
    barriers = [(smem[name], num) for name, num in num_copies.items()]
    mosaic_barrier.initialize(barriers, [smem["free"]])

  plgpu.barrier_arrive(smem["set_up"])
  plgpu.barrier_wait(smem["set_up"])


def run(thread, num_threads, registers, compute, fetch) -> None:
  """The computing threads, and one warp of the last thread to fetch for them."""

  @pl.when(thread < num_threads)
  def _compute():
    plgpu.set_max_registers(registers, action="increase")
    compute()

  @pl.when(thread == num_threads)
  def _fetch():
    plgpu.set_max_registers(24, action="decrease")

    @plgpu.warp_map
    def _one(warp):
      @pl.when(warp == 0)
      def _():
        fetch()
