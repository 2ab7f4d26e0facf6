"""Where the time of a program on a GPU goes: its kernels and copies, by the device's trace."""

import collections
from collections.abc import Callable
import dataclasses
import pathlib
import re
import tempfile

import jax


@dataclasses.dataclass(frozen=True)
class KernelTime:
  """All kernels of one name.

  Attributes:
    name: without the numbers that XLA puts behind it.
    microseconds: in a step, of all of them.
    calls: in a step.
  """

  name: str
  microseconds: float
  calls: float


def of_steps(run: Callable[[], None], num_steps: int) -> list[KernelTime]:
  """Traces `run()`, which takes so many steps and waits for them; the longest first.

  Empty where nothing ran on a GPU.
  """
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      run()
    (path,) = pathlib.Path(folder).glob("**/*.xplane.pb")
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    events = [
      (re.sub(r"[._]?\d+$", "", event.name), event.duration_ns)
      for plane in planes
      if plane.name.startswith("/device:GPU")
      for line in plane.lines
      if "Stream" in line.name
      for event in line.events
    ]
  total, calls = collections.Counter(), collections.Counter()
  for name, nanoseconds in events:
    total[name] += nanoseconds
    calls[name] += 1
  return [
    KernelTime(name, nanoseconds / num_steps / 1e3, calls[name] / num_steps)
    for name, nanoseconds in total.most_common()
  ]
