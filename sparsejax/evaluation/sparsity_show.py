"""Cells of the sparsity task as a table, as curves by length, and as maps of layer by head."""

from collections.abc import Sequence
import math
import pathlib

import numpy as np

from sparsejax.evaluation import pictures, sparsity

_MARKERS = {"full": "o", "sparse": "x", None: "."}
# Panels of the curves; the second number of one is dashed.
_CURVES = (
  ("attn_sparsity",),
  ("entropy",),
  ("sink",),
  ("error", "bound"),
  ("gamma", "gamma_min"),
  ("kl",),
)


def rows(cells: Sequence[sparsity.Cell]) -> list[tuple[str, ...]]:
  """Rows of a table, the header first: a column for each length."""
  lengths = _lengths(cells)
  found = [("number", "inference", "budget", *(f"{n:,d} tokens" for n in lengths), "limit")]
  for (name, mode, budget), line in _lines(cells).items():
    at = {cell.length: cell for cell in line}
    limits = {cell.limit for cell in line}
    (limit,) = limits if len(limits) == 1 else (None,)
    found.append(
      (
        sparsity.NAMES[name],
        mode or "both",
        "-" if budget is None else str(budget),
        *(_value(at[n]) if n in at else "-" for n in lengths),
        "-" if limit is None else f"{limit:.4f}",
      )
    )
  return found


def draw(
  cells: Sequence[sparsity.Cell], directory: pathlib.Path
) -> tuple[str, tuple[pathlib.Path, ...]]:
  """Draws curves and maps; returns a line that says where, or why not, and the files.

  `by_length.png`, and for each mode, budget and length `heads_MODE_BUDGET_LENGTH.png`.
  """
  if (reason := pictures.why_none()) is not None:
    return f"no pictures: {reason}\n", ()
  directory.mkdir(parents=True, exist_ok=True)
  drawn = [directory / "by_length.png"]
  _draw_curves(cells, drawn[0])
  ways = {(c.mode, c.budget, c.length): None for c in cells if c.heads and c.budget is not None}
  for mode, budget, length in ways:
    shown = [
      cell
      for cell in cells
      if (cell.mode, cell.length) == (mode, length) and cell.budget in (None, budget)
    ]
    drawn.append(directory / f"heads_{mode}_{budget}_{length}.png")
    _draw_heads(shown, drawn[-1])
  return f"curves by length and maps of layer by head in {directory.name}/\n", tuple(drawn)


def _draw_curves(cells: Sequence[sparsity.Cell], path: pathlib.Path) -> None:
  plt = pictures.pyplot()
  figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
  lengths, lines = _lengths(cells), _lines(cells)
  budgets = sorted({cell.budget for cell in cells if cell.budget is not None})
  colors = {None: "black"} | {budget: f"C{i}" for i, budget in enumerate(budgets)}
  for axis, names in zip(axes.flat, _CURVES, strict=True):
    axis.set_title("; dashed: ".join(sparsity.NAMES[n] for n in names), fontsize="medium")
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{n:,d}" for n in lengths])
    axis.set_xlabel("tokens")
    for (name, mode, budget), line in lines.items():
      if name not in names:
        continue
      label = " ".join(filter(None, (mode, str(budget or ""))))
      axis.errorbar(
        [cell.length for cell in line],
        [cell.value for cell in line],
        [cell.se or 0.0 for cell in line],
        label=label if name == names[0] else None,
        color=colors[budget],
        linestyle="--" if names.index(name) else "-",
        marker=_MARKERS[mode],
        fillstyle="none",
        capsize=2,
      )
      if name == "gamma_min" and line[0].limit is not None:
        x, y = [cell.length for cell in line], [cell.limit for cell in line]
        axis.plot(x, y, ":", color=colors[budget])
    if axis.has_data():
      axis.legend(fontsize="small")
  figure.savefig(path, dpi=120)
  plt.close(figure)


def _draw_heads(cells: Sequence[sparsity.Cell], path: pathlib.Path) -> None:
  plt = pictures.pyplot()
  figure, axes = plt.subplots(2, 4, figsize=(14, 6.5), layout="constrained")
  tops = {"entropy": math.log2(cells[0].length)}
  for cell in cells:
    if cell.name in ("error", "bound"):
      # Error and bound in the same colours.
      largest = max(max(head) for head in cell.heads if head is not None)
      for name in ("error", "bound"):
        tops[name] = max(tops.get(name, 0.0), largest)
  for cell, axis in zip(cells, axes.flat, strict=False):
    num_heads = max(len(head) for head in cell.heads if head is not None)
    nothing = (math.nan,) * num_heads
    values = np.array([nothing if head is None else head for head in cell.heads])
    image = axis.imshow(
      values, vmin=0.0, vmax=tops.get(cell.name, 1.0), cmap="viridis", aspect="auto"
    )
    axis.set_title(f"{sparsity.NAMES[cell.name]}: {_value(cell)}", fontsize="medium")
    axis.set_xlabel("key head" if "gamma" in cell.name else "head", fontsize="small")
    axis.set_ylabel("layer", fontsize="small")
    for side in (axis.xaxis, axis.yaxis):
      side.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axis)
  for axis in axes.flat[len(cells) :]:
    axis.remove()
  budget = next(cell.budget for cell in cells if cell.budget is not None)
  figure.suptitle(f"{cells[0].mode} inference, budget {budget}, {cells[0].length:,d} tokens")
  figure.savefig(path, dpi=120)
  plt.close(figure)


def _lines(cells: Sequence[sparsity.Cell]) -> dict[tuple, list[sparsity.Cell]]:
  """Cells that differ in their length alone, in the order of numbers, modes and budgets."""
  names = list(sparsity.NAMES)
  lines = {}
  for cell in cells:
    lines.setdefault((cell.name, cell.mode, cell.budget), []).append(cell)

  def order(key):
    name, mode, budget = key
    return names.index(name), mode or "", budget or 0

  return {key: lines[key] for key in sorted(lines, key=order)}


def _lengths(cells: Sequence[sparsity.Cell]) -> list[int]:
  return sorted({cell.length for cell in cells})


def _value(cell: sparsity.Cell) -> str:
  return f"{cell.value:.4f}" + ("" if cell.se is None else f" ± {cell.se:.4f}")
