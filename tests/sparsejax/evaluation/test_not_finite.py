"""Numbers that are not finite: JSON has null for them, and whoever reads it goes on."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from configs import base
from sparsejax import scoring
from sparsejax.evaluation import (
  block_lists,
  compare,
  diagnostics,
  figures,
  ledger,
  page,
  perplexity,
  plans,
  results,
  sparsity,
  table,
)
from sparsejax.evaluation import request as requests
from sparsejax.evaluation import subject as subjects
from sparsejax.evaluation.needles import task as needles
from tests import small


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Two checkpoints that differ in their parameters."""
  folder = tmp_path_factory.mktemp("runs")
  for name in ("a", "b"):
    config = small.make_config(data__sources=("recall",), attention__method="ssa")
    config.data.update(recall_pairs=2, recall_queries=2, sequence_length=256)
    small.save_checkpoints(folder / name, config, steps=(1,) if name == "a" else (1, 2))
  return folder


def strict(text):
  """What a reader of JSON has that knows no NaN and no Infinity."""

  def refuse(word):
    raise AssertionError(f"{word} is not JSON")

  return json.loads(text, parse_constant=refuse)


def check_files(out):
  """All that is written is JSON; returns `results.json`."""
  for path in sorted(out.rglob("*.json")):
    strict(path.read_text())
  for path in sorted(out.rglob(ledger.NAME)):
    for line in path.read_text().splitlines():
      strict(line)
  return strict((out / "results.json").read_text())


@pytest.fixture
def broken(monkeypatch):
  """Parameters of `a` are not finite, as those of a run that diverged."""
  load = subjects.with_params

  def with_params(subject):
    loaded = load(subject)
    if subject.name != "a":
      return loaded
    return dataclasses.replace(loaded, params=jax.tree.map(lambda x: np.nan * x, loaded.params))

  monkeypatch.setattr(subjects, "with_params", with_params)


TASKS = ("perplexity", "needle", "sparsity", "diagnostics", "block_lists", "locality")


def test_a_model_that_diverged_is_answered_for_by_every_task(
  runs, tmp_path, broken, monkeypatch
):
  """Beside one that is finite, with all pictures, and again from what was kept."""
  request = requests.Request(
    path=runs / "a",
    compare=runs / "b",
    tasks=TASKS,
    budgets=(16,),
    max_rows=2,
    batch_size=8,
    num_steps=4,
    spare=(0,),
    about_needles=needles.Settings(kinds=("single",), depths=(0,), num_questions=2),
    out=tmp_path,
  )
  text, _ = table.run(request, base.get_config())
  content = check_files(tmp_path)
  diverged, finite = (x["tasks"] for x in content["checkpoints"])
  for cells, is_finite in ((diverged, False), (finite, True)):
    losses = [x["loss"] for x in cells["perplexity"] if x["mode"] != "unigram"]
    assert [x is not None for x in losses] == [is_finite] * 2
    assert [x["loss"] is not None for x in cells["needle"]] == [is_finite] * 2
    (kl,) = [x for x in cells["sparsity"] if x["name"] == "kl"]
    assert (kl["value"] is not None) == is_finite
    assert {x["value"] is not None for x in cells["diagnostics"] if x["name"] == "kl"} == {
      is_finite
    }
  # They are in the tables, too.
  assert "nan" in text
  lines = [x for x in content["differences"] if x["metric"].startswith("loss")]
  assert {x["difference"] for x in lines} == {None}
  assert {x["reference_value"] is not None for x in lines} == {True}
  # Once is enough to have drawn everything.
  monkeypatch.setattr(figures, "draw", lambda task, shown: [])
  again, _ = table.run(request, base.get_config())
  assert "cells: 0 measured" in again
  assert again.partition("\ncells: ")[0] == text.partition("\ncells: ")[0]
  assert check_files(tmp_path)["differences"] == content["differences"]
  # Readers of one checkpoint's answers.
  assert page.main([str(tmp_path / "a")]) == 0
  answers = {x.task: x.cells for x in results.read(tmp_path / "a").answers}
  assert answers == diverged
  cells = [perplexity.from_json(cell) for cell in answers["perplexity"]]
  assert [math.isnan(cell.loss) for cell in cells] == [False, True, True]
  assert all(math.isnan(p.loss) for cell in cells[1:] for p in cell.positions)


@pytest.mark.parametrize(
  ("nats", "loss", "ppl"), [(math.inf, None, None), (800.0, 800.0, None), (2.0, 2.0, math.e**2)]
)
@pytest.mark.usefixtures("plain_report")
def test_losses_without_bound_are_null(runs, tmp_path, monkeypatch, nats, loss, ppl):
  """Also perplexities for which a float has no room."""

  def make_score(transformer, stream, chunk_length):
    own = nats if stream == "sparse" else 2.0
    return lambda params, batch: (
      np.where(batch.weights > 0, own, 0.0), batch.weights > 0
    )  # fmt: skip

  monkeypatch.setattr(scoring, "make_token_score", make_score)
  request = requests.Request(path=runs / "a", max_rows=3, out=tmp_path)
  table.run(request, base.get_config())
  (checkpoint,) = check_files(tmp_path)["checkpoints"]
  _, full, sparse = checkpoint["tasks"]["perplexity"]
  assert (full["loss"], full["perplexity"]) == (2.0, pytest.approx(math.e**2))
  assert sparse["loss"] == loss
  assert sparse["perplexity"] == (ppl and pytest.approx(ppl))
  assert sparse["gap"] == (loss and loss - 2.0)


def test_means_of_nothing_are_null(tmp_path):
  """Tiles of sixteen queries, in rows of eight; rows in which no token counts."""
  cells = block_lists.describe(np.zeros((1, 8, 2, 3), np.int32), 8)
  assert math.isnan(cells[0].unions[3])
  told = plans.Told(cells, "")
  about = dict(config={}, environment={})
  answer = results.write("block_lists", told, about, tmp_path)
  assert answer.cells[0]["unions"] == [1.0, 1.0, 1.0, None]
  assert strict((tmp_path / "block_lists.json").read_text())["cells"] == answer.cells
  cells = [plans.restore(block_lists.Cell, cell) for cell in answer.cells]
  assert block_lists.rows(cells)[1][-2:] == ("-", "1")
  nothing = scoring.summarize(scoring.RowScores(*np.zeros((4, 3))))
  assert math.isnan(nothing.loss)
  assert (nothing.num_tokens, nothing.num_rows) == (0, 3)
  assert plans.as_json(nothing)[:6] == [None, None, None, None, None, None]
  rows = scoring.RowScores(*np.zeros((4, 3)))
  assert plans.as_json(scoring.compare(rows, rows)) == [None, None]
  assert plans.as_json(compare.paired([0.0], [0.0], [0.0])) == [None, None, None, None]


def test_samples_of_sparsity_may_be_finite_in_part():
  value = {"kl": [1.0, None], "full/attn_sparsity": [[[0.5, 0.75], [None, 0.5]], None]}
  kl, mass = sparsity._samples(value, length=64, budget=16)
  assert (kl.sums[0], mass.sums[0]) == (1.0, 0.625)
  assert math.isnan(kl.sums[1])
  assert math.isnan(mass.sums[1])


def test_what_is_no_json_is_refused_and_leaves_what_is_there(tmp_path):
  with ledger.Ledger(tmp_path) as book:
    book.add(dict(number=1), [0.5])
  for is_fresh in (False, True):
    with ledger.Ledger(tmp_path, is_fresh=is_fresh) as book:
      for value in (math.nan, math.inf, [-math.inf]):
        with pytest.raises(ValueError, match="not JSON compliant"):
          book.add(dict(number=2), value)
  with ledger.Ledger(tmp_path) as book:
    assert book.take(dict(number=1)) == [0.5]
    assert book.find(dict(number=2)) is None


def test_records_come_back_with_nan_in_the_place_of_floats():
  cell = diagnostics.Cell("gap", math.inf, (1.0, math.nan))
  kept = plans.as_json(cell)
  assert kept == dict(name="gap", value=None, layers=[1.0, None])
  back = plans.restore(diagnostics.Cell, kept)
  assert math.isnan(back.value)
  assert back.layers == (1.0, None)
  assert diagnostics.rows([back])[1] == ("gap", "nan", "1.0000", "-")
