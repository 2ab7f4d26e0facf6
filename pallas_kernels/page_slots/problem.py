"""What slots hold, and what a step does to them.

Shape letters, used in every file of this folder:
  R rows that have slots (layers x sequences x key heads)   Q those of them at hand
  C slots of a row   M pages wanted
"""

from typing import NamedTuple

import jax
from jaxtyping import Array, Int


class Slots(NamedTuple):
  """What is resident; every row has slots of its own, with its own numbers of pages.

  Attributes:
    page_RC: the page in each slot; -1 where it is free. No page is in two.
    used_RC: the step at which that page was last wanted; -1 where it is free.
    hits_R: different pages that were wanted and resident, in all steps so far.
    misses_R: likewise, of those that were loaded.
  """

  page_RC: Int[Array, "R C"] | jax.ShapeDtypeStruct
  used_RC: Int[Array, "R C"] | jax.ShapeDtypeStruct
  hits_R: Int[Array, "R"] | jax.ShapeDtypeStruct
  misses_R: Int[Array, "R"] | jax.ShapeDtypeStruct


class Plan(NamedTuple):
  """What one step does; slots and pages are numbered along all rows.

  Attributes:
    slots: what is resident afterwards.
    slot_QM: `row * C + slot` of every wanted page; -1 where the list has no page or one that
      it had before.
    load_QM: `row * pages_per_row + page` of the page to load into that slot; -1 where there
      is nothing to load.
    own_Q: `row * C + slot` of the row's own page; -1 where its list does not have it.
  """

  slots: Slots
  slot_QM: jax.Array
  load_QM: jax.Array
  own_Q: jax.Array
