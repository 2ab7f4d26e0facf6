"""The plan of slots against a cache in plain Python that keeps the same rules."""

import functools
import re

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.page_slots import mosaic_gpu, xla

STEPS = 200
# Rows before and behind those at hand: other layers' of the same cache.
BEFORE, BEHIND = 3, 2


@functools.cache
def planning(implementation):
  plan = functools.partial(pallas_kernels.plan_slots, implementation=implementation)
  return jax.jit(plan, static_argnames="pages_per_row", donate_argnums=0)


def empty(num_rows, num_slots):
  """Slots that have held something, all of them free; nothing is counted yet."""
  x_RC = jnp.arange(num_rows * num_slots, dtype=jnp.int32).reshape(num_rows, num_slots)
  counts = (jnp.zeros(num_rows, jnp.int32) for _ in range(2))
  slots = pallas_kernels.Slots(x_RC, x_RC + 1, *counts)
  return pallas_kernels.release_slots(slots, jnp.ones(num_rows, bool))


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


def along_rows(row, per_row, numbers):
  return [number if number < 0 else row * per_row + number for number in numbers]


def check_it_is_an_lru_cache(plan, rng, *, q, m, num_slots, num_pages, num_steps):
  """Compares everything that a plan says, step by step, with `Cache`."""
  num_rows = BEFORE + q + BEHIND
  slots, caches = empty(num_rows, num_slots), [Cache(num_slots) for _ in range(q)]
  hits, misses = np.zeros(num_rows, int), np.zeros(num_rows, int)
  for step in range(num_steps):
    wanted = np.stack([random_list(rng, m, num_pages) for _ in caches]).astype(np.int32)
    # Pages that there are not: none, like -1.
    wanted = np.where(rng.random(wanted.shape) < 0.1, num_pages + 5, wanted)
    own, is_new = rng.integers(0, num_pages, q, dtype=np.int32), rng.random(q) < 0.5
    found = plan(
      slots, wanted, own, is_new, first_row=BEFORE, step=step, pages_per_row=num_pages
    )
    slots = found.slots
    found = jax.device_get(found)
    for place, cache in enumerate(caches):
      row = BEFORE + place
      listed = np.where(wanted[place] < num_pages, wanted[place], -1).tolist()
      slot, load, hit, missed = cache.want(listed, step)
      is_unloaded = is_new[place] and own[place] in load
      load = [-1 if is_new[place] and page == own[place] else page for page in load]
      at_own = [
        x for x, page in zip(slot, listed, strict=True) if page == own[place] and x >= 0
      ]
      hits[row] += hit
      misses[row] += missed - is_unloaded
      assert found.slot_QM[place].tolist() == [
        x if x < 0 else row * num_slots + x for x in slot
      ]
      assert found.load_QM[place].tolist() == [
        x if x < 0 else row * num_pages + x for x in load
      ]
      assert found.own_Q[place] == (row * num_slots + at_own[0] if at_own else -1)
      blocks, used = cache.contents()
      assert found.slots.page_RC[row].tolist() == blocks
      assert found.slots.used_RC[row].tolist() == used
    np.testing.assert_array_equal(found.slots.hits_R, hits)
    np.testing.assert_array_equal(found.slots.misses_R, misses)
    for others in (slice(BEFORE), slice(BEFORE + q, None)):
      np.testing.assert_array_equal(found.slots.page_RC[others], -1)
      np.testing.assert_array_equal(found.slots.used_RC[others], -1)
  return caches


@pytest.mark.parametrize("num_slots", [6, 9], ids=["exact_fit", "room"])
@given(seed=st.integers(0, 2**32 - 1), num_pages=st.integers(18, 30))
@settings(max_examples=5, deadline=None)
def test_it_is_an_lru_cache(num_slots, seed, num_pages):
  caches = check_it_is_an_lru_cache(
    planning("xla"),
    np.random.default_rng(seed),
    q=4,
    m=6,
    num_slots=num_slots,
    num_pages=num_pages,
    num_steps=STEPS,
  )
  for cache in caches:
    assert cache.evicted == set(range(num_slots))


# Lists and slots of NOSA, of InfLLM-V2 with more, of one number, beyond a thread's one.
SIZES = [(64, 80), (96, 112), (7, 9), (1, 1), (130, 300), (512, 512)]


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "num_slots"), SIZES)
def test_on_a_gpu_the_kernel_is_an_lru_cache(m, num_slots):
  rng = np.random.default_rng(m)
  num_pages, num_steps = 3 * num_slots + 5, 60 if m < 512 else 6
  check_it_is_an_lru_cache(
    planning("mosaic_gpu"),
    rng,
    q=36,
    m=m,
    num_slots=num_slots,
    num_pages=num_pages,
    num_steps=num_steps,
  )


@pytest.mark.parametrize(("m", "num_slots"), SIZES)
def test_what_is_promised_is_lowered_for_cuda_in_place(m, num_slots):
  q, num_rows = 36, 32 * 36
  x_RC = jnp.zeros((num_rows, num_slots), jnp.int32)
  x_R, x_Q = jnp.zeros(num_rows, jnp.int32), jnp.zeros(q, jnp.int32)
  assert mosaic_gpu.why_not(num_slots) is None
  plan = functools.partial(mosaic_gpu.plan_slots, pages_per_row=1027)
  lowered = export.export(
    jax.jit(plan, donate_argnums=0),
    platforms=["cuda"],
    disabled_checks=[export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
  )(
    pallas_kernels.Slots(x_RC, x_RC, x_R, x_R),
    jnp.zeros((q, m), jnp.int32),
    x_Q,
    x_Q > 0,
    jnp.int32(4),
    jnp.int32(5),
  )
  text = lowered.mlir_module()
  assert text.count("custom_call @mosaic_gpu_v2") == 1
  main = text[text.index("@main") :]
  assert len(re.findall(r"tf.aliasing_output", main)) == 4
  aliases = re.findall(r"output_tuple_indices = \[(\d)\], operand_index = (\d)", main)
  assert [int(output) for output, _ in aliases] == sorted(int(x) for x, _ in aliases)
  assert len(aliases) == 4


def test_as_many_slots_as_threads_compare_with_are_taken():
  assert "at most 512 slots of a row, not 513" in mosaic_gpu.why_not(513)


def run(slots, wanted, step):
  """One row, with pages that all have begun."""
  none_Q = jnp.array([-1])
  return planning("xla")(
    jax.tree.map(jnp.copy, slots),
    jnp.asarray(wanted, jnp.int32)[None],
    none_Q,
    none_Q > 0,
    first_row=0,
    step=step,
    pages_per_row=100,
  )


def test_who_has_waited_longest_goes_and_among_equals_the_lower_slot():
  slots = run(empty(1, 4), [7, 8, 9], 0).slots
  slots = run(slots, [8, -1, -1], 1).slots
  np.testing.assert_array_equal(slots.page_RC[0], [7, 8, 9, -1])
  np.testing.assert_array_equal(slots.used_RC[0], [0, 1, 0, -1])
  found = run(slots, [1, 9, 2], 2)
  # The free slot, then slot 0; slot 2, as old, is wanted, and slot 1 is younger.
  np.testing.assert_array_equal(found.slot_QM[0], [3, 2, 0])
  np.testing.assert_array_equal(found.load_QM[0], [1, -1, 2])
  np.testing.assert_array_equal(found.slots.page_RC[0], [2, 8, 9, 1])
  # Slots 0, 2 and 3 are equally old by then.
  found = run(found.slots, [8, 3, 4], 3)
  np.testing.assert_array_equal(found.slot_QM[0], [1, 0, 2])


def test_a_list_that_repeats_or_has_nothing_moves_nothing():
  slots = run(empty(1, 3), [5, 6, 4], 0).slots
  found = run(slots, [6, 6, -1], 1)
  np.testing.assert_array_equal(found.slot_QM[0], [1, -1, -1])
  np.testing.assert_array_equal(found.load_QM, -1)
  assert (found.slots.hits_R.item(), found.slots.misses_R.item()) == (1, 3)
  # Any negative number is none, twice the same one too.
  same = run(found.slots, [-7, -7, -1], 2)
  jax.tree.map(np.testing.assert_array_equal, same.slots, found.slots)
  np.testing.assert_array_equal(same.slot_QM, -1)


def test_released_rows_begin_anew_and_others_go_on():
  slots = run(empty(1, 4), [5, 6], 0).slots
  both = jax.tree.map(lambda x: jnp.concatenate([x, x]), slots)
  after = pallas_kernels.release_slots(both, jnp.array([False, True]))
  np.testing.assert_array_equal(after.page_RC, [[5, 6, -1, -1], [-1] * 4])
  np.testing.assert_array_equal(after.used_RC, [[0, 0, -1, -1], [-1] * 4])
  np.testing.assert_array_equal(after.misses_R, [2, 2])
  assert {x.dtype for x in after} == {jnp.dtype(jnp.int32)}


def test_the_definition_is_comparisons_and_sums():
  """What a GPU would do slowly or one after another is not in it."""
  x_RC, x_R = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((32, 256), (32,)))
  wanted = jax.ShapeDtypeStruct((16, 128), jnp.int32)
  own, is_new = (jax.ShapeDtypeStruct((16,), dtype) for dtype in (jnp.int32, bool))
  plan = jax.jit(functools.partial(xla.plan_slots, step=7, first_row=3, pages_per_row=999))
  text = plan.lower(pallas_kernels.Slots(x_RC, x_RC, x_R, x_R), wanted, own, is_new).as_text()
  for name in ("while", "sort", "gather", "scatter", "f32", "xi64>"):
    assert name not in text, name


def test_wrong_input_is_refused():
  def plan(wanted, own):
    is_new = jnp.zeros(own.shape, bool)
    pallas_kernels.plan_slots(
      empty(2, 4), wanted, own, is_new, first_row=0, step=0, pages_per_row=9
    )

  with pytest.raises(ValueError, match="4 slots have no room for 5 wanted pages"):
    plan(jnp.zeros((1, 5), jnp.int32), jnp.zeros(1, jnp.int32))
  with pytest.raises(ValueError, match="3 rows want pages, but 2 have slots"):
    plan(jnp.zeros((3, 4), jnp.int32), jnp.zeros(3, jnp.int32))
  with pytest.raises(ValueError, match="2 rows want pages, 1 have one"):
    plan(jnp.zeros((2, 4), jnp.int32), jnp.zeros(1, jnp.int32))
