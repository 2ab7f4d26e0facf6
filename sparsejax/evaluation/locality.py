"""What a cache of blocks has to load while a model decodes: recorded lists, hits and misses.

The lists that the tokens after a long context choose are those of decoding, step by step,
since token by token a model computes what it does on the whole row.

Letters: B rows, T tokens, L layers, S steps, K key/value heads, M blocks listed.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from sparsejax import attention, errors, sharding
from sparsejax.attention import method
from sparsejax.diagnostics import block_choice, by_head, seen
from sparsejax.evaluation import contexts
from sparsejax.evaluation import subject as subjects


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """Decoding after a context, with so many slots for blocks.

  What a prefetch would be worth is told, too: one that loads, before a layer has chosen, what
  the same head of the layer before lists at this step, and drives nothing out of slots. The
  list of a layer at the step before foresees none of its misses: all of it is in slots.

  Attributes:
    context: tokens before the first step.
    budget: keys that a token reads.
    spare: slots beyond the M of a list; 0 is an exact fit.
    misses: blocks of a list that are in no slot, per step, layer and key head, the mean once
      slots are full. The block that begins with a step's token is one of them, for which
      decoding loads nothing: in every block's first step.
    most_misses: the most that any step of any layer, row and head has.
    hit_rate: of the blocks that are listed, those that are in a slot.
    foreseen: of the misses, those in the list of the layer before. The first layer has none
      before it, and is counted neither here nor below. None where no other layer misses.
    moved_in_vain: blocks in the list of the layer before that are neither in a slot nor
      listed, per step, layer and key head. None where there is one layer.
    gamma, least_gamma: share of a list that the one before has too (NOSA's locality,
      arXiv:2510.13602; `diagnostics.block_choice.overlap`), the mean and the least.
    bound: the most misses that the method allows where lists are full and none is spare;
      None where it promises nothing.
    misses_by_layer: the mean of each layer and key head.
  """

  context: int
  budget: int
  spare: int
  misses: float
  most_misses: int
  hit_rate: float
  foreseen: float | None
  moved_in_vain: float | None
  gamma: float
  least_gamma: float
  bound: int | None
  misses_by_layer: tuple[tuple[float, ...], ...]


def check(subject: subjects.Subject, context: int, *, num_rows: int, num_steps: int) -> None:
  """Refuses what has no lists to record; parameters may be shapes alone.

  Raises:
    ConfigError: the model chooses no blocks, in some layer or at this length.
    DataError: see `contexts.rows`.
  """
  length, options = context + num_steps, subject.transformer.options
  # More than there is of the text.
  contexts.rows(subject, num_rows, length)
  ids_BT = jax.ShapeDtypeStruct((subject.mesh.size, length), np.int32)
  with sharding.use(subject.mesh):
    places = by_head.places_with_lists(subject.transformer, subject.params, ids_BT)
  if len(places) < len(options.pattern):
    raise errors.ConfigError(
      f"attention.method={'+'.join(options.pattern)!r} does not choose blocks in every layer "
      f"of rows of {length} tokens; leave locality out of --tasks, or take a checkpoint whose "
      "layers all choose, as of ssa or nosa. Rows below infllmv2.dense_length are read whole: "
      "take longer --lengths."
    )


def record(
  subject: subjects.Subject, context: int, *, num_rows: int, num_steps: int
) -> np.ndarray:
  """The lists of the steps after a context, int32 [S, L, B, K, M]; -1 for empty slots.

  Raises:
    UserError: see `check`.
  """
  check(subject, context, num_rows=num_rows, num_steps=num_steps)
  length = context + num_steps
  ids_BT = contexts.rows(subject, num_rows, length)
  options = subject.transformer.options
  transformer = subject.transformer.clone(
    options=dataclasses.replace(options, max_documents=1),
  )

  @jax.jit
  def look(params, ids_BT):
    _, shown = transformer.apply(
      {"params": params},
      ids_BT,
      jnp.broadcast_to(jnp.arange(length), ids_BT.shape),
      jnp.ones_like(ids_BT),
      stream="sparse",
      mutable=["intermediates"],
    )
    stacks = seen.by_place(shown, "blocks")
    return {place: x_SBTKM[:, :, context:] for place, x_SBTKM in stacks.items()}

  lists = []
  with sharding.use(subject.mesh):
    for row_T in ids_BT:
      # Devices share rows: each takes the same one.
      same_BT = jnp.asarray(np.repeat(row_T[None], subject.mesh.size, 0))
      lists.append(jax.tree.map(lambda x: np.asarray(x[:, 0]), look(subject.params, same_BT)))
  period = len(options.pattern)
  num_layers = subject.transformer.shape.num_hidden_layers
  s, k, m = lists[0][0].shape[1:]
  found = np.empty((s, num_layers, num_rows, k, m), np.int32)
  for row, stacks in enumerate(lists):
    for place, x_LSKM in stacks.items():
      found[:, place::period, row] = np.swapaxes(x_LSKM, 0, 1)
  return found


def run(
  options: method.Options, lists_SLBKM: np.ndarray, context: int, spare: Sequence[int]
) -> list[Cell]:
  """What caches of several sizes make of recorded lists, of a model with such options.

  The first half of the steps fills the slots, and the second is counted.
  """
  s, num_layers, _, k, m = lists_SLBKM.shape
  lists = jnp.asarray(lists_SLBKM)
  gamma = np.asarray(block_choice.overlap(lists.reshape(s, -1, k, m).swapaxes(0, 1)))
  cells = []
  for extra in spare:
    late = _Counts(*(np.asarray(x)[s // 2 :] for x in _count(lists, m + extra)))
    num_misses, num_later = late.misses.sum(), late.misses[:, 1:].sum()
    by_layer = late.misses.mean((0, 2))
    cells.append(
      Cell(
        context=context,
        budget=options.budget,
        spare=extra,
        misses=float(late.misses.mean()),
        most_misses=int(late.misses.max()),
        hit_rate=float(late.hits.sum() / ((late.hits.sum() + num_misses) or math.nan)),
        foreseen=float(late.foreseen[:, 1:].sum() / num_later) if num_later else None,
        moved_in_vain=float(late.in_vain[:, 1:].mean()) if num_layers > 1 else None,
        gamma=float(gamma.mean()),
        least_gamma=float(gamma.min()),
        bound=most_new(options),
        misses_by_layer=tuple(tuple(float(x) for x in layer) for layer in by_layer),
      )
    )
  return cells


class _Counts(NamedTuple):
  """Blocks of every step, [S, L, B, K], as a `Cell` names them."""

  misses: jax.Array
  hits: jax.Array
  foreseen: jax.Array
  in_vain: jax.Array


@jax.jit(static_argnums=1)
def _count(lists_SLBKM, num_slots: int) -> _Counts:
  num_steps, *rows, m = lists_SLBKM.shape
  # Layer 0 is given the last one's; what is counted of that is not read.
  before_SLBKM = jnp.roll(lists_SLBKM, 1, axis=1)
  lists_SQM, before_SQM = (x.reshape(num_steps, -1, m) for x in (lists_SLBKM, before_SLBKM))
  q = lists_SQM.shape[1]
  free_QC, zero_Q = jnp.full((q, num_slots), -1, jnp.int32), jnp.zeros(q, jnp.int32)

  def step(held, given):
    number, list_QM, before_QM = given
    plan = pallas_kernels.plan_slots(
      held,
      list_QM,
      # No page has only begun, as the theorem has it: all that are in no slot are counted.
      own_Q=zero_Q,
      is_new_Q=zero_Q > 0,
      first_row=0,
      step=number,
      pages_per_row=2**30,
      # No cache that decodes has as many rows.
      implementation="xla",
    )
    now = plan.slots
    is_miss_QM = (list_QM >= 0) & ~_is_among(list_QM, held.page_RC)
    is_moved_QM = (before_QM >= 0) & ~_is_among(before_QM, held.page_RC)
    counts = _Counts(
      misses=now.misses_R - held.misses_R,
      hits=now.hits_R - held.hits_R,
      foreseen=(is_miss_QM & _is_among(list_QM, before_QM)).sum(-1),
      in_vain=(is_moved_QM & ~_is_among(before_QM, list_QM)).sum(-1),
    )
    return now, counts

  held = pallas_kernels.Slots(free_QC, free_QC, zero_Q, zero_Q)
  numbers_S = jnp.arange(num_steps, dtype=jnp.int32)
  counts = jax.lax.scan(step, held, (numbers_S, lists_SQM, before_SQM))[1]
  return jax.tree.map(lambda x: x.reshape(num_steps, *rows), counts)


def _is_among(x_QM, others_QN):
  return (x_QM[:, :, None] == others_QN[:, None, :]).any(-1)


def most_new(options: method.Options) -> int | None:
  """Blocks of a list, at most, that the one before has not: the theorem in `attention.nosa`.

  None where the method promises nothing.
  """
  if attention.sparse_names(options) != ("nosa",):
    return None
  # A query's first block of its own was listed by none.
  return options.nosa.num_query_aware + 1


def rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
  """Rows of a table, the header first."""
  header = (
    *("context", "budget", "spare slots", "misses", "most", "bound", "hit rate"),
    *("foreseen", "moved in vain", "gamma", "least gamma"),
  )
  return [
    header,
    *(
      (
        f"{cell.context:,d}",
        str(cell.budget),
        str(cell.spare),
        f"{cell.misses:.2f}",
        str(cell.most_misses),
        "-" if cell.bound is None else str(cell.bound),
        f"{cell.hit_rate:.1%}",
        "-" if cell.foreseen is None else f"{cell.foreseen:.1%}",
        "-" if cell.moved_in_vain is None else f"{cell.moved_in_vain:.2f}",
        f"{cell.gamma:.3f}",
        f"{cell.least_gamma:.3f}",
      )
      for cell in cells
    ),
  ]
