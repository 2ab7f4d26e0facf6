"""Loss by context: how well tokens are predicted that follow few or many others.

Values are as `perplexity` keeps them: JSON, with sums of every row, window or document.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from sparsejax import scoring


@dataclasses.dataclass(frozen=True)
class Position:
  """Tokens that have about the same context.

  Attributes:
    last: tokens that the model has read of their document or window, at most; more than `last`
      of the position before.
    num_tokens: that count.
    loss, loss_se, gap, gap_se: as of a cell.
  """

  last: int
  num_tokens: int
  loss: float
  loss_se: float | None
  gap: float | None = None
  gap_se: float | None = None


def as_values(
  bounds: Sequence[int], by_position: Sequence[scoring.RowScores]
) -> list[dict[str, Any]]:
  """Sums of every range of positions that has tokens, as JSON."""
  return [
    dict(last=last, nll=sums.nll, num_tokens=sums.num_tokens)
    for last, sums in zip(bounds, by_position, strict=True)
    if sums.num_tokens.sum()
  ]


def scores(value: dict[str, Any]) -> scoring.RowScores:
  """Sums from JSON; none are of what it does not hold."""
  nothing = [0.0] * len(value["nll"])
  return scoring.RowScores(
    *(np.array(value.get(name, nothing), float) for name in scoring.RowScores._fields)
  )


def of_values(
  values: Sequence[dict[str, Any]], full: Sequence[dict[str, Any]] | None
) -> tuple[Position, ...]:
  """Positions from their sums.

  Args:
    values: of `as_values`.
    full: the same under full inference, to compare with; None if there is nothing to compare.
  """
  found = []
  for number, value in enumerate(values):
    own, compared = scores(value), None if full is None else scores(full[number])
    # Windows without such tokens tell nothing of how much others differ.
    has_some = own.num_tokens > 0
    own = scoring.RowScores(*(field[has_some] for field in own))
    if compared is not None:
      compared = scoring.RowScores(*(field[has_some] for field in compared))
    summary = scoring.summarize(own)
    found.append(
      Position(
        last=value["last"],
        num_tokens=summary.num_tokens,
        loss=float(summary.loss),
        loss_se=known(summary.loss_se),
        **gap(own, compared),
      )
    )
  return tuple(found)


def gap(own: scoring.RowScores, full: scoring.RowScores | None) -> dict[str, float | None]:
  """`gap` and `gap_se` of a cell, None each where there is nothing to compare with."""
  if full is None:
    return dict(gap=None, gap_se=None)
  more, error = scoring.compare(own, full)
  return dict(gap=float(more), gap_se=known(error))


def known(error: float) -> float | None:
  """A standard error, which one unit alone does not have."""
  return None if math.isnan(error) else float(error)
