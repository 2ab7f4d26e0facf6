"""Timing functions on a GPU, and taking turns with other processes that do the same.

Most of a benchmark's time goes into lowering kernels, on the CPU. Several processes can do
that side by side, if they do not run on the GPU at the same time.
"""

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import os
import pathlib
import time

import jax

# A run of many calls takes about so many seconds.
_RUN = 0.03
_MOST_CALLS = 10
_TRIES = 7


class Clock:
  """Measures functions.

  Args:
    turns: file that processes lock while they use the GPU; None where there are no others.
  """

  def __init__(self, turns: str | os.PathLike | None = None):
    self._turns = None if turns is None else pathlib.Path(turns)

  @contextlib.contextmanager
  def turn(self) -> Iterator[None]:
    """Nobody else uses the GPU meanwhile."""
    if self._turns is None:
      yield
      return
    with self._turns.open("w") as file:
      fcntl.flock(file, fcntl.LOCK_EX)
      yield

  def milliseconds(self, function: Callable, *args) -> float:
    """What a call takes of the GPU: the median of several runs of many calls each.

    The calls of a run are in one program, so that no time passes between its kernels which a
    whole model would not spend too.
    """

    def run(num_calls, *args):
      def again(_, result):
        # Each call seems to depend on the one before it.
        return function(*jax.lax.optimization_barrier((args, result))[0])

      return jax.lax.fori_loop(1, num_calls, again, function(*args))

    compiled = jax.jit(run).lower(1, *args).compile()

    def seconds(num_calls: int) -> float:
      started = time.perf_counter()
      jax.block_until_ready(compiled(num_calls, *args))
      return time.perf_counter() - started

    with self.turn():
      seconds(1)
      num_calls = max(1, min(_MOST_CALLS, int(_RUN / seconds(1))))
      times = sorted(seconds(num_calls) / num_calls for _ in range(_TRIES))
    return 1e3 * times[_TRIES // 2]
