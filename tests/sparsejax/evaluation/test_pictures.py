"""What pictures of runs show, asked of the figures before they are saved."""

import dataclasses

from matplotlib import colors
from matplotlib import figure as figure_module
import numpy as np
import pytest

from sparsejax.evaluation import by_position, diagnostics, perplexity, pictures

CELLS = (
  perplexity.Cell("web", "full", None, 2.0, 0.01, 7.389, 0.07, 0.9, 0.4, 1000),
  perplexity.Cell("web", "sparse", 16, 2.5, 0.01, 12.182, 0.1, 1.2, 0.3, 1000),
)


@dataclasses.dataclass
class Run:
  """No more than pictures ask for; a step takes half a minute."""

  name: str
  validation: tuple = ()
  cells: tuple = ()
  diagnostics: tuple = ()
  tokens_per_step: int = 500_000

  def minutes(self, records):
    return np.array([r["step"] / 2 for r in records])


def validation_lines(losses, gap=0.5):
  return [
    {"step": step, "eval/full/loss": loss, "eval/sparse/loss": loss + gap, "eval/gap": gap}
    for step, loss in enumerate(losses, 1)
  ]


@pytest.fixture
def saved(monkeypatch):
  """Figures that were saved, the newest last."""
  figures = []
  monkeypatch.setattr(
    figure_module.Figure, "savefig", lambda figure, path, dpi: figures.append(figure)
  )
  return figures


def lines(axis):
  """Label, style, x and y of what has a name; None where the line has a gap."""
  return [
    (
      line.get_label(),
      line.get_linestyle(),
      np.asarray(line.get_xdata()).tolist(),
      [None if y != y else y for y in np.asarray(line.get_ydata()).tolist()],
    )
    for line in axis.get_lines()
    if not line.get_label().startswith("_")
  ]


def legend(figure):
  (only,) = figure.legends
  assert not any(axis.get_legend() for axis in figure.axes)
  return [text.get_text() for text in only.get_texts()]


def colors_of(axis):
  """By name of the run."""
  shown = {line.get_label(): line.get_color() for line in axis.get_lines()}
  shown |= {bar.get_label(): bar.patches[0].get_facecolor() for bar in axis.containers}
  return {
    name: colors.to_hex(color) for name, color in shown.items() if not name.startswith("_")
  }


def position(last, loss, gap=None):
  error = None if gap is None else 0.1
  return by_position.Position(
    last=last, num_tokens=9, loss=loss, loss_se=0.2, gap=gap, gap_se=error
  )


def test_losses_by_position_have_a_panel_for_each_text(saved):
  """With what sparse inference loses below; what has nothing to compare is not there."""
  full, sparse = CELLS
  cells = [
    dataclasses.replace(full, length=32, positions=(position(16, 3.0), position(32, 2.0))),
    dataclasses.replace(
      sparse, length=32, positions=(position(16, 3.1, 0.1), position(32, 2.5, 0.5))
    ),
    dataclasses.replace(full, source="other", length=16, positions=(position(16, 4.0),)),
    dataclasses.replace(full, mode="unigram"),
  ]
  pictures.draw_positions(cells, "anywhere")
  (figure,) = saved
  loss, other, gap, nothing = figure.axes
  assert [axis.get_title() for axis in figure.axes] == [
    "web, 32 tokens",
    "other, 16 tokens",
    "",
    "",
  ]
  assert [(label, x, y) for label, _, x, y in lines(loss)] == [
    ("full", [16.0, 32.0], [3.0, 2.0]),
    ("sparse 16", [16.0, 32.0], [3.1, 2.5]),
  ]
  assert [(label, x, y) for label, _, x, y in lines(other)] == [("full", [16.0], [4.0])]
  assert [(label, x, y) for label, _, x, y in lines(gap)] == [
    ("sparse 16", [16.0, 32.0], [0.1, 0.5])
  ]
  assert lines(nothing) == []
  assert colors_of(gap)["sparse 16"] == colors_of(loss)["sparse 16"] != colors_of(loss)["full"]


def test_curves_show_the_numbers(saved):
  """A run without validation has no line, and no place in the legend."""
  runs = [Run("bare"), Run("a", validation=validation_lines([4.0, 3.0]))]
  pictures.draw_curves(runs, "curves.png")
  (figure,) = saved
  tokens, minutes = [0.5, 1.0], [0.5, 1.0]
  both = [("-", [4.0, 3.0]), ("--", [4.5, 3.5])]
  assert [lines(axis) for axis in figure.axes] == [
    [("a", style, tokens, losses) for style, losses in both],
    [("a", style, minutes, losses) for style, losses in both],
    [("a", "-", tokens, [0.5, 0.5])],
    [("a", "-", minutes, [0.5, 0.5])],
  ]
  assert legend(figure) == ["a", "full inference", "sparse inference"]


def test_curves_are_cut_above_their_first_quarter(saved):
  """For each run its own; a loss that is no number sets no limit."""
  short = validation_lines([9.0, 5.0, float("nan"), 3.0])
  long = validation_lines([90.0, 80.0, 4.0, 4.0, 4.0, 3.0, 3.0, 3.0])
  runs = [Run("short", validation=short), Run("long", validation=long)]
  pictures.draw_curves(runs, "curves.png")
  for axis in saved[0].axes[:2]:
    low, high = axis.get_ylim()
    assert low < 3.0
    assert 5.5 < high < 6.0


def test_curves_of_nothing_are_drawn(saved):
  pictures.draw_curves([Run("a"), Run("b", validation=validation_lines([np.nan]))], "x.png")
  assert legend(saved[0]) == ["b", "full inference", "sparse inference"]


def test_budgets_show_the_numbers(saved):
  """A run without evaluation has no line, and no place in the legend."""
  pictures.draw_budgets([Run("bare"), Run("a", cells=CELLS)], "budgets.png")
  (figure,) = saved
  assert lines(figure.axes[0]) == [
    ("a", "-", [16], [12.182]),
    ("a", ":", [0, 1], [7.389, 7.389]),
  ]
  assert legend(figure) == ["a", "sparse inference", "full inference"]


def test_diagnostics_show_the_numbers(saved):
  """A panel each; lines over layers, bars for what is of the model."""
  a = (
    diagnostics.Cell("gap", -0.5, ()),
    diagnostics.Cell("full/sink", 0.25, (0.125, None, 0.375)),
    diagnostics.Cell("align", 0.5, (0.5, 0.5, 0.5)),
  )
  b = (diagnostics.Cell("gap", 0.75, ()), diagnostics.Cell("full/sink", 0.5, (0.5, 0.5, 0.5)))
  runs = [Run("bare"), Run("a", diagnostics=a), Run("b", diagnostics=b)]
  pictures.draw_diagnostics(runs, ["gap", "full/sink", "align"], "diagnostics.png")
  (figure,) = saved
  assert [axis.get_title() for axis in figure.axes] == ["gap", "full/sink", "align"]
  gap, sink, align = figure.axes
  assert [(bar.get_label(), bar.datavalues.tolist()) for bar in gap.containers] == [
    ("a", [-0.5]),
    ("b", [0.75]),
  ]
  assert [text.get_text() for text in gap.texts] == ["-0.5000", "0.7500"]
  # From top to bottom as in the legend.
  heights = [bar.patches[0].get_center()[1] for bar in gap.containers]
  assert heights == sorted(heights, reverse=True)
  assert lines(sink) == [
    ("a", "-", [0, 1, 2], [0.125, None, 0.375]),
    ("b", "-", [0, 1, 2], [0.5, 0.5, 0.5]),
  ]
  assert all(line.get_marker() == "." for line in sink.get_lines())
  assert lines(align) == [("a", "-", [0, 1, 2], [0.5, 0.5, 0.5])]
  assert legend(figure) == ["a", "b"]


def test_a_run_has_one_colour_in_all_pictures(saved):
  """Also where runs before it are not shown, or it has fewer numbers than others."""
  validation = validation_lines([2.0])
  seen = diagnostics.Cell("gap", 0.5, ()), diagnostics.Cell("align", 0.5, (0.5,))
  runs = [
    Run("bare"),
    Run("a", validation, CELLS),
    Run("b", validation, CELLS, seen[:1]),
    Run("c", validation, CELLS, seen),
  ]
  pictures.draw_curves(runs, "curves.png")
  pictures.draw_budgets(runs, "budgets.png")
  pictures.draw_diagnostics(runs, ["gap", "align"], "diagnostics.png")
  found = [colors_of(axis) for figure in saved for axis in figure.axes]
  every = found[0]
  assert [list(of_axis) for of_axis in found] == [["a", "b", "c"]] * 5 + [["b", "c"], ["c"]]
  assert all(of_axis.items() <= every.items() for of_axis in found)
  for figure in saved:
    handles = figure.legends[0].legend_handles
    assert {
      handle.get_label(): colors.to_hex(handle.get_color())
      for handle in handles
      if handle.get_label() in every
    }.items() <= every.items()


@pytest.mark.parametrize("num_runs", [9, 10, 11, 25])
def test_colours_are_distinct(saved, num_runs):
  runs = [Run(str(i), cells=CELLS) for i in range(num_runs)]
  pictures.draw_budgets(runs, "budgets.png")
  assert len(set(colors_of(saved[0].axes[0]).values())) == num_runs


def test_a_map_shows_shares_in_colours_that_mean_the_same_everywhere(saved):
  pictures.draw_map(
    np.array([[1.0, 0.5, 0.0], [0.25, 0.125, 0.75]]),
    columns=["1k", "2k", "4k"],
    rows=["0%", "100%"],
    labels=("tokens", "depth"),
    title="single, full",
    path="map.png",
  )
  (figure,) = saved
  axis, _ = figure.axes
  texts = [(*text.get_position(), text.get_text()) for text in axis.texts]
  assert texts[:4] == [(0, 0, "100"), (1, 0, "50"), (2, 0, "0"), (0, 1, "25")]
  assert [label.get_text() for label in axis.get_xticklabels()] == ["1k", "2k", "4k"]
  assert [label.get_text() for label in axis.get_yticklabels()] == ["0%", "100%"]
  assert (axis.get_xlabel(), axis.get_ylabel()) == ("tokens", "depth")
  assert axis.get_title() == "single, full"
  (image,) = axis.images
  assert image.get_clim() == (0.0, 1.0)
  # The first row is at the top.
  low, high = axis.get_ylim()
  assert low > high
