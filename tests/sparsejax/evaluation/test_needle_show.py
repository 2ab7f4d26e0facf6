"""How cells of the needle task are shown."""

import re
import sys

import numpy as np

from sparsejax.evaluation import pictures
from sparsejax.evaluation.needles import show, task

CELLS = [
  task.Cell(
    kind="single",
    haystack="noise",
    mode=mode,
    budget=budget,
    length=length,
    depth=depth,
    accuracy=0.25 if depth else 1.0,
    accuracy_se=0.125 if depth else None,
    loss=1.0 + depth / 100,
    top1=0.5,
    num_questions=4,
  )
  for mode, budget in (("full", None), ("sparse", 64))
  for length in (256, 1024)
  for depth in (0, 50)
]


def test_the_table_has_a_column_for_each_depth():
  header, *lines = show.rows(CELLS)
  assert header == (
    *("kind", "haystack", "inference", "budget", "length", "depth 0%", "depth 50%"),
    *("mean", "nats/token", "top-1", "questions"),
  )
  assert lines[0] == (
    *("single", "noise", "full", "-", "256", "100.0", "25.0 ± 12.5"),
    *("62.5", "1.250", "50.0%", "8"),
  )
  assert [line[2:5] for line in lines] == [
    ("full", "-", "256"),
    ("full", "-", "1,024"),
    ("sparse", "64", "256"),
    ("sparse", "64", "1,024"),
  ]


def test_a_map_has_depths_down_and_lengths_across(tmp_path, monkeypatch):
  asked = []
  monkeypatch.setattr(pictures, "draw_map", lambda values, **rest: asked.append((values, rest)))
  said = show.draw(CELLS, tmp_path / "needle")
  assert said == "maps of depth by length in needle/\n"
  (values, rest), (_, sparse) = asked
  np.testing.assert_array_equal(values, [[1.0, 1.0], [0.25, 0.25]])
  assert rest["rows"] == ["0%", "50%"]
  assert rest["columns"] == ["256", "1,024"]
  assert rest["labels"] == ("tokens", "depth")
  assert rest["title"] == "single in noise, full"
  assert sparse["title"] == "single in noise, sparse 64"
  assert [r["path"].name for _, r in asked] == ["single_full.png", "single_sparse_64.png"]


def test_without_matplotlib_there_are_no_maps_and_it_is_said(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  assert re.match(
    r"no maps: .* matplotlib; pip install -e", show.draw(CELLS, tmp_path / "needle")
  )
  assert not (tmp_path / "needle").exists()
