"""Curves in panels, and maps in a grid, as PNG in memory."""

from collections.abc import Mapping, Sequence
import dataclasses
import io

import numpy as np

from sparsejax.evaluation import pictures

_COLUMNS = 3


@dataclasses.dataclass(frozen=True)
class Line:
  """Points that belong together.

  Attributes:
    label: what a legend calls it.
    key: lines of the same one have the same colour.
    x, y: of the points; with a single x of None, y is a level across the panel. A y of None
      is not finite, and not drawn.
    error: of y, None where it is not known; () draws none.
  """

  label: str
  key: str
  x: tuple[float | None, ...]
  y: tuple[float | None, ...]
  error: tuple[float | None, ...] = ()

  @property
  def is_level(self) -> bool:
    return self.x == (None,)


def draw(
  panels: Mapping[str, Sequence[Line]],
  *,
  x: str,
  y: str,
  is_log: bool = True,
  bounds: tuple[float, float] | None = None,
) -> bytes:
  """A panel for each title, whose lines run over the same kind of x.

  Args:
    panels: lines by title.
    x, y: what the axes are.
    is_log: whether x doubles from one mark to the next.
    bounds: of y, where all panels have the same.
  """
  plt = pictures.pyplot()
  columns = min(_COLUMNS, len(panels))
  num_rows = -(-len(panels) // columns)
  figure, axes = plt.subplots(
    *(num_rows, columns),
    figsize=(1.6 + 3.9 * columns, 0.6 + 3.0 * num_rows),
    squeeze=False,
    layout="constrained",
  )
  found = {line.label: line for lines in panels.values() for line in lines}
  keys = list(dict.fromkeys(line.key for line in found.values()))
  color = dict(zip(keys, _colors(len(keys)), strict=True))
  for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
    axis.set_title(title, fontsize="medium")
    for line in lines:
      style = dict(color=color[line.key], linewidth=1.3)
      if line.is_level:
        if line.y[0] is not None:
          axis.axhline(line.y[0], linestyle=":", **style)
        continue
      order = np.argsort(line.x)
      xs, ys = (np.array(values, float)[order] for values in (line.x, line.y))
      if any(error is not None for error in line.error):
        # As a number, None is NaN, which draws no bar.
        bars = np.array(line.error, float)[order]
        axis.errorbar(xs, ys, bars, marker=".", capsize=2, **style)
      else:
        axis.plot(xs, ys, marker=".", **style)
    if is_log:
      axis.set_xscale("log", base=2)
    marks = sorted({v for line in lines if not line.is_level for v in line.x})
    if 0 < len(marks) <= 8:
      axis.set_xticks(marks, [f"{mark:,g}" for mark in marks], fontsize="small")
      axis.minorticks_off()
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    if bounds is not None:
      axis.set_ylim(bounds)
  for axis in axes.flat[len(panels) :]:
    axis.remove()
  handles = [
    plt.Line2D([], [], color=color[line.key], linestyle=":" if line.is_level else "-")
    for line in found.values()
  ]
  figure.legend(handles, list(found), loc="outside right upper", fontsize="small")
  return _png(plt, figure)


def draw_maps(
  grid: Mapping[tuple[str, str], np.ndarray],
  *,
  columns: Sequence[str],
  rows: Sequence[str],
  labels: tuple[str, str],
) -> bytes:
  """Maps of shares, one for each pair of a row's and a column's name.

  Args:
    grid: from 0 to 1, each [rows, columns].
    columns, rows: names within a map.
    labels: what those are.
  """
  plt = pictures.pyplot()
  downs = list(dict.fromkeys(down for down, _ in grid))
  acrosses = list(dict.fromkeys(across for _, across in grid))
  size = max(1.5, 0.55 * len(columns)), max(1.1, 0.28 * len(rows))
  figure, axes = plt.subplots(
    *(len(downs), len(acrosses)),
    figsize=(1.8 + size[0] * len(acrosses), 0.9 + size[1] * len(downs)),
    squeeze=False,
    sharex=True,
    sharey=True,
    layout="constrained",
  )
  image = None
  for i, down in enumerate(downs):
    for j, across in enumerate(acrosses):
      axis, values = axes[i, j], grid[down, across]
      image = axis.imshow(values, vmin=0.0, vmax=1.0, cmap="RdYlGn", aspect="auto")
      for (row, column), value in np.ndenumerate(values):
        text = f"{100 * value:.0f}"
        axis.text(column, row, text, ha="center", va="center", fontsize="x-small")
      axis.set_xticks(range(len(columns)), columns, fontsize="x-small", rotation=45)
      axis.set_yticks(range(len(rows)), rows, fontsize="x-small")
      if i == 0:
        axis.set_title(across, fontsize="small")
      if j == 0:
        axis.set_ylabel(down, fontsize="small")
  figure.supxlabel(labels[0], fontsize="small")
  figure.supylabel(labels[1], fontsize="small")
  figure.colorbar(image, ax=axes, format=lambda share, _: f"{share:.0%}")
  return _png(plt, figure)


def draw_lists(layers: Mapping[str, np.ndarray], title: str) -> bytes:
  """Which key blocks the queries of every block read, a map for each layer.

  Args:
    layers: shares of queries and key heads, from 0 to 1, NaN where there is nothing to read,
      [query blocks, key blocks].
    title: above all.
  """
  plt = pictures.pyplot()
  columns = min(4, len(layers))
  num_rows = -(-len(layers) // columns)
  figure, axes = plt.subplots(
    *(num_rows, columns),
    figsize=(1.2 + 3.0 * columns, 0.6 + 3.0 * num_rows),
    squeeze=False,
    layout="constrained",
  )
  image = None
  for axis, (name, shares) in zip(axes.flat, layers.items(), strict=False):
    image = axis.imshow(shares, vmin=0.0, vmax=1.0, cmap="magma_r", interpolation="nearest")
    axis.set_title(name, fontsize="medium")
    axis.set_xlabel("key block", fontsize="small")
    axis.set_ylabel("query block", fontsize="small")
    axis.tick_params(labelsize="x-small")
  for axis in axes.flat[len(layers) :]:
    axis.remove()
  figure.suptitle(title, fontsize="medium")
  figure.colorbar(image, ax=axes, format=lambda share, _: f"{share:.0%}")
  return _png(plt, figure)


def _colors(num: int) -> list:
  """Ten colours are easily told apart; more share out a spectrum."""
  if num <= 10:
    return [f"C{number}" for number in range(num)]
  return list(pictures.pyplot().get_cmap("turbo")(np.linspace(0.0, 1.0, num)))


def _png(plt, figure) -> bytes:
  content = io.BytesIO()
  figure.savefig(content, dpi=110, format="png")
  plt.close(figure)
  return content.getvalue()
