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
import jax.numpy as jnp

# A run of many calls takes about so many seconds.
_RUN = 0.03
_MOST_CALLS = 10
_TRIES = 7


class Timed:
  """A function, compiled to be called several times in a row.

  The calls of a run are in one program, so that no time passes between its kernels which a
  whole model would not spend too.

  Args:
    function: of arrays, or pytrees of them.
    *args: shapes and dtypes of its arguments.
  """

  def __init__(self, function: Callable, *args):
    self.result_shape = jax.eval_shape(function, *args)

    def run(num_calls, *args):
      def call(_, result):
        # Each call seems to depend on the one before it.
        return function(*jax.lax.optimization_barrier((args, result))[0])

      start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.result_shape)
      return jax.lax.fori_loop(0, num_calls, call, start)

    self._run = jax.jit(run).lower(1, *args).compile()

  def result(self, *args):
    """What the function returns."""
    return jax.block_until_ready(self._run(1, *args))

  def milliseconds(self, *args) -> float:
    """What a call takes of the GPU: the median of several runs of many calls each."""

    def seconds(num_calls: int) -> float:
      started = time.perf_counter()
      jax.block_until_ready(self._run(num_calls, *args))
      return time.perf_counter() - started

    seconds(1)
    num_calls = max(1, min(_MOST_CALLS, int(_RUN / seconds(1))))
    times = sorted(seconds(num_calls) / num_calls for _ in range(_TRIES))
    return 1e3 * times[_TRIES // 2]


@contextlib.contextmanager
def turn(path: str | os.PathLike | None) -> Iterator[None]:
  """Meanwhile no other process is in a turn with the same file; None is no file at all."""
  if path is None:
    yield
    return
  with pathlib.Path(path).open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield
