"""Whether arrays fit in the host's pinned memory, as the GPU's runtime hands it out.

Its allocator takes memory in regions that double until an array fits, and the last of them
as large as what is left. What an array leaves of its region is of no use to another that is
larger: within 116 GiB, two arrays of 52 take a region of 64 and one of 52.
"""

from collections.abc import Sequence
import itertools
import os

import jax

from sparsejax import errors

# Read by the GPU's runtime when it starts: GiB of pinned memory, and what it takes without.
LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
_USUAL_LIMIT = 64

_GIB = 2**30
_FIRST_REGION = 2**20


def limit() -> int | None:
  """Bytes that the GPU's runtime hands out; None where there is no GPU.

  Raises:
    UserError: the environment has a limit that is no number of GiB.
  """
  if jax.devices()[0].platform != "gpu":
    return None
  given = os.environ.get(LIMIT, str(_USUAL_LIMIT))
  if not given.isdecimal():
    raise errors.UserError(
      f"{LIMIT}={given!r} is no whole number of GiB; set it to one, as 110, before the program "
      "starts."
    )
  return int(given) * _GIB


def fits(sizes: Sequence[int], limit: int) -> bool:
  """Whether arrays of so many bytes, allocated in this order, find room."""
  region, taken, left_over = _FIRST_REGION, 0, []
  for size in sizes:
    reused = min((x for x in left_over if x >= size), default=None)
    if reused is not None:
      left_over.remove(reused)
      left_over.append(reused - size)
      continue
    if size > limit - taken:
      return False
    doubled = region
    while doubled < size:
      doubled *= 2
    own = min(doubled, limit - taken)
    taken += own
    left_over.append(own - size)
    region = doubled if doubled > region else 2 * region
  return True


def check(sizes: Sequence[int], rows: int, limit: int | None) -> None:
  """Checks that a cache's arrays on the host fit.

  Args:
    sizes: bytes of the arrays, in the order in which they are allocated.
    rows: that they have; their sizes grow with it.
    limit: bytes of pinned memory; None where that is not known.

  Raises:
    UserError: they do not; the message says how many rows would, and which limit.
  """
  if limit is None or fits(sizes, limit):
    return
  fit = next(
    (n for n in range(rows - 1, 0, -1) if fits([x * n // rows for x in sizes], limit)), 0
  )
  fewer = f"decode {fit} rows at a time, or shorter ones" if fit else "decode shorter rows"
  enough = next(n for n in itertools.count(sum(sizes) // _GIB) if fits(sizes, n * _GIB))
  found = " and ".join(f"{x / _GIB:.2f}" for x in sizes)
  raise errors.UserError(
    f"a cache of {rows} rows has arrays of {found} GiB in pinned memory of the host, for which "
    f"{limit / _GIB:.0f} GiB have no room: the runtime doubles regions until one fits. To mend "
    f"it, {fewer}, or start the program with {LIMIT}={enough} if the host has as much."
  )
