"""Which resident slot holds which block of keys while decoding: a cache with exact LRU order.

Integers alone, and no sort, gather or loop: every question is a comparison of small arrays,
each of them one fused reduction on a GPU.

Shape letters: `B` batch, `K` key/value heads, `M` blocks wanted, `C` slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Slots(NamedTuple):
  """What is resident; every row and head has slots of its own.

  Attributes:
    block_BKC: int32, the block in each slot; -1 where it is free. No block is in two.
    used_BKC: int32, the step at which that block was last wanted; -1 where it is free.
  """

  block_BKC: jax.Array
  used_BKC: jax.Array


class Plan(NamedTuple):
  """What one step does.

  Attributes:
    slot_BKM: int32, the slot of every wanted block; -1 where the list has no block or one
      that it had before.
    load_BKM: int32, the block to load into that slot; -1 where nothing has to be loaded.
    slots: what is resident afterwards.
    hits_BK: int32, different blocks that were resident.
    misses_BK: int32, different blocks that were not: those to load.
  """

  slot_BKM: jax.Array
  load_BKM: jax.Array
  slots: Slots
  hits_BK: jax.Array
  misses_BK: jax.Array


def plan(slots: Slots, wanted_BKM: jax.Array, step: int | jax.Array) -> Plan:
  """Finds a slot for every wanted block.

  Resident blocks keep their slots. The others, in the order of the list, take free slots,
  then those whose blocks were wanted the longest ago; among equals the lower slot. A block
  that is wanted now is never driven out.

  Args:
    slots: what is resident.
    wanted_BKM: int32, different blocks or not, in any order; negative is none.
    step: int32, at least 0, and larger at every call: the time that `used_BKC` tells.

  Raises:
    ValueError: fewer slots than blocks may be wanted, or other rows or heads.
  """
  _check(slots, wanted_BKM)
  block_BKC, used_BKC = slots
  m, c = wanted_BKM.shape[-1], block_BKC.shape[-1]

  earlier_MM = jnp.tri(m, k=-1, dtype=bool)[None, None]
  same_BKMM = wanted_BKM[..., :, None] == wanted_BKM[..., None, :]
  is_wanted_BKM = (wanted_BKM >= 0) & ~(same_BKMM & earlier_MM).any(-1)
  held_BKMC = is_wanted_BKM[..., None] & (wanted_BKM[..., None] == block_BKC[..., None, :])
  is_hit_BKM, is_kept_BKC = held_BKMC.any(-1), held_BKMC.any(-2)
  is_miss_BKM = is_wanted_BKM & ~is_hit_BKM

  # Among slots that nobody wants, how many go before each; among misses, likewise.
  # Free slots are the oldest.
  is_older_BKCC = used_BKC[..., None, :] < used_BKC[..., :, None]
  is_as_old_BKCC = used_BKC[..., None, :] == used_BKC[..., :, None]
  is_lower_CC = jnp.tri(c, k=-1, dtype=bool)[None, None]
  goes_before_BKCC = is_older_BKCC | (is_as_old_BKCC & is_lower_CC)
  rank_BKC = (goes_before_BKCC & ~is_kept_BKC[..., None, :]).sum(-1, dtype=jnp.int32)
  rank_BKM = (earlier_MM & is_miss_BKM[..., None, :]).sum(-1, dtype=jnp.int32)

  is_taken_BKMC = (rank_BKM[..., None] == rank_BKC[..., None, :]) & is_miss_BKM[..., None]
  is_placed_BKMC = held_BKMC | (is_taken_BKMC & ~is_kept_BKC[..., None, :])
  # At most one slot of each block, at most one block of each slot.
  number_C = jnp.arange(c, dtype=jnp.int32)[None, None, None]
  slot_BKM = jnp.where(is_placed_BKMC, number_C, -1).max(-1, initial=-1)
  placed_BKC = jnp.where(is_placed_BKMC, wanted_BKM[..., None], -1).max(-2, initial=-1)
  is_used_BKC = placed_BKC >= 0
  return Plan(
    slot_BKM=slot_BKM,
    load_BKM=jnp.where(is_miss_BKM, wanted_BKM, -1),
    slots=Slots(
      jnp.where(is_used_BKC, placed_BKC, block_BKC),
      jnp.where(is_used_BKC, jnp.int32(step), used_BKC),
    ),
    hits_BK=is_hit_BKM.sum(-1, dtype=jnp.int32),
    misses_BK=is_miss_BKM.sum(-1, dtype=jnp.int32),
  )


def release(slots: Slots, rows_B: jax.Array) -> Slots:
  """Returns the slots with those of some rows free, for sequences that begin anew.

  Args:
    slots: what is resident.
    rows_B: bool, the rows to forget.
  """
  is_free_B11 = rows_B[:, None, None]
  return Slots(*(jnp.where(is_free_B11, -1, x_BKC) for x_BKC in slots))


def _check(slots: Slots, wanted_BKM) -> None:
  *rows, c = slots.block_BKC.shape
  *wanted_rows, m = wanted_BKM.shape
  if wanted_rows != rows:
    raise ValueError(f"wanted blocks must be {(*rows, 'M')}, got {wanted_BKM.shape}")
  if c < m:
    raise ValueError(f"{c} slots have no room for {m} wanted blocks; have at least as many")
