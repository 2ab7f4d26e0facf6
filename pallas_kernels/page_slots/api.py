"""The contract of `plan_slots`: checks, and the choice of what runs."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels import devices, dispatch
from pallas_kernels.dispatch import Shaped
from pallas_kernels.page_slots import mosaic_gpu, xla
from pallas_kernels.page_slots.problem import Plan, Slots

type SlotsImplementation = Literal["auto", "strict", "mosaic_gpu", "xla"]

# What `auto` tries, in this order.
AUTOMATIC = ("mosaic_gpu", "xla")


def plan_slots(
  slots: Slots,
  wanted_QM: Int[Array, "Q M"],
  own_Q: Int[Array, "_"],
  is_new_Q: Bool[Array, "_"],
  *,
  first_row: int | Int[Array, ""],
  step: int | Int[Array, ""],
  pages_per_row: int,
  implementation: SlotsImplementation | None = None,
) -> Plan:
  """Finds a slot for every page that some rows want.

  Resident pages keep their slots. The others, in the order of the list, take free slots, then
  those whose pages were wanted the longest ago; among equals the lower slot. A page that is
  wanted now is never driven out. The caller donates the slots to have them updated in place.

  Args:
    slots: what is resident, of all rows.
    wanted_QM: pages of the rows at hand, different ones or not, in any order; a number below 0
      or from `pages_per_row` on is none.
    own_Q: the page that each row adds to.
    is_new_Q: whether that page begins now: it is given a slot, but there is nothing to load.
    first_row: the rows at hand are the Q from this one on.
    step: at least 0, and larger at every call: the time that `used_RC` tells.
    pages_per_row: pages that a row can have.
    implementation: `xla` runs anywhere. `mosaic_gpu` is one kernel on Hopper GPUs that works
      on the rows at hand where they are; over a mesh, in `jax.shard_map(...,
      check_vma=False)` alone. None and `auto` take the kernel where it can run, else `xla`;
      `strict` is the kernel or an error.

  Raises:
    ValueError: fewer slots than pages may be wanted, arrays that do not fit together, or an
      implementation that cannot run here.
    KeyError: no such implementation.
  """
  backend = choose_plan_slots(slots, wanted_QM, implementation=implementation).backend
  if own_Q.shape != wanted_QM.shape[:1] or is_new_Q.shape != own_Q.shape:
    raise ValueError(f"{wanted_QM.shape[0]} rows want pages, {own_Q.shape[0]} have one")
  first_row, step = (jnp.asarray(x, jnp.int32) for x in (first_row, step))
  return _IMPLEMENTATIONS[backend](
    slots, wanted_QM, own_Q, is_new_Q, first_row, step, pages_per_row
  )


def choose_plan_slots(
  slots: Slots,
  wanted_QM: Int[Shaped, "Q M"],
  *,
  implementation: SlotsImplementation | None = None,
) -> dispatch.Choice:
  """What `plan_slots` runs for such arrays on the first device, and why.

  Takes a `jax.ShapeDtypeStruct` for an array, raises the same errors, and runs nothing.
  """
  (r, c), (q, m) = slots.page_RC.shape, wanted_QM.shape
  if c < m:
    raise ValueError(f"{c} slots have no room for {m} wanted pages; have at least as many")
  if q > r:
    raise ValueError(f"{q} rows want pages, but {r} have slots")
  candidates = {
    "mosaic_gpu": lambda: (
      devices.why_not_hopper()
      or devices.why_not_divided((slots, wanted_QM))
      or mosaic_gpu.why_not(c)
    ),
    "xla": dispatch.runs_anywhere,
  }
  return dispatch.choose("plan_slots", implementation, candidates, automatic=AUTOMATIC)


def release_slots(slots: Slots, is_free_R: Bool[Array, "R"]) -> Slots:
  """Returns the slots with those of some rows free, for sequences that begin anew."""
  page_RC, used_RC = (
    jnp.where(is_free_R[:, None], -1, x_RC) for x_RC in (slots.page_RC, slots.used_RC)
  )
  return slots._replace(page_RC=page_RC, used_RC=used_RC)


_IMPLEMENTATIONS = {"mosaic_gpu": mosaic_gpu.plan_slots, "xla": xla.plan_slots}
