"""Timing functions on a GPU, and taking turns with other processes that do the same.

A time is that of the function's kernels, as the device's own trace has it. Clocks of the CPU
would add what lies between the kernels: in a whole model, other kernels do.

Most of a benchmark's time goes into compiling kernels, on the CPU. Several processes can do
that side by side, if they do not run on the GPU at the same time.
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import fcntl
import os
import pathlib
import statistics
import tempfile
from typing import Any

import jax

_TRIES = 7
# Milliseconds after which there are no more tries, but for the first three.
_LONG = 1000.0


class Timed:
  """A function, compiled.

  Args:
    function: of arrays, or pytrees of them.
    *args: shapes and dtypes of its arguments.
  """

  def __init__(self, function: Callable, *args):
    self.result_shape = jax.eval_shape(function, *args)
    self._run = jax.jit(function).lower(*args).compile()

  def result(self, *args):
    """What the function returns."""
    return jax.block_until_ready(self._run(*args))

  def milliseconds(self, *args) -> float:
    """The time of its kernels: the median of several calls.

    Raises:
      RuntimeError: it ran on no GPU.
    """
    self.result(*args)
    times = []
    while len(times) < _TRIES and (len(times) < 3 or sum(times) < _LONG):
      with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
          self.result(*args)
        (path,) = pathlib.Path(folder).glob("**/*.xplane.pb")
        trace = jax.profiler.ProfileData.from_file(str(path))
        times.append(busy(trace.planes) / 1e6)
    return statistics.median(times)


def busy(planes: Iterable[Any]) -> float:
  """Nanoseconds of all kernels and copies of a trace.

  Args:
    planes: of `jax.profiler.ProfileData`.

  Raises:
    RuntimeError: there are none.
  """
  durations = [
    event.duration_ns
    for plane in planes
    if plane.name.startswith("/device:GPU")
    for line in plane.lines
    if "Stream" in line.name
    for event in line.events
  ]
  if not durations:
    raise RuntimeError("the trace has no kernel of a GPU")
  return float(sum(durations))


@contextlib.contextmanager
def turn(path: str | os.PathLike | None) -> Iterator[None]:
  """Meanwhile no other process is in a turn with the same file; None is no file at all."""
  if path is None:
    yield
    return
  with pathlib.Path(path).open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield
