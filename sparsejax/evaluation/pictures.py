"""Pictures of runs side by side, each in one colour in all of them, and maps of shares."""

from collections.abc import Sequence
import pathlib
from typing import Protocol

import numpy as np

from sparsejax import errors
from sparsejax.evaluation import decode_timing, diagnostics, perplexity


class Run(Protocol):
  """What pictures know of a run; see `report.Run`."""

  name: str
  validation: list[dict[str, float]]
  cells: list[perplexity.Cell]
  diagnostics: list[diagnostics.Cell]
  tokens_per_step: int

  def minutes(self, records: Sequence[dict[str, float]]) -> np.ndarray: ...


def draw_curves(runs: Sequence[Run], path: pathlib.Path) -> None:
  """Validation loss and the gap between the modes, by tokens and by time.

  Losses of the first quarter of a run's validations may lie above the panel.
  """
  plt = pyplot()
  figure, axes = plt.subplots(
    *(2, 2), figsize=(12, 7.5), sharex="col", sharey="row", layout="constrained"
  )
  shown = [(run, color) for run, color in _colored(runs) if run.validation]
  for run, color in shown:
    tokens = [r["step"] * run.tokens_per_step / 1e6 for r in run.validation]
    line = dict(color=color, marker=".", markersize=4, linewidth=1.2, label=run.name)
    for column, x in enumerate((tokens, run.minutes(run.validation))):
      for stream, style in (("full", "-"), ("sparse", "--")):
        y = [r[f"eval/{stream}/loss"] for r in run.validation]
        axes[0, column].plot(x, y, style, **line)
      axes[1, column].plot(x, [r["eval/gap"] for r in run.validation], **line)
  # With the fall of the first steps in view, runs would lie on each other ever after.
  axes[0, 0].margins(y=0.02)
  axes[0, 0].set_ylim(top=_top([run.validation for run, _ in shown]))
  axes[0, 0].set_ylabel("validation loss (nats/token)")
  axes[1, 0].set_ylabel("sparse - full (nats/token)")
  axes[1, 0].set_xlabel("training tokens (millions)")
  axes[1, 1].set_xlabel("training time (minutes)")
  axes[1, 0].axhline(0.0, color="black", linewidth=0.5)
  axes[1, 1].axhline(0.0, color="black", linewidth=0.5)
  _finish(figure, path, shown, {"full inference": "-", "sparse inference": "--"})


def draw_budgets(runs: Sequence[Run], path: pathlib.Path) -> None:
  """Perplexity against the keys that a query reads; full inference as a line across."""
  plt = pyplot()
  figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
  shown = [(run, color) for run, color in _colored(runs) if run.cells]
  for run, color in shown:
    sparse = sorted((c.budget, c.perplexity) for c in run.cells if c.mode == "sparse")
    if sparse:
      axis.plot(*zip(*sparse, strict=True), color=color, marker=".", label=run.name)
    for cell in run.cells:
      if cell.mode == "full":
        axis.axhline(cell.perplexity, color=color, linestyle=":", label=run.name)
  axis.set_xscale("log", base=2)
  axis.set_xlabel("budget (keys a query reads)")
  axis.set_ylabel("validation perplexity")
  _finish(figure, path, shown, {"sparse inference": "-", "full inference": ":"})


def draw_positions(cells: Sequence[perplexity.Cell], path: pathlib.Path) -> None:
  """Loss against context, and what sparse inference loses there, a line for each cell.

  Lines of one text and length have one panel above the other, and one colour in both; bands are
  standard errors.
  """
  plt = pyplot()
  panels: dict[tuple, list[perplexity.Cell]] = {}
  for cell in cells:
    if cell.positions:
      panels.setdefault((cell.source, cell.length), []).append(cell)
  figure, axes = plt.subplots(
    *(2, len(panels)),
    figsize=(1 + 5 * len(panels), 7),
    sharex="col",
    squeeze=False,
    layout="constrained",
  )
  for column, ((source, length), own) in enumerate(panels.items()):
    for number, cell in enumerate(own):
      label = cell.mode + (f" {cell.budget}" if cell.budget else "")
      line = dict(color=f"C{number % 10}", label=label)
      for axis, what in zip(axes[:, column], ("loss", "gap"), strict=True):
        x, y, error = np.array(
          [(p.last, getattr(p, what), getattr(p, f"{what}_se")) for p in cell.positions], float
        ).T
        if np.isfinite(y).any():
          axis.plot(x, y, ".-", **line)
          axis.fill_between(x, y - error, y + error, color=line["color"], alpha=0.2)
    axes[0, column].set_title(f"{source}, {length:,d} tokens", fontsize="medium")
    # Of a model that is not finite there is nothing to draw.
    if axes[0, column].has_data():
      axes[0, column].legend(fontsize="small")
    axes[1, column].axhline(0.0, color="black", linewidth=0.5)
    bounds = sorted({position.last for cell in own for position in cell.positions})
    axes[1, column].set_xscale("log", base=2)
    axes[1, column].set_xticks(bounds, [f"{bound:,d}" for bound in bounds], rotation=45)
    axes[1, column].set_xlabel("tokens read before, at most")
  axes[0, 0].set_ylabel("loss (nats/token)")
  axes[1, 0].set_ylabel("sparse - full (nats/token)")
  figure.savefig(path, dpi=120)
  plt.close(figure)


def draw_throughput(cells: Sequence[decode_timing.Cell], path: pathlib.Path) -> None:
  """Tokens per second and per step against the context, a line for each way to decode."""
  plt = pyplot()
  figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
  ways: dict[tuple, list[decode_timing.Cell]] = {}
  for cell in cells:
    ways.setdefault((cell.method, cell.mode, cell.budget, cell.num_slots), []).append(cell)
  for (name, mode, budget, slots), own in ways.items():
    label = f"{name}, {mode}" + (f" {budget}" if budget else "")
    label += "" if slots is None else f", {slots} slots"
    for axis, what in zip(axes, ("tokens_per_second", "milliseconds"), strict=True):
      axis.plot([c.context for c in own], [getattr(c, what) for c in own], ".-", label=label)
  for axis, text in zip(axes, ("tokens/s, all rows", "ms per step"), strict=True):
    axis.set_xscale("log", base=2)
    axis.set_xlabel("context (tokens)")
    axis.set_ylabel(text)
    axis.set_ylim(bottom=0)
  axes[1].legend(fontsize="small")
  figure.savefig(path, dpi=120)
  plt.close(figure)


def draw_diagnostics(runs: Sequence[Run], names: Sequence[str], path: pathlib.Path) -> None:
  """A panel for each number: a line over the layers, or a bar for what is of the model.

  Args:
    runs: to draw; those without diagnostics have no place.
    names: of numbers that some run has, in the order of their panels.
    path: to write.
  """
  plt = pyplot()
  shown = [(run, color) for run, color in _colored(runs) if run.diagnostics]
  num_rows = -(-len(names) // 4)
  figure, axes = plt.subplots(
    *(num_rows, 4), figsize=(14, 2.4 * num_rows), squeeze=False, layout="constrained"
  )
  for name, axis in zip(names, axes.flat, strict=False):
    axis.set_title(name, fontsize="medium")
    found = [
      (run, color, cell)
      for run, color in shown
      for cell in run.diagnostics
      if cell.name == name
    ]
    draw = _draw_layers if found[0][2].layers else _draw_bars
    draw(axis, found)
  for axis in axes.flat[len(names) :]:
    axis.remove()
  _finish(figure, path, shown, {})


def draw_map(
  values: np.ndarray,
  *,
  columns: Sequence[str],
  rows: Sequence[str],
  labels: tuple[str, str],
  title: str,
  path: pathlib.Path,
) -> None:
  """Shares as a map of colours, each with its number in percent.

  Args:
    values: from 0 to 1, [rows, columns]; the first row is at the top.
    columns, rows: their names.
    labels: what columns and rows are.
    title: above the map.
    path: to write.
  """
  plt = pyplot()
  size = 2.5 + 0.9 * len(columns), 1.8 + 0.5 * len(rows)
  figure, axis = plt.subplots(figsize=size, layout="constrained")
  # Colours mean the same in every map, so that modes and budgets compare by eye.
  image = axis.imshow(values, vmin=0.0, vmax=1.0, cmap="RdYlGn", aspect="auto")
  for (row, column), value in np.ndenumerate(values):
    axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center")
  axis.set_xticks(range(len(columns)), columns)
  axis.set_yticks(range(len(rows)), rows)
  axis.set_xlabel(labels[0])
  axis.set_ylabel(labels[1])
  axis.set_title(title, fontsize="medium")
  figure.colorbar(image, ax=axis, format=lambda share, _: f"{share:.0%}")
  figure.savefig(path, dpi=120)
  plt.close(figure)


def _draw_layers(axis, found) -> None:
  for run, color, cell in found:
    # As a number, None is NaN, which leaves a gap in the line.
    values = np.array(cell.layers, dtype=float)
    axis.plot(range(len(values)), values, color=color, marker=".", label=run.name)
  axis.locator_params(axis="x", integer=True)
  axis.set_xlabel("layer", fontsize="small")


def _draw_bars(axis, found) -> None:
  for place, (run, color, cell) in enumerate(found):
    bar = axis.barh(-place, cell.value, color=color, label=run.name)
    # Runs differ in digits that a bar from zero does not show.
    axis.bar_label(bar, fmt="%.4f", padding=2, fontsize="x-small")
  axis.axvline(0.0, color="black", linewidth=0.5)
  axis.set_yticks([])
  axis.locator_params(axis="x", nbins=4)
  axis.margins(x=0.25)


def _top(validations: Sequence[list[dict[str, float]]]) -> float | None:
  """Just above the highest loss but for the first quarter of each run's validations."""
  late = [r for records in validations for r in records[len(records) // 4 :]]
  losses = [r[f"eval/{stream}/loss"] for r in late for stream in ("full", "sparse")]
  return max((1.02 * loss for loss in losses if np.isfinite(loss)), default=None)


def _colored(runs: Sequence[Run]):
  """Each run with its colour."""
  num = len(runs)
  # Ten colours that are easily told apart; more runs share out a spectrum.
  if num <= 10:
    return [(run, f"C{number}") for number, run in enumerate(runs)]
  return list(zip(runs, pyplot().get_cmap("turbo")(np.linspace(0.0, 1.0, num)), strict=True))


def _finish(figure, path: pathlib.Path, shown, styles: dict[str, str]) -> None:
  """Says beside the panels which run has which colour and what lines mean; saves."""
  plt = pyplot()
  handles = [
    plt.Line2D([], [], color=color, linewidth=3, label=run.name) for run, color in shown
  ]
  handles += [
    plt.Line2D([], [], color="black", linestyle=style, label=label)
    for label, style in styles.items()
  ]
  figure.legend(handles=handles, loc="outside right upper", fontsize="small")
  figure.savefig(path, dpi=120)
  plt.close(figure)


def why_none() -> str | None:
  """Why nothing can be drawn; None if it can. For whoever has more to show than pictures."""
  try:
    import matplotlib  # noqa: F401
  except ImportError:
    return f"pictures need the package matplotlib; {errors.install('eval')}."
  return None


def pyplot():
  """Pyplot, drawing into files wherever it runs.

  Raises:
    UserError: see `why_none`.
  """
  if (reason := why_none()) is not None:
    raise errors.UserError(reason)
  import matplotlib

  # Draws into files wherever it runs.
  matplotlib.use("Agg")
  from matplotlib import pyplot

  return pyplot
