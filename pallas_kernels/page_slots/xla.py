"""The definition, in comparisons: no sort, gather or loop.

Every question compares small arrays with each other, in one fused reduction on a GPU.
"""

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels.page_slots.problem import Plan, Slots


def plan_slots(slots: Slots, wanted_QM, own_Q, is_new_Q, first_row, step, pages_per_row):
  q, m = wanted_QM.shape
  c = slots.page_RC.shape[1]
  at_hand = Slots(*(lax.dynamic_slice_in_dim(x, first_row, q) for x in slots))
  page_QC, used_QC = at_hand.page_RC, at_hand.used_RC
  is_page_QM = (wanted_QM >= 0) & (wanted_QM < pages_per_row)

  earlier_MM = jnp.tri(m, k=-1, dtype=bool)[None]
  same_QMM = wanted_QM[..., :, None] == wanted_QM[..., None, :]
  is_wanted_QM = is_page_QM & ~(same_QMM & earlier_MM).any(-1)
  held_QMC = is_wanted_QM[..., None] & (wanted_QM[..., None] == page_QC[..., None, :])
  is_hit_QM, is_kept_QC = held_QMC.any(-1), held_QMC.any(-2)
  is_miss_QM = is_wanted_QM & ~is_hit_QM

  # Among slots that nobody wants, how many go before each; among misses, likewise.
  # Free slots are the oldest.
  is_older_QCC = used_QC[..., None, :] < used_QC[..., :, None]
  is_as_old_QCC = used_QC[..., None, :] == used_QC[..., :, None]
  is_lower_CC = jnp.tri(c, k=-1, dtype=bool)[None]
  goes_before_QCC = is_older_QCC | (is_as_old_QCC & is_lower_CC)
  rank_QC = (goes_before_QCC & ~is_kept_QC[..., None, :]).sum(-1, dtype=jnp.int32)
  rank_QM = (earlier_MM & is_miss_QM[..., None, :]).sum(-1, dtype=jnp.int32)

  is_taken_QMC = (rank_QM[..., None] == rank_QC[..., None, :]) & is_miss_QM[..., None]
  is_placed_QMC = held_QMC | (is_taken_QMC & ~is_kept_QC[..., None, :])
  # At most one slot of each page, at most one page of each slot.
  number_C = jnp.arange(c, dtype=jnp.int32)[None, None]
  slot_QM = jnp.where(is_placed_QMC, number_C, -1).max(-1, initial=-1)
  placed_QC = jnp.where(is_placed_QMC, wanted_QM[..., None], -1).max(-2, initial=-1)
  is_used_QC = placed_QC >= 0

  is_own_QM = wanted_QM == own_Q[:, None]
  is_load_QM = is_miss_QM & ~(is_own_QM & is_new_Q[:, None])
  after = Slots(
    page_RC=jnp.where(is_used_QC, placed_QC, page_QC),
    used_RC=jnp.where(is_used_QC, step, used_QC),
    hits_R=at_hand.hits_R + is_hit_QM.sum(-1, dtype=jnp.int32),
    misses_R=at_hand.misses_R + is_load_QM.sum(-1, dtype=jnp.int32),
  )
  row_Q1 = first_row + jnp.arange(q, dtype=jnp.int32)[:, None]
  slot_QM = jnp.where(slot_QM < 0, -1, row_Q1 * c + slot_QM)
  return Plan(
    slots=jax.tree.map(
      lambda x, new: lax.dynamic_update_slice_in_dim(x, new, first_row, 0), slots, after
    ),
    slot_QM=slot_QM,
    load_QM=jnp.where(is_load_QM, row_Q1 * pages_per_row + wanted_QM, -1),
    own_Q=jnp.where(is_own_QM, slot_QM, -1).max(-1, initial=-1),
  )
