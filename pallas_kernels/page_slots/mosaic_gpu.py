"""The Hopper kernel: a warpgroup plans a row at hand, where its slots are.

It is the definition's comparisons (see `xla`), in the same four questions; a thread has a
wanted page and a slot, and goes through what it compares them with in shared memory, four
numbers at a load. As XLA's operations they are some twenty kernels, each of which takes longer
to begin than to compute.
"""

import dataclasses

import jax
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_kernels import in_place
from pallas_kernels import mosaic_thread as thread
from pallas_kernels.page_slots.problem import Plan, Slots

# Every thread compares with all slots: work that grows with the square of their number.
MOST_SLOTS = 512

_THREADS = 128
_AT_A_LOAD = 4
_PLAIN = plgpu.RefType()
_SCALAR = plgpu.Layout.WG_SPLAT

# In place of the slot of a wanted page: there is no page, or it is in none.
_NONE, _MISS = -1, -2
# In place of ranks; no miss has the rank of a slot that is kept.
_NO_MISS, _KEPT = -1, -2
# After any step: slots that are kept, and what is no slot.
_LATEST = 2**31 - 1


def why_not(num_slots: int) -> str | None:
  """Why the kernel cannot take so many slots; None if it can."""
  if num_slots > MOST_SLOTS:
    return f"takes at most {MOST_SLOTS} slots of a row, not {num_slots}"
  return None


def plan_slots(slots: Slots, wanted_QM, own_Q, is_new_Q, first_row, step, pages_per_row):
  """See `api.plan_slots`."""
  q, m = wanted_QM.shape
  numbers_3 = jnp.stack([first_row, step, jnp.int32(pages_per_row)])
  *after, slot_QM, load_QM, own_Q = in_place.replace(
    _plan,
    slots,
    wanted_QM,
    own_Q,
    is_new_Q.astype(jnp.int32),
    numbers_3,
    made=tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((q, m), (q, m), (q,))),
  )
  return Plan(Slots(*after), slot_QM, load_QM, own_Q)


def _plan(slots, wanted_QM, own_Q, is_new_Q, numbers_3):
  (q, m), c = wanted_QM.shape, slots[0].shape[1]

  def body(*refs):
    @plgpu.inline_mgpu(arg_types=(_PLAIN,) * len(refs) + (_SCALAR,), return_type=None)
    def run(context, *args):
      del context
      _Row(m, c, thread.value(args[-1]), *args[:-1]).run()

    run(*refs, jnp.int32(lax.axis_index("row")))

  # Pallas aliases an output with what a reference holds: slots that keep their content.
  slot_refs = [jax.new_ref(x) for x in slots]
  made = plgpu.kernel(
    body,
    out_type=[jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((q, m), (q, m), (q,))],
    grid=(q,),
    grid_names=("row",),
    kernel_name="plan_slots",
    scratch_types=[plgpu.SMEM((_Places(m, c).size,), jnp.int32)],
  )(wanted_QM, own_Q, is_new_Q, numbers_3, *slot_refs)
  return *(jax.freeze(ref) for ref in slot_refs), *made


@dataclasses.dataclass(frozen=True)
class _Places:
  """Where in shared memory lists of numbers begin, each in whole loads.

  Attributes:
    num_wanted, num_slots: M and C.
  """

  num_wanted: int
  num_slots: int

  @property
  def wanted_room(self) -> int:
    return -(-self.num_wanted // _AT_A_LOAD) * _AT_A_LOAD

  @property
  def slots_room(self) -> int:
    return -(-self.num_slots // _AT_A_LOAD) * _AT_A_LOAD

  # Of wanted pages: which, in which slot so far, and which of the misses.

  @property
  def wanted(self) -> int:
    return 0

  @property
  def place(self) -> int:
    return self.wanted_room

  @property
  def miss(self) -> int:
    return 2 * self.wanted_room

  # Of slots: what is in them, since when, and how many go before.

  @property
  def page(self) -> int:
    return 3 * self.wanted_room

  @property
  def age(self) -> int:
    return self.page + self.slots_room

  @property
  def rank(self) -> int:
    return self.page + 2 * self.slots_room

  # Of the row.

  @property
  def hits(self) -> int:
    return self.page + 3 * self.slots_room

  @property
  def misses(self) -> int:
    return self.hits + 1

  @property
  def own(self) -> int:
    return self.hits + 2

  @property
  def size(self) -> int:
    return self.hits + 3


@dataclasses.dataclass(frozen=True)
class _Row:
  """A warpgroup at work on a row.

  Attributes:
    num_wanted, num_slots: M and C.
    number: of the row among those at hand.
    wanted, own, is_new, numbers: what is read of device memory.
    page, used, hits, misses: slots, which are there and change.
    slot, load, own_slot: what is written besides.
    shared: numbers in shared memory.
  """

  num_wanted: int
  num_slots: int
  number: object
  wanted: object
  own: object
  is_new: object
  numbers: object
  page: object
  used: object
  hits: object
  misses: object
  slot: object
  load: object
  own_slot: object
  shared: object

  def run(self) -> None:
    places = self._places
    with mgpu_utils.when(thread.is_equal(mgpu_utils.thread_idx(), thread.i32(0))):
      self._put(thread.i32(places.hits), thread.i32(0))
      self._put(thread.i32(places.misses), thread.i32(0))
      self._put(thread.i32(places.own), thread.i32(-1))
    self._for_each(places.wanted_room, self._bring_wanted)
    self._for_each(places.slots_room, self._bring_slot)
    thread.warpgroup_barrier()
    self._for_each(places.wanted_room, self._look_up)
    self._for_each(places.slots_room, self._keep)
    thread.warpgroup_barrier()
    self._for_each(places.wanted_room, self._count_misses)
    self._for_each(places.slots_room, self._count_older)
    thread.warpgroup_barrier()
    self._for_each(self.num_wanted, self._give)
    self._for_each(self.num_slots, self._take)
    thread.warpgroup_barrier()
    with mgpu_utils.when(thread.is_equal(mgpu_utils.thread_idx(), thread.i32(0))):
      thread.store_global(self.own_slot, self.number, self._get(thread.i32(places.own)))
      for total, more in ((self.hits, places.hits), (self.misses, places.misses)):
        so_far = _load_global(total, self._row)
        more = self._get(thread.i32(more))
        thread.store_global(total, self._row, thread.add(so_far, more))

  # What is at hand.

  @property
  def _places(self) -> _Places:
    return _Places(self.num_wanted, self.num_slots)

  @property
  def _row(self):
    return thread.add(thread.load_global(self.numbers, thread.i32(0)), self.number)

  @property
  def _step(self):
    return thread.load_global(self.numbers, thread.i32(1))

  @property
  def _pages_per_row(self):
    return thread.load_global(self.numbers, thread.i32(2))

  # Steps, each for one wanted page or slot i.

  def _bring_wanted(self, i) -> None:
    is_there = thread.is_less(i, thread.i32(self.num_wanted))
    at = thread.add(thread.multiply(self.number, self.num_wanted), _or_zero(is_there, i))
    page = thread.load_global(self.wanted, at)
    is_page = thread.is_between(page, thread.i32(0), self._pages_per_row)
    page = arith.select(arith.andi(is_there, is_page), page, thread.i32(-1))
    self._put(thread.add(thread.i32(self._places.wanted), i), page)

  def _bring_slot(self, i) -> None:
    is_there = thread.is_less(i, thread.i32(self.num_slots))
    at = thread.add(thread.multiply(self._row, self.num_slots), _or_zero(is_there, i))
    page, used = _load_global(self.page, at), _load_global(self.used, at)
    page = arith.select(is_there, page, thread.i32(-1))
    used = arith.select(is_there, used, thread.i32(_LATEST))
    self._put(thread.add(thread.i32(self._places.page), i), page)
    self._put(thread.add(thread.i32(self._places.age), i), used)

  def _look_up(self, i) -> None:
    """Finds the slot of a wanted page; the first of equal ones counts."""
    places = self._places
    page = self._get(thread.add(thread.i32(places.wanted), i))

    def repeats(j, other, so_far):
      is_same = arith.andi(thread.is_equal(other, page), thread.is_less(j, i))
      return arith.ori(so_far, arith.extui(thread.int32(), is_same))

    def find(j, other, so_far):
      return arith.select(thread.is_equal(other, page), j, so_far)

    is_repeat = self._through(places.wanted, places.wanted_room, repeats, thread.i32(0))
    slot = self._through(places.page, places.slots_room, find, thread.i32(_MISS))
    is_none = thread.is_less(page, thread.i32(0))
    is_none = arith.ori(is_none, thread.is_equal(is_repeat, thread.i32(1)))
    slot = arith.select(is_none, thread.i32(_NONE), slot)
    self._put(thread.add(thread.i32(places.place), i), slot)
    self._count(places.hits, thread.is_less(thread.i32(-1), slot))

  def _keep(self, i) -> None:
    """Makes slots whose page is wanted the last to go."""
    places = self._places
    page = self._get(thread.add(thread.i32(places.page), i))

    def is_wanted(j, other, so_far):
      del j
      return arith.ori(so_far, arith.extui(thread.int32(), thread.is_equal(other, page)))

    found = self._through(places.wanted, places.wanted_room, is_wanted, thread.i32(0))
    is_kept = thread.is_equal(found, thread.i32(1))
    is_kept = arith.andi(is_kept, thread.is_less(thread.i32(-1), page))
    self._put(thread.add(thread.i32(places.age), i), thread.i32(_LATEST), is_kept)

  def _count_misses(self, i) -> None:
    places = self._places

    def count(j, place, so_far):
      is_before = thread.is_equal(place, thread.i32(_MISS))
      is_before = arith.andi(is_before, thread.is_less(j, i))
      return thread.add(so_far, arith.extui(thread.int32(), is_before))

    rank = self._through(places.place, places.wanted_room, count, thread.i32(0))
    place = self._get(thread.add(thread.i32(places.place), i))
    is_miss = thread.is_equal(place, thread.i32(_MISS))
    rank = arith.select(is_miss, rank, thread.i32(_NO_MISS))
    self._put(thread.add(thread.i32(places.miss), i), rank)

  def _count_older(self, i) -> None:
    """Of slots that are not kept, how many go before this one; none gets a kept one."""
    places = self._places
    age = self._get(thread.add(thread.i32(places.age), i))

    def count(j, other, so_far):
      is_first = arith.andi(thread.is_equal(other, age), thread.is_less(j, i))
      is_first = arith.ori(is_first, thread.is_less(other, age))
      return thread.add(so_far, arith.extui(thread.int32(), is_first))

    rank = self._through(places.age, places.slots_room, count, thread.i32(0))
    rank = arith.select(self._is_kept(age), thread.i32(_KEPT), rank)
    self._put(thread.add(thread.i32(places.rank), i), rank)

  def _give(self, i) -> None:
    """Writes a wanted page's slot, and whether to load it."""
    places = self._places
    page = self._get(thread.add(thread.i32(places.wanted), i))
    place = self._get(thread.add(thread.i32(places.place), i))
    miss = self._get(thread.add(thread.i32(places.miss), i))

    def find(j, rank, so_far):
      return arith.select(thread.is_equal(rank, miss), j, so_far)

    given = self._through(places.rank, places.slots_room, find, place)
    row = self._row
    slot = thread.add(thread.multiply(row, self.num_slots), given)
    slot = arith.select(thread.is_less(given, thread.i32(0)), thread.i32(-1), slot)
    index = thread.add(thread.multiply(self.number, self.num_wanted), i)
    thread.store_global(self.slot, index, slot)

    own_page = thread.load_global(self.own, self.number)
    is_new_page = thread.load_global(self.is_new, self.number)
    is_held = thread.is_less(thread.i32(-1), slot)
    with mgpu_utils.when(arith.andi(thread.is_equal(page, own_page), is_held)):
      self._put(thread.i32(places.own), slot)
    is_miss = thread.is_equal(place, thread.i32(_MISS))
    has_begun = thread.is_equal(is_new_page, thread.i32(0))
    is_other = arith.cmpi(arith.CmpIPredicate.ne, page, own_page)
    is_load = arith.andi(is_miss, arith.ori(has_begun, is_other))
    load = thread.add(arith.muli(row, self._pages_per_row), page)
    load = arith.select(is_load, load, thread.i32(-1))
    thread.store_global(self.load, index, load)
    self._count(places.misses, is_load)

  def _take(self, i) -> None:
    """Writes what a slot holds from now on."""
    places = self._places
    age = self._get(thread.add(thread.i32(places.age), i))
    rank = self._get(thread.add(thread.i32(places.rank), i))

    def find(j, miss, so_far):
      return arith.select(thread.is_equal(miss, rank), j, so_far)

    taken_by = self._through(places.miss, places.wanted_room, find, thread.i32(-1))
    is_taken = thread.is_less(thread.i32(-1), taken_by)
    at = thread.add(thread.multiply(self._row, self.num_slots), i)
    with mgpu_utils.when(is_taken):
      page = self._get(thread.add(thread.i32(places.wanted), taken_by))
      thread.store_global(self.page, at, page)
    with mgpu_utils.when(arith.ori(is_taken, self._is_kept(age))):
      thread.store_global(self.used, at, self._step)

  # Parts of steps.

  def _is_kept(self, age):
    return thread.is_equal(age, thread.i32(_LATEST))

  def _for_each(self, count: int, body) -> None:
    """Calls `body(i)` for i below `count`, every 128th in the same thread."""
    for first in range(0, count, _THREADS):
      i = thread.add(mgpu_utils.thread_idx(), thread.i32(first))
      with mgpu_utils.when(thread.is_less(i, thread.i32(count))):
        body(i)

  def _through(self, begin: int, count: int, body, start):
    """Carries `start` through `body(j, number, carry)` for numbers of shared memory."""

    def load(n, carry):
      j = thread.multiply(n, _AT_A_LOAD)
      address = self._address(thread.add(j, thread.i32(begin)))
      loaded = mgpu_utils.inline_ptx(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
        address,
        result_types=[thread.int32()] * _AT_A_LOAD,
        has_side_effects=True,
      )
      for place, number in enumerate(loaded):
        carry = body(thread.add(j, thread.i32(place)), number, carry)
      return carry

    return thread.loop(count // _AT_A_LOAD, load, start)

  def _count(self, place: int, is_one) -> None:
    with mgpu_utils.when(is_one):
      address = self._address(thread.i32(place))
      ptx = "red.shared.add.s32 [$0], $1;"
      mgpu_utils.inline_ptx(ptx, address, thread.i32(1), has_side_effects=True)

  def _address(self, index):
    return thread.add(thread.smem_address(self.shared), thread.multiply(index, 4))

  def _get(self, index):
    return thread.load_shared(self._address(index))

  def _put(self, index, x, predicate=None) -> None:
    thread.store_shared(self._address(index), x, predicate)


def _or_zero(is_there, i):
  return arith.select(is_there, i, thread.i32(0))


def _load_global(ref, index):
  """An int32 of device memory that this kernel writes later."""
  return mgpu_utils.inline_ptx(
    "ld.global.b32 $0, [$1];",
    thread.global_address(ref, index),
    result_types=thread.int32(),
    has_side_effects=True,
  )
