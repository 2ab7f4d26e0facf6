"""Scores of single tokens, summed by what they belong to and by how much context they have.

Letters: B rows, T tokens, U units (see `protocols.reading`), P ranges of positions.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from sparsejax import scoring, sharding
from sparsejax.data import batch as data
from sparsejax.evaluation import row_batches
from sparsejax.evaluation.protocols import reading as readings

# Called with parameters and a batch; nats of every target, and whether it has the largest
# logit, both [B, T]. Where no target counts, they may be anything.
type Score = Callable[[dict, data.Batch], tuple[jax.Array, jax.Array]]

_SHORTEST = 16


class Sums(NamedTuple):
  """What came out of a reading.

  Attributes:
    whole: of each unit.
    by_position: the same by how many tokens the model has read of a document, or of a
      window: one for each of `position_bounds`.
  """

  whole: scoring.RowScores
  by_position: tuple[scoring.RowScores, ...]


def position_bounds(length: int) -> list[int]:
  """The last number of read tokens of every range: powers of two from 16 on, and `length`."""
  bounds, bound = [], _SHORTEST
  while bound < length:
    bounds.append(bound)
    bound *= 2
  return [*bounds, length]


def sum_up(
  score: Score,
  params: dict,
  reading: readings.Reading,
  *,
  bounds: Sequence[int],
  max_length: int,
  rows: int,
  mesh: jax.sharding.Mesh,
) -> Sums:
  """Scores every row of a reading.

  Args:
    score: of tokens.
    params: of the model.
    reading: what is read.
    bounds: see `position_bounds`.
    max_length: tokens of a row, of which
    rows: are scored together; of shorter ones as many more.
    mesh: where parameters are.

  Returns:
    Sums in float64, fields [U].
  """
  num_units = int(reading.units_R.max()) + 1
  nll_PU, hits_PU, num_tokens_PU, num_bytes_PU = np.zeros((4, len(bounds), num_units))
  for number, row, nll_T, is_hit_T in _tokens(score, params, reading, max_length, rows, mesh):
    (counted,) = np.nonzero(row.weights)
    # A target at position t follows t + 1 tokens.
    ranges = np.searchsorted(bounds, row.positions[counted] + 1)
    unit = reading.units_R[number]
    np.add.at(nll_PU[:, unit], ranges, nll_T[counted])
    np.add.at(hits_PU[:, unit], ranges, is_hit_T[counted])
    np.add.at(num_tokens_PU[:, unit], ranges, 1)
    if reading.bytes_per_id is not None:
      np.add.at(num_bytes_PU[:, unit], ranges, reading.bytes_per_id[row.targets[counted]])
  by_position = tuple(
    scoring.RowScores(*fields)
    for fields in zip(nll_PU, hits_PU, num_tokens_PU, num_bytes_PU, strict=True)
  )
  whole = scoring.RowScores(*(x.sum(0) for x in (nll_PU, hits_PU, num_tokens_PU, num_bytes_PU)))
  if reading.num_bytes_U is not None:
    whole = whole._replace(num_bytes=reading.num_bytes_U[:num_units].astype(np.float64))
  return Sums(whole, by_position)


def _tokens(
  score: Score, params, reading: readings.Reading, max_length: int, rows: int, mesh
) -> Iterator[tuple[int, data.Batch, np.ndarray, np.ndarray]]:
  """Every row's number, the row, and scores of its tokens."""
  batches = row_batches.by_length(
    reading.lengths_R, max_length=max_length, rows=rows, num_devices=mesh.size
  )
  with sharding.use(mesh):
    for _, numbers, size in batches:
      picked = [reading.rows[number] for number in numbers]
      blank = data.Batch(*(np.zeros_like(field) for field in picked[0]))
      filled = picked + [blank] * (size - len(picked))
      stacked = data.Batch(*(np.stack(field) for field in zip(*filled, strict=True)))
      found = jax.device_get(score(params, sharding.put_batch(stacked, mesh)))
      # Rows of padding, behind the others, are left out.
      yield from zip(numbers, picked, *found, strict=False)
