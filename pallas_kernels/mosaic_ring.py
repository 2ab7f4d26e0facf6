"""A ring of stages in shared memory: some warps fill them, others read and leave them.

Stages are numbered along a stretch of work (a tile), from 0; `before` stages have gone
round before it. A reader counts the stages it has waited for (`ready`) and given back
(`left`), and carries both along. Readers may be far apart, also within a warpgroup.
"""

from collections.abc import Callable, Iterable
import dataclasses
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_barrier


@dataclasses.dataclass(frozen=True)
class Ring:
  """The ring as one stretch of work sees it.

  Attributes:
    filled: a barrier for each stage, that the copies of all who fill it complete.
    free: what readers say that they have left. Where `filled` is our own: counters, one for
      each warp, of stages since the kernel began. Else barriers of Pallas, one for each
      stage, on which every reader arrives.
    num_stages: how many there are.
    before: stages of all earlier stretches.
    reader: number of the reading warp; of no meaning to who fills.
  """

  filled: mosaic_barrier.Barriers
  free: Any
  num_stages: int
  before: jax.Array
  reader: jax.Array

  def index(self, stage) -> jax.Array:
    """Where in the ring a stage lies."""
    return wrap(self.before + stage, self.num_stages)

  def wait(self, ready, until) -> jax.Array:
    """Waits for all stages below `until`; returns the new `ready`."""

    def step(stage):
      self._wait_for(stage)
      return stage + 1

    return lax.while_loop(lambda stage: stage < until, step, ready)

  def leave(self, ready, left, until) -> tuple[jax.Array, jax.Array]:
    """Gives back all stages below `until`; returns the new `ready` and `left`.

    Stage by stage, where it has not waited for them: who waited for later stages while
    holding earlier ones could wait for ever. And it does wait: how often a stage has been
    filled, a barrier tells only to who has seen every time.
    """
    if self.filled.own:

      def skip(ready):
        self._wait_for(ready)
        mosaic_barrier.set_counter(self.free, self.reader, self.before + ready + 1)
        return ready + 1

      @pl.when(jnp.minimum(ready, until) > left)
      def _leave():
        counter = self.before + jnp.minimum(ready, until)
        mosaic_barrier.set_counter(self.free, self.reader, counter)

      ready = lax.while_loop(lambda ready: ready < until, skip, ready)
      return ready, jnp.maximum(left, until)

    def step(state):
      ready, left = state

      @pl.when(left >= ready)
      def _skip():
        self._wait_for(left)

      # In the interpreter, reads of shared memory are ordered before copies into it by this
      # alone.
      plgpu.commit_smem()
      plgpu.barrier_arrive(self.free.at[self.index(left)])
      return jnp.maximum(ready, left + 1), left + 1

    return lax.while_loop(lambda state: state[1] < until, step, (ready, left))

  def fill(self, stage, copies: Callable[[jax.Array], Iterable[mosaic_barrier.Copy]]) -> None:
    """Waits until a stage is free and starts the copies of a warp into it.

    Args:
      stage: its number.
      copies: called with its place in the ring.
    """
    place = self.index(stage)

    @pl.when(self.before + stage >= self.num_stages)
    def _wait():
      if self.filled.own:
        first_needed = self.before + stage - self.num_stages + 1
        mosaic_barrier.wait_for_counters(self.free, first_needed)
      else:
        plgpu.barrier_wait(self.free.at[place])

    self.filled.copy(place, list(copies(place)))

  def drain(self) -> None:
    """Ends the work of who fills, after all stretches: `before` counts every stage."""
    if self.filled.own:
      return  # readers have waited for every stage

    def step(stage, _):
      plgpu.barrier_wait(self.free.at[wrap(stage, self.num_stages)])

    first = jnp.maximum(self.before - self.num_stages, 0)
    lax.fori_loop(first, self.before, step, None)

  def _wait_for(self, stage) -> None:
    number = self.before + stage
    times_round = lax.div(number.astype(jnp.uint32), jnp.uint32(self.num_stages))
    self.filled.wait(wrap(number, self.num_stages), times_round.astype(jnp.int32) & 1)


def wrap(number, size: int) -> jax.Array:
  """The remainder of a number that is not negative."""
  if size & (size - 1) == 0:
    return number & (size - 1)
  # Dividing signed numbers by a constant takes twice as many instructions.
  return lax.rem(number.astype(jnp.uint32), jnp.uint32(size)).astype(jnp.int32)
