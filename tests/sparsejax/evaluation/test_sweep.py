"""Several checkpoints in one go: what is measured, kept, compared and refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import base
from sparsejax import errors
from sparsejax.evaluation import (
  extrapolation,
  ledger,
  markdown,
  plans,
  results,
  table,
  tasks,
)
from sparsejax.evaluation import request as requests
from sparsejax.evaluation import subject as subjects
from tests import small

pytestmark = pytest.mark.usefixtures("plain_report")

BUDGETS = (16, 32)
LENGTH = 64


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Checkpoints of one model: `b` of another method and trained longer, `c` of longer rows."""
  folder = tmp_path_factory.mktemp("runs")
  for name, method, step, length in (
    ("a", "ssa", 1, LENGTH), ("b", "full", 2, LENGTH), ("c", "ssa", 1, 2 * LENGTH)
  ):  # fmt: skip
    config = small.make_config(data__sources=("recall",), data__sequence_length=length)
    config.data.update(recall_pairs=2, recall_queries=2)
    config.attention.method = method
    small.save_checkpoints(folder / name, config, steps=range(1, step + 1))
  (folder / "link").symlink_to(folder / "a")
  return folder


@dataclasses.dataclass(frozen=True)
class Cell:
  """Of a task that is made up."""

  mode: str
  budget: int | None
  value: float


@pytest.fixture
def made_up(monkeypatch):
  """A task whose value is known; returns what was measured, and who is to be interrupted."""
  calls, interrupted = [], []

  def task(subject, request, out):
    del out

    def measure(loaded, *, mode, budget):
      if (subject.name, mode, budget) in interrupted:
        raise KeyboardInterrupt
      # Parameters are there when, and only when, something is measured.
      assert np.isfinite(np.asarray(jax.tree.leaves(loaded.params)[0])).all()
      calls.append((subject.name, mode, budget))
      shift = dict(a=0.0, b=1.0, c=0.0)[subject.name]
      return dict(sums=[shift + (budget or 0) + x for x in (1.0, 2.0, shift, 4.0)])

    ways = dict(full=[None], sparse=BUDGETS)
    asked = [(mode, x) for mode in request.modes for x in ways[mode]]
    units = tuple(
      plans.Unit(
        key=dict(task="made_up", mode=mode, budget=budget),
        measure=lambda loaded, mode=mode, budget=budget: measure(
          loaded, mode=mode, budget=budget
        ),
        samples=lambda value, mode=mode, budget=budget: [
          plans.Samples(
            what="it",
            mode=mode,
            budget=budget,
            metric="points",
            sums=tuple(value["sums"]),
            weights=(1.0,) * 4,
          )
        ],
      )
      for mode, budget in asked
    )

    def tell(values):
      cells = [
        Cell(mode, budget, sum(value["sums"]))
        for (mode, budget), value in zip(asked, values, strict=True)
      ]
      rows = [("mode", "value"), *((cell.mode, str(cell.value)) for cell in cells)]
      return plans.Told(cells, markdown.align(rows))

    return plans.Plan(units, tell)

  monkeypatch.setitem(tasks.TASKS, "made_up", task)
  return calls, interrupted


def run(request):
  return table.run(request, base.get_config())


def test_what_is_finished_is_not_done_again(runs, made_up, tmp_path):
  calls, interrupted = made_up
  whole = requests.Request(path=(runs / "a", runs / "b"), tasks=("made_up",), out=tmp_path)
  interrupted.append(("b", "sparse", 16))
  with pytest.raises(KeyboardInterrupt):
    run(whole)
  before = [("a", "full", None), ("a", "sparse", 16), ("a", "sparse", 32), ("b", "full", None)]
  assert calls == before
  assert not (tmp_path / "report.html").exists()
  interrupted.clear()
  text, _ = run(whole)
  assert calls[len(before) :] == [("b", "sparse", 16), ("b", "sparse", 32)]
  assert f"cells: 0 measured, 3 taken from before ({tmp_path}/a/cells.jsonl)" in text
  assert f"cells: 2 measured, 1 taken from before ({tmp_path}/b/cells.jsonl)" in text
  # As if nothing had happened.
  _, elsewhere = run(dataclasses.replace(whole, out=tmp_path / "elsewhere"))
  for name in ("a/made_up.md", "b/made_up.md"):
    assert (tmp_path / name).read_text() == (elsewhere / name).read_text()
  first, second = (
    json.loads((out / "results.json").read_text())["checkpoints"]
    for out in (tmp_path, elsewhere)
  )
  assert [x["tasks"] for x in first] == [x["tasks"] for x in second]
  calls.clear()
  run(dataclasses.replace(whole, fresh=True))
  assert len(calls) == 6


@pytest.mark.parametrize(
  ("changes", "num_measured"),
  [
    (dict(), 0),
    (dict(batch_size=4), 0),
    (dict(modes=("full",)), 0),
    (dict(sequence_length=2 * LENGTH, rope_scaling=("default",)), 3),
    (dict(rope_scaling=("llama3", "factor=2")), 3),
    (dict(kernels="auto"), 0),
    (dict(step=1), 3),
    ("other parameters", 3),
  ],
)
def test_a_cell_is_known_by_all_that_it_depends_on(
  runs, made_up, tmp_path, monkeypatch, changes, num_measured
):
  calls, _ = made_up
  request = requests.Request(path=runs / "b", step=2, tasks=("made_up",), out=tmp_path)
  run(request)
  assert len(calls) == 3
  if changes == "other parameters":
    monkeypatch.setattr(subjects.checkpoint, "fingerprint", lambda path: "0ther")
    changes = {}
  if "rope_scaling" in changes:
    changes = changes | dict(rope_scaling=extrapolation.parse(changes["rope_scaling"]))
  run(dataclasses.replace(request, **changes))
  assert len(calls) - 3 == num_measured


def test_a_comparison_comes_out_by_hand(runs, made_up, tmp_path):
  request = requests.Request(
    path=runs / "b", compare=runs / "a", tasks=("made_up",), out=tmp_path
  )
  text, _ = run(request)
  content = json.loads((tmp_path / "results.json").read_text())
  assert [x["name"] for x in content["checkpoints"]] == ["b", "a"]
  lines = content["differences"]
  assert [(x["mode"], x["budget"]) for x in lines] == [
    ("full", None),
    ("sparse", 16),
    ("sparse", 32),
  ]
  for line in lines:
    # Of four samples one is 2 above, the others 1.
    assert (line["run"], line["reference"], line["num_samples"]) == ("b", "a", 4)
    assert (line["difference"], line["se"]) == pytest.approx((1.25, 0.25))
    assert line["z"] == pytest.approx(5.0)
    assert line["p"] == pytest.approx(5.733e-7, rel=1e-3)
  assert "+1.2500 ± 0.2500" in text
  assert "+1.2500 ± 0.2500" in (tmp_path / "report.html").read_text()


def test_perplexity_is_taken_from_before_to_the_digit(runs, tmp_path, monkeypatch):
  request = requests.Request(path=runs / "a", budgets=(16, 32), max_rows=2, out=tmp_path)
  text, _ = run(request)
  monkeypatch.setattr(subjects.checkpoint, "load_params", None)
  again, _ = run(request)
  assert again.rpartition("\ncells: ")[0] == text.rpartition("\ncells: ")[0]
  assert json.loads((tmp_path / "results.json").read_text())["counts"][0]["measured"] == 0
  # One budget more is one cell more, and needs the parameters.
  with pytest.raises(TypeError, match="not callable"):
    run(dataclasses.replace(request, budgets=(16, 24, 32)))


def test_a_stretched_rope_is_recorded_and_changes_the_numbers(runs, tmp_path):
  request = requests.Request(path=runs / "a", modes=("full",), max_rows=2, out=tmp_path / "own")
  run(request)
  text, out = run(
    dataclasses.replace(
      request, rope_scaling=extrapolation.parse(["llama3", "factor=8"]), out=tmp_path / "other"
    )
  )
  (own, other) = (
    json.loads((tmp_path / name / "perplexity.json").read_text()) for name in ("own", "other")
  )
  assert own["cells"][0] == other["cells"][0]  # which is no model's
  assert own["cells"][1]["loss"] != other["cells"][1]["loss"]
  assert own["rope_scaling"]["rope_type"] == "default"
  scaling = other["rope_scaling"]
  assert (scaling["rope_type"], scaling["factor"]) == ("llama3", 8.0)
  assert scaling["original_max_position_embeddings"] == LENGTH
  assert other["changes"]["model.rope_scaling.factor"] == [4.0, 8.0]
  assert own["changes"] == {}
  assert "changed: model.rope_scaling.factor was 4.0, is 8.0" in text
  page = (out / "report.html").read_text()
  assert f"llama3, factor 8 of {LENGTH} (changed for this evaluation)" in page


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(path=("a", "b")), r"2 checkpoints have one table; name a directory .* with --out"),
    (dict(path="a", compare="b"), r"2 checkpoints have one table; .* --out"),
    (dict(path=("a", "a"), out="x"), r"a/checkpoints/1 is named twice; name each"),
    (
      dict(path="a", sequence_length=2 * LENGTH),
      r"128 tokens is beyond the 64 .*llama3,factor=2 .*or --rope_scaling=default",
    ),
    (dict(path="a", tasks=("needle",), lengths=(256,)), r"256 tokens is beyond the 64 "),
    (dict(path=("a", "b/../a"), out="x"), r"a/checkpoints/1 is named twice"),
    (dict(path=("a", "link"), out="x"), r"link/checkpoints/1 is named twice"),
    # Half a row, and what is read behind it.
    (
      dict(path="a", tasks=("locality",), num_steps=33),
      r"locality reads --num_steps=33 tokens behind a context: a length of 65 tokens is beyond",
    ),
    (
      dict(path="a", tasks=("perplexity", "locality"), num_steps=32, max_rows=10**6),
      r"1000000 rows of 64 tokens are more than the \d+ tokens of the validation split",
    ),
    (
      dict(path="a", sequence_length=256, rope_scaling=["llama3", "factor=2"]),
      r"256 tokens is beyond the 128 .*factor=4",
    ),
  ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_measured(
  runs, tmp_path, monkeypatch, changes, message
):
  monkeypatch.setattr(subjects.checkpoint, "load_params", None)
  path = changes["path"]
  changes = changes | dict(
    path=tuple(runs / x for x in path) if isinstance(path, tuple) else runs / path
  )
  for name, make in (
    ("compare", lambda x: runs / x),
    ("out", lambda x: tmp_path / x),
    ("rope_scaling", extrapolation.parse),
  ):
    if name in changes:
      changes[name] = make(changes[name])
  with pytest.raises((errors.ConfigError, errors.DataError), match=message):
    run(requests.Request(**changes))
  assert list(tmp_path.iterdir()) == []


def test_rows_of_other_lengths_are_not_compared(runs, tmp_path):
  request = requests.Request(path=runs / "c", compare=runs / "a", out=tmp_path)
  with pytest.raises(
    errors.DataError, match=r"they differ in .*length \(128 and 64\); (.*),"
  ) as refused:
    run(request)
  assert list(tmp_path.iterdir()) == []
  # What the message says helps.
  assert "; take --sequence_length=64, or leave perplexity out" in str(refused.value)
  run(dataclasses.replace(request, sequence_length=64, max_rows=1))
  assert "differences" in (tmp_path / "report.html").read_text()


def test_a_comparison_of_nothing_is_refused(runs, tmp_path):
  request = requests.Request(
    path=runs / "b", compare=runs / "a", tasks=("diagnostics", "block_lists"), out=tmp_path
  )
  message = r"--compare=.*/a compares .* --tasks=diagnostics,block_lists has none; add one of p"
  with pytest.raises(errors.ConfigError, match=message):
    run(request)
  assert list(tmp_path.iterdir()) == []


def test_checkpoints_have_names_of_their_own(runs):
  describe = lambda path, step=None: subjects.describe(path, base.get_config(), step=step)  # noqa: E731
  a, b = describe(runs / "a"), describe(runs / "b")
  assert results.distinct_names([a, b]) == ["a", "b"]
  first = describe(runs / "b", 1)
  assert results.distinct_names([first, b]) == ["b-1", "b-2"]
  other = dataclasses.replace(b, path=runs / "x" / "b" / "checkpoints" / "2")
  assert results.distinct_names([b, other]) == [f"{runs.name}-b-2", "x-b-2"]


def test_a_directory_in_use_is_refused(runs, made_up, tmp_path):
  request = requests.Request(path=runs / "a", tasks=("made_up",), out=tmp_path)
  with ledger.Ledger(tmp_path), pytest.raises(errors.UserError, match="another evaluation is"):
    run(request)
