"""Cells of the needle task as a table, and as maps of depth by length."""

from collections.abc import Sequence
import pathlib

import numpy as np

from sparsejax.evaluation import pictures
from sparsejax.evaluation.needles import task


def rows(cells: Sequence[task.Cell]) -> list[tuple[str, ...]]:
  """Rows of a table, the header first: a column for each depth, accuracies in percent."""
  depths = list(dict.fromkeys(cell.depth for cell in cells))
  header = (
    *("kind", "haystack", "inference", "budget", "length"),
    *(f"depth {depth}%" for depth in depths),
    *("mean", "nats/token", "top-1", "questions"),
  )
  found = [header]
  for line in _groups(cells, "kind", "mode", "budget", "length"):
    first = line[0]
    found.append(
      (
        *(first.kind, first.haystack, first.mode),
        "-" if first.budget is None else str(first.budget),
        f"{first.length:,d}",
        *map(_percent, line),
        f"{np.mean([100 * cell.accuracy for cell in line]):.1f}",
        f"{np.mean([cell.loss for cell in line]):.3f}",
        f"{np.mean([cell.top1 for cell in line]):.1%}",
        f"{sum(cell.num_questions for cell in line):,d}",
      )
    )
  return found


def draw(cells: Sequence[task.Cell], directory: pathlib.Path) -> str:
  """Draws a map for each kind, mode and budget; returns a line that says where, or why not.

  Files are called `KIND_full.png` and `KIND_sparse_BUDGET.png`.
  """
  if (reason := pictures.why_none()) is not None:
    return f"no maps: {reason}\n"
  directory.mkdir(parents=True, exist_ok=True)
  for group in _groups(cells, "kind", "mode", "budget"):
    first = group[0]
    budget = "" if first.budget is None else f"_{first.budget}"
    lines = _groups(group, "length")
    pictures.draw_map(
      np.array([[cell.accuracy for cell in line] for line in lines]).T,
      columns=[f"{line[0].length:,d}" for line in lines],
      rows=[f"{cell.depth}%" for cell in lines[0]],
      labels=("tokens", "depth"),
      title=f"{first.kind} in {first.haystack}, {first.mode}{budget.replace('_', ' ')}",
      path=directory / f"{first.kind}_{first.mode}{budget}.png",
    )
  return f"maps of depth by length in {directory.name}/\n"


def _groups(cells: Sequence[task.Cell], *names: str) -> list[list[task.Cell]]:
  """Cells that agree in some fields, groups in the order of their first."""
  groups = {}
  for cell in cells:
    groups.setdefault(tuple(getattr(cell, name) for name in names), []).append(cell)
  return list(groups.values())


def _percent(cell: task.Cell) -> str:
  error = "" if cell.accuracy_se is None else f" ± {100 * cell.accuracy_se:.1f}"
  return f"{100 * cell.accuracy:.1f}{error}"
