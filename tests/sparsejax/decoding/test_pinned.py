"""Room in pinned memory, by regions; the sizes are those of runs on an H200."""

import types

import jax
import pytest

from sparsejax import errors
from sparsejax.decoding import pinned

GIB = 2**30


def gib(*numbers):
  return [int(x * GIB) for x in numbers]


@pytest.mark.parametrize(
  ("sizes", "limit", "is_room"),
  [
    # It ran: regions of 1, 64 and what is left of 110.
    (gib(0.66, 42.08, 42.08), 110, True),
    # It did not, though 102.2 is below 110: 64 and 51.1 are not.
    (gib(51.1, 51.1), 110, False),
    (gib(51.1, 51.1), 116, True),
    # What the first leaves of its region of 64 is enough.
    (gib(40, 20), 64, True),
    (gib(20, 40), 64, False),
    (gib(20, 40), 72, True),
    # A region twice that of the first for another as large.
    (gib(30, 30, 30), 128, True),
    (gib(1, 1, 1, 1), 4, True),
    (gib(5), 4, False),
    ([], 1, True),
    (gib(0, 1), 2, True),
  ],
)
def test_arrays_fit_by_regions(sizes, limit, is_room):
  assert pinned.fits(sizes, limit * GIB) == is_room


def test_a_refusal_says_how_many_rows_fit_and_which_limit_is_enough():
  sizes = gib(51.1, 51.1)
  with pytest.raises(errors.UserError) as caught:
    pinned.check(sizes, 34, 110 * GIB)
  said = str(caught.value)
  for part in (
    "34 rows has arrays of 51.10 and 51.10 GiB",
    "110 GiB have no room",
    "decode 30 rows",
    f"{pinned.LIMIT}=116 ",
  ):
    assert part in said
  assert pinned.fits([x * 30 // 34 for x in sizes], 110 * GIB)
  assert not pinned.fits([x * 31 // 34 for x in sizes], 110 * GIB)
  pinned.check(sizes, 34, 116 * GIB)
  pinned.check(sizes, 34, None)
  with pytest.raises(errors.UserError, match="To mend it, decode shorter rows"):
    pinned.check(sizes, 1, 64 * GIB)


def test_a_limit_that_is_no_number_is_refused(monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="gpu")])
  monkeypatch.setenv(pinned.LIMIT, "110.5")
  with pytest.raises(errors.UserError, match=r"LIMIT_GB='110\.5' is no whole number of GiB"):
    pinned.limit()
