"""What is drawn of answers."""

import pathlib

import numpy as np

from sparsejax.evaluation import curves, figures


def test_lines_are_drawn_where_their_values_are(monkeypatch):
  """A line over x in order, a level across, colours by key."""
  seen = {}

  def keep(plt, figure):
    axis = figure.axes[0]
    for line in axis.lines:
      xs, ys = (np.asarray(x).tolist() for x in line.get_data())
      seen[tuple(ys)] = (xs, line.get_color(), line.get_linestyle())
    plt.close(figure)
    return b""

  monkeypatch.setattr(curves, "_png", keep)
  lines = [
    curves.Line("a, sparse", "a", (128, 64), (2.0, 3.0)),
    curves.Line("a, full", "a", (None,), (1.5,)),
    curves.Line("b, sparse", "b", (64,), (4.0,), (0.5,)),
  ]
  curves.draw({"web": lines}, x="budget", y="loss")
  assert seen[3.0, 2.0][0] == [64, 128]
  assert seen[1.5, 1.5][2] == ":"
  assert seen[3.0, 2.0][1] == seen[1.5, 1.5][1] != seen[4.0,][1]


def test_a_prefetch_of_which_nothing_is_known_is_not_drawn(monkeypatch):
  """Of one layer, or in files of before there was such a number."""
  drawn = []
  monkeypatch.setattr(curves, "draw", lambda panels, **_: drawn.append(panels) or b"")
  cell = dict(context=64, spare=0, misses=3.0, hit_rate=0.9)
  cells = dict(
    old=[cell],
    one=[cell | dict(foreseen=None, moved_in_vain=None)],
    # Nothing is missed with more slots.
    new=[
      cell | dict(foreseen=0.25, moved_in_vain=7.0),
      cell | dict(spare=9, foreseen=None, moved_in_vain=5.0),
    ],
  )
  shown = [figures.Shown(name, c, (), pathlib.Path(), 64) for name, c in cells.items()]
  assert len(figures.draw("locality", shown[:2])) == 1
  figures.draw("locality", shown)
  label = "new, behind 64 tokens"
  assert drawn[-1] == {
    "share of the misses": [curves.Line(label, label, (0,), (0.25,))],
    "in vain, at a step": [curves.Line(label, label, (0, 9), (7.0, 5.0))],
  }


def test_budgets_have_lines_of_their_own(monkeypatch):
  """Which of several it is of, a line says; of files of before there were any, nothing."""
  drawn = []
  monkeypatch.setattr(curves, "draw", lambda panels, **_: drawn.append(panels) or b"")
  cell = dict(context=64, spare=0, misses=3.0, hit_rate=0.9)
  cells = dict(
    old=[cell],
    both=[cell | dict(budget=24), cell | dict(budget=40, misses=2.0)],
  )
  shown = [figures.Shown(name, c, (), pathlib.Path(), 64) for name, c in cells.items()]
  figures.draw("locality", shown)
  labels = ["old, behind 64 tokens"]
  labels += [f"both, {budget} keys, behind 64 tokens" for budget in (24, 40)]
  assert drawn[0]["misses of a step"] == [
    curves.Line(label, label, (0,), (misses,))
    for label, misses in zip(labels, (3.0, 3.0, 2.0), strict=True)
  ]
