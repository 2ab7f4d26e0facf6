"""A ring of stages in shared memory: one warp fills them, all others read and leave them.

Stages are numbered along a stretch of work (a tile), from 0; `before` stages have gone
round before it. A reader counts the stages it has waited for (`ready`) and given back
(`left`), and carries both along. Readers may be far apart, also within a warpgroup.
"""

from collections.abc import Callable
import dataclasses

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Ring:
  """The ring as one stretch of work sees it.

  Attributes:
    filled: barriers, one for each stage, that copies into it complete.
    free: barriers, one for each stage, on which every reader arrives.
    num_stages: how many there are.
    before: stages of all earlier stretches.
    interpreted: whether the kernel runs in the interpreter.
  """

  filled: jax.Ref
  free: jax.Ref
  num_stages: int
  before: jax.Array
  interpreted: bool

  def index(self, stage) -> jax.Array:
    """Where in the ring a stage lies."""
    return wrap(self.before + stage, self.num_stages)

  def wait(self, ready, until) -> jax.Array:
    """Waits for all stages below `until`; returns the new `ready`."""

    def step(stage):
      plgpu.barrier_wait(self.filled.at[self.index(stage)])
      return stage + 1

    return lax.while_loop(lambda stage: stage < until, step, ready)

  def leave(self, ready, left, until) -> tuple[jax.Array, jax.Array]:
    """Gives back all stages below `until`; returns the new `ready` and `left`.

    Stage by stage: who waited for later stages while holding earlier ones could wait for
    ever.
    """

    def step(state):
      ready, left = state

      @pl.when(left >= ready)
      def _skip():
        plgpu.barrier_wait(self.filled.at[self.index(left)])

      if self.interpreted:
        # There, reads of shared memory are ordered before copies into it by this alone.
        plgpu.commit_smem()
      plgpu.barrier_arrive(self.free.at[self.index(left)])
      return jnp.maximum(ready, left + 1), left + 1

    return lax.while_loop(lambda state: state[1] < until, step, (ready, left))

  def fill(self, stage, copy: Callable[[jax.Array, jax.Ref], None]) -> None:
    """Waits until a stage is free and starts the copies into it.

    Args:
      stage: its number.
      copy: called with its place in the ring and the barrier for the copies.
    """
    place = self.index(stage)

    @pl.when(self.before + stage >= self.num_stages)
    def _wait():
      plgpu.barrier_wait(self.free.at[place])

    copy(place, self.filled.at[place])


def drain(free, num_stages: int, total) -> None:
  """Observes that readers have left the last stages, after `total` of them."""

  def step(stage, _):
    plgpu.barrier_wait(free.at[wrap(stage, num_stages)])

  lax.fori_loop(jnp.maximum(total - num_stages, 0), total, step, None)


def wrap(number, size: int) -> jax.Array:
  """The remainder of a number that is not negative."""
  if size & (size - 1) == 0:
    return number & (size - 1)
  # Dividing signed numbers by a constant takes twice as many instructions.
  return lax.rem(number.astype(jnp.uint32), jnp.uint32(size)).astype(jnp.int32)
