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

_CALLS = 6  # of a run
_TRIES = 7
# Seconds after which there are no more tries, but for the first three.
_LONG = 1.0


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

    # How many calls there are, is known to the compiler: else the CPU decides before each.
    def run(*args):
      def call(_, result):
        # Each call seems to depend on the one before it.
        return function(*jax.lax.optimization_barrier((args, result))[0])

      start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.result_shape)
      return jax.lax.fori_loop(0, _CALLS, call, start)

    self._run = jax.jit(run).lower(*args).compile()

  def result(self, *args):
    """What the function returns."""
    return jax.block_until_ready(self._run(*args))

  def milliseconds(self, *args) -> float:
    """What a call takes of the GPU: the median of several runs of several calls each."""
    times = []
    while len(times) < _TRIES and (len(times) < 3 or sum(times) < _LONG):
      started = time.perf_counter()
      jax.block_until_ready(self._run(*args))
      times.append(time.perf_counter() - started)
    return 1e3 * sorted(times)[len(times) // 2] / _CALLS


@contextlib.contextmanager
def turn(path: str | os.PathLike | None) -> Iterator[None]:
  """Meanwhile no other process is in a turn with the same file; None is no file at all."""
  if path is None:
    yield
    return
  with pathlib.Path(path).open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield
