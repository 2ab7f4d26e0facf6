"""Where the pages of a cache lie."""

import dataclasses
import functools
import re

import pytest

from sparsejax import errors
from sparsejax.decoding import cache as caches
from tests import small


@pytest.mark.parametrize(
  ("given", "limit", "where", "num_slots", "reason"),
  [
    (dict(), 10**9, "device", None, "a cache of .* KiB fits there"),
    (dict(), None, "device", None, "a cache of .* KiB; how much fits there is not known"),
    (dict(), 1, "host", 8, r"8 slots of 8 pages .*; a cache of .* does not fit there"),
    (dict(num_slots=5), None, "host", 5, "5 slots of 8 pages are on the device; asked for"),
    (dict(num_slots=10**9), None, "host", 8, "8 slots of 8 pages are on the device; asked for"),
    (dict(offload="always"), None, "host", 8, "asked for"),
    (dict(offload="never"), 1, "device", None, "offload=never"),
    (dict(num_devices=2), 1, "device", None, "the host's memory is of one device"),
  ],
)
def test_pages_go_to_the_host_where_they_do_not_fit(given, limit, where, num_slots, reason):
  transformer = caches.for_decoding(small.make_model())
  room = caches.room(transformer, batch=2, length=64)
  given = dict(offload="auto", num_slots=None, num_devices=1) | given
  found, choice = caches.place(transformer, "sparse", room, limit=limit, **given)
  assert found == dataclasses.replace(room, num_slots=num_slots)
  assert choice[:2] == ("pages", where)
  assert re.search(reason, choice.reason)


def test_slots_beside_what_a_token_reads_are_spare(monkeypatch):
  monkeypatch.setattr(caches, "SPARE_SLOTS", 2)
  transformer = caches.for_decoding(small.make_model())
  room = caches.room(transformer, batch=2, length=64)
  place = functools.partial(
    caches.place, transformer, "sparse", room, limit=None, num_devices=1
  )
  found, _ = place(offload="always", num_slots=None)
  assert found.num_slots == 3 + 2
  with pytest.raises(errors.ConfigError, match="unknown offload 'sometimes'"):
    place(offload="sometimes", num_slots=None)
  with pytest.raises(errors.ConfigError, match="num_slots=4 is of pages in the host's memory"):
    place(offload="never", num_slots=4)


def test_a_cache_that_there_is_no_memory_for_is_refused():
  """Where a device does not say how much it has."""
  transformer = caches.for_decoding(small.make_model())
  room = caches.room(transformer, batch=2, length=2**40)
  with pytest.raises(
    errors.UserError, match=r"no memory for a cache of 2 rows, which takes \d+\.\d\d GiB on"
  ):
    caches.make(caches.spec(transformer, "sparse", room))


@pytest.mark.parametrize(
  ("num_bytes", "text"),
  [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.00 KiB"), (3 * 2**19, "1.50 MiB")],
)
def test_sizes_are_in_units_of_which_there_is_one(num_bytes, text):
  assert caches.in_words(num_bytes) == text
