"""The plan of resident blocks against a cache in plain Python that keeps the same rules."""

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.attention import slots as plans

STEPS = 200
plan = jax.jit(plans.plan)


def empty(batch, kv_heads, num_slots):
  """Slots that have held something, all of them free."""
  block_BKC = jnp.arange(batch * kv_heads * num_slots).reshape(batch, kv_heads, num_slots)
  return plans.release(plans.Slots(block_BKC, block_BKC), jnp.ones(batch, bool))


class Cache:
  """The slots of one row and head: a dict of what lies where, and a list by last use."""

  def __init__(self, num_slots):
    self.num_slots = num_slots
    self.slot_of = {}
    self.last_wanted = {}
    self.evicted = set()

  def want(self, blocks, step):
    """Returns slots and blocks to load, entry by entry, and the counts of hits and misses."""
    now = {b for b in blocks if b >= 0}
    hits = len(now & self.slot_of.keys())
    slots, loads, seen = [], [], set()
    for block in blocks:
      is_new = block >= 0 and block not in seen
      is_miss = is_new and block not in self.slot_of
      if is_miss:
        self.slot_of[block] = self._make_room(now)
      seen.add(block)
      slots.append(self.slot_of[block] if is_new else -1)
      loads.append(block if is_miss else -1)
    self.last_wanted.update(dict.fromkeys(now, step))
    return slots, loads, hits, len(now) - hits

  def _make_room(self, now):
    free = sorted(set(range(self.num_slots)) - set(self.slot_of.values()))
    if free:
      return free[0]
    idle = [(self.last_wanted[b], s, b) for b, s in self.slot_of.items() if b not in now]
    _, slot, block = min(idle)
    del self.slot_of[block], self.last_wanted[block]
    self.evicted.add(slot)
    return slot

  def contents(self):
    blocks, used = [-1] * self.num_slots, [-1] * self.num_slots
    for block, slot in self.slot_of.items():
      blocks[slot], used[slot] = block, self.last_wanted[block]
    return blocks, used


def random_list(rng, m, num_blocks):
  """Some blocks twice, some entries empty, anywhere in the list, and at times all of them."""
  length = rng.integers(0, m + 1)
  blocks = np.full(m, -1)
  blocks[rng.permutation(m)[:length]] = rng.integers(0, num_blocks, length)
  return blocks


@pytest.mark.parametrize("num_slots", [6, 9], ids=["exact_fit", "room"])
@given(seed=st.integers(0, 2**32 - 1), num_blocks=st.integers(18, 30))
@settings(max_examples=5, deadline=None)
def test_it_is_an_lru_cache(num_slots, seed, num_blocks):
  b, k, m = 2, 2, 6
  rng = np.random.default_rng(seed)
  slots = empty(b, k, num_slots)
  caches = {place: Cache(num_slots) for place in np.ndindex(b, k)}
  for step in range(STEPS):
    wanted = np.stack([random_list(rng, m, num_blocks) for _ in caches])
    wanted = wanted.reshape(b, k, m).astype(np.int32)
    found = jax.device_get(plan(slots, wanted, step))
    for place, cache in caches.items():
      slot, load, hits, misses = cache.want(wanted[place].tolist(), step)
      assert found.slot_BKM[place].tolist() == slot
      assert found.load_BKM[place].tolist() == load
      assert (found.hits_BK[place], found.misses_BK[place]) == (hits, misses)
      blocks, used = cache.contents()
      assert found.slots.block_BKC[place].tolist() == blocks
      assert found.slots.used_BKC[place].tolist() == used
      assert set(wanted[place]) - {-1} <= set(blocks)
    slots = found.slots
  for cache in caches.values():
    assert cache.evicted == set(range(num_slots))


def run(slots, wanted, step):
  """One row and one head."""
  return plan(slots, jnp.asarray(wanted, jnp.int32)[None, None], step)


def test_who_has_waited_longest_goes_and_among_equals_the_lower_slot():
  slots = run(empty(1, 1, 4), [7, 8, 9], 0).slots
  slots = run(slots, [8, -1, -1], 1).slots
  np.testing.assert_array_equal(slots.block_BKC[0, 0], [7, 8, 9, -1])
  np.testing.assert_array_equal(slots.used_BKC[0, 0], [0, 1, 0, -1])
  found = run(slots, [1, 9, 2], 2)
  # The free slot, then slot 0; slot 2, as old, is wanted, and slot 1 is younger.
  np.testing.assert_array_equal(found.slot_BKM[0, 0], [3, 2, 0])
  np.testing.assert_array_equal(found.load_BKM[0, 0], [1, -1, 2])
  np.testing.assert_array_equal(found.slots.block_BKC[0, 0], [2, 8, 9, 1])
  # Slots 0, 2 and 3 are equally old by then.
  found = run(found.slots, [8, 3, 4], 3)
  np.testing.assert_array_equal(found.slot_BKM[0, 0], [1, 0, 2])


def test_a_list_that_repeats_or_has_nothing_moves_nothing():
  slots = run(empty(1, 1, 3), [5, 6, 4], 0).slots
  found = run(slots, [6, 6, -1], 1)
  np.testing.assert_array_equal(found.slot_BKM[0, 0], [1, -1, -1])
  np.testing.assert_array_equal(found.load_BKM, -1)
  assert (found.hits_BK.item(), found.misses_BK.item()) == (1, 0)
  # Any negative number is none, twice the same one too.
  same = run(found.slots, [-7, -7, -1], 2)
  jax.tree.map(np.testing.assert_array_equal, same.slots, found.slots)
  np.testing.assert_array_equal(same.slot_BKM, -1)


def test_released_rows_begin_anew_and_others_go_on():
  wanted = jnp.arange(12, dtype=jnp.int32).reshape(3, 2, 2)
  slots = plan(empty(3, 2, 4), wanted, 0).slots
  slots = plans.release(slots, jnp.array([False, True, False]))
  assert empty(1, 2, 4).block_BKC.dtype == slots.block_BKC.dtype == jnp.int32
  jax.tree.map(lambda x: np.testing.assert_array_equal(x[1], -1), slots)
  found = plan(slots, wanted, 1)
  np.testing.assert_array_equal(found.misses_BK, [[0, 0], [2, 2], [0, 0]])
  np.testing.assert_array_equal(found.hits_BK, [[2, 2], [0, 0], [2, 2]])
  np.testing.assert_array_equal(found.slot_BKM[1], [[0, 1], [0, 1]])


def test_it_is_comparisons_and_sums():
  """What a GPU would do slowly or one after another is not in it."""
  wanted = jax.ShapeDtypeStruct((8, 2, 128), jnp.int32)
  slots = plans.Slots(*(jax.ShapeDtypeStruct((8, 2, 256), jnp.int32) for _ in range(2)))
  text = plan.lower(slots, wanted, 0).as_text()
  for name in ("while", "sort", "gather", "scatter", "f32", "xi64>"):
    assert name not in text, name


def test_wrong_input_is_refused():
  slots = empty(1, 2, 4)
  with pytest.raises(ValueError, match="4 slots have no room for 5 wanted blocks"):
    plan(slots, jnp.zeros((1, 2, 5), jnp.int32), 0)
  with pytest.raises(ValueError, match=r"wanted blocks must be \(1, 2, 'M'\), got \(2, 2, 3\)"):
    plan(slots, jnp.zeros((2, 2, 3), jnp.int32), 0)
