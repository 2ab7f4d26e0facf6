"""What the sparsity task makes of the numbers of heads: cells, table, pictures, refusals."""

import dataclasses
import math

import numpy as np
import pytest

from sparsejax import errors
from sparsejax.diagnostics import by_head
from sparsejax.evaluation import contexts, pictures, plans, sparsity, sparsity_show, tasks
from sparsejax.evaluation import request as requests
from tests.sparsejax.evaluation import nosa as checkpoint

LENGTHS, BUDGETS, ROWS, LAYERS, HEADS, KEY_HEADS = (40, 64), (24, 32), 3, 2, 4, 2


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "nosa"
  checkpoint.save(workdir)
  return checkpoint.load(workdir)


def numbers(budget, length, stream, name):
  """Made up, [layers, rows, heads]; in the full stream layer 0 has no `error`."""
  seed = budget, length, *stream.encode(), *name.encode()
  heads = KEY_HEADS if name in by_head.OF_KEY_HEADS else HEADS
  values = np.random.default_rng(seed).random((LAYERS, ROWS, heads))
  if (name, stream) == ("error", "full"):
    values[0] = np.nan
  return values


def made_up(seen):
  """In place of `by_head.make`; tells rows apart by their first id, and keeps all it sees."""

  def make(transformer, **_):
    budget = transformer.options.budget

    def measure(_, ids_BT):
      seen.append((budget, np.asarray(ids_BT)))
      of_batch = [row for ids in np.asarray(ids_BT) for row in np.flatnonzero(ids[0] == firsts)]
      heads = {
        f"{stream}/{name}": numbers(budget, ids_BT.shape[1], stream, name)[:, of_batch]
        for stream in by_head.STREAMS
        for name in sparsity.NAMES
        if name != "kl"
      }
      kl_R = numbers(budget, ids_BT.shape[1], "both", "kl")[0, :, 0]
      return by_head.Heads(heads, kl_R[of_batch])

    return measure

  firsts = np.arange(ROWS)
  return make


@pytest.fixture
def made(monkeypatch):
  """What models are given to look at, who then say what was made up."""
  seen = []
  monkeypatch.setattr(by_head, "make", made_up(seen))
  rows = np.arange(ROWS)[:, None] + 10 * np.arange(max(LENGTHS), dtype=np.int32)
  monkeypatch.setattr(contexts, "rows", lambda _, num, length: rows[:num, :length])
  return seen


@pytest.fixture
def cells(subject, made):
  return sparsity.run(subject, budgets=BUDGETS, lengths=LENGTHS, num_rows=ROWS, batch_size=2)


def find(cells, name, mode, budget, length):
  (cell,) = (
    c for c in cells if (c.name, c.mode, c.budget, c.length) == (name, mode, budget, length)
  )
  return cell


def test_there_is_a_cell_for_each_number_mode_budget_and_length(cells):
  of_any = {(cell.name, cell.mode) for cell in cells if cell.budget is None}
  assert of_any == {("entropy", "full"), ("sink", "full")}
  # Of both modes but for kl; and but for those two at every budget.
  by_budget = 2 * (len(sparsity.NAMES) - 1) + 1 - len(of_any)
  assert len(cells) == len(LENGTHS) * (len(of_any) + by_budget * len(BUDGETS))
  assert {cell.num_rows for cell in cells} == {ROWS}


def test_lengths_and_budgets_are_of_the_same_rows(cells, made):
  assert {(budget, ids.shape) for budget, ids in made} == {
    (budget, (2, length)) for budget in BUDGETS for length in LENGTHS
  }
  for _, ids in made:
    np.testing.assert_array_equal(np.diff(ids, axis=1), 10)


def error_of(x_R):
  return pytest.approx(x_R.std(ddof=1) / math.sqrt(ROWS))


@pytest.mark.parametrize(("budget", "length"), [(24, 40), (32, 64)])
def test_means_and_errors_are_over_rows(cells, budget, length):
  x_LRH = numbers(budget, length, "sparse", "error")
  cell = find(cells, "error", "sparse", budget, length)
  assert (cell.value, cell.se) == (pytest.approx(x_LRH.mean()), error_of(x_LRH.mean((0, 2))))
  of_layer = cell.layers[1], cell.layers_se[1]
  assert of_layer == (pytest.approx(x_LRH[1].mean()), error_of(x_LRH[1].mean(-1)))
  # Of heads in five and in two digits.
  x_R = x_LRH[1, :, 2]
  of_head = cell.heads[1][2], cell.heads_se[1][2]
  error = x_R.std(ddof=1) / math.sqrt(ROWS)
  assert of_head == (float(f"{x_R.mean():.5g}"), float(f"{error:.2g}"))
  kl_R = numbers(budget, length, "both", "kl")[0, :, 0]
  cell = find(cells, "kl", None, budget, length)
  assert (cell.value, cell.se) == (pytest.approx(kl_R.mean()), error_of(kl_R))
  assert (cell.layers, cell.heads) == ((), ())


def test_extremes_are_of_all_rows_and_have_no_error(cells):
  least, most = (find(cells, name, "full", 24, 40) for name in ("gamma_min", "error_to_bound"))
  x_LRK, x_LRH = (numbers(24, 40, "full", cell.name) for cell in (least, most))
  assert (least.value, least.layers[0], least.heads[1][1]) == (
    *(x_LRK.min(), x_LRK[0].min()),
    pytest.approx(x_LRK[1, :, 1].min(), rel=5e-5),
  )
  assert (most.value, most.layers[0], most.heads[1][3]) == (
    *(x_LRH.max(), x_LRH[0].max()),
    pytest.approx(x_LRH[1, :, 3].max(), rel=5e-5),
  )
  assert (least.se, least.layers_se, least.heads_se) == (None, (None, None), (None, None))


def test_layers_without_a_number_are_left_out(cells):
  cell = find(cells, "error", "full", 24, 40)
  assert cell.value == pytest.approx(numbers(24, 40, "full", "error")[1].mean())
  assert (cell.layers[0], cell.heads[0], cell.heads_se[0]) == (None, None, None)


def test_theorems_hold_of_a_model(subject):
  found = sparsity.run(subject, budgets=(32,), num_rows=3, batch_size=2)
  for mode in by_head.STREAMS:
    most = find(found, "error_to_bound", mode, 32, 64)
    assert 0.1 < most.value <= most.limit == 1
    least = find(found, "gamma_min", mode, 32, 64)
    # One block by the query and one that is new, of four.
    assert least.limit == 0.5 <= least.value < 1
    for name, highest in (("attn_sparsity", 1.0), ("entropy", 6.0), ("sink", 1.0)):
      is_of_any = mode == "full" and name != "attn_sparsity"
      cell = find(found, name, mode, None if is_of_any else 32, 64)
      assert 0 < cell.value < highest
      assert 0 < cell.se < cell.value
  assert 0 < find(found, "kl", None, 32, 64).value < 1


def test_a_budget_that_reads_rows_whole_drops_nothing(subject):
  found = sparsity.run(subject, budgets=(64,), lengths=(40,), num_rows=1, modes=("full",))
  assert {cell.name for cell in found} == {"entropy", "sink", "gamma", "gamma_min", "kl"}
  assert find(found, "kl", None, 64, 40).value == pytest.approx(0.0, abs=1e-6)
  assert find(found, "entropy", "full", None, 40).se is None


@pytest.mark.parametrize(
  ("asked", "kind", "message"),
  [
    (
      dict(lengths=(65,)),
      errors.ConfigError,
      "--lengths=65 exceeds .* 64 tokens; .*--sequence",
    ),
    (dict(budgets=(20,)), errors.ConfigError, "--budgets=20 is not a whole number of blocks"),
    (dict(num_rows=10**6), errors.DataError, "1000000 rows of 64 tokens are more than"),
  ],
)
def test_what_cannot_be_looked_at_is_refused(subject, asked, kind, message):
  with pytest.raises(kind, match=message):
    sparsity.run(subject, **asked)


def test_what_chooses_no_blocks_is_refused(subject):
  options = dataclasses.replace(subject.transformer.options, method="sliding_window")
  windowed = dataclasses.replace(
    subject, transformer=subject.transformer.clone(options=options)
  )
  with pytest.raises(
    errors.ConfigError, match="'sliding_window' chooses no blocks in rows of 64"
  ):
    sparsity.run(windowed)


def test_the_table_has_a_column_for_each_length(cells):
  header, *rows = sparsity_show.rows(cells)
  assert header == ("number", "inference", "budget", "40 tokens", "64 tokens", "limit")
  # Of markdown, which knows a column by its line.
  assert "|" not in "".join("".join(row) for row in rows)
  (line,) = (row for row in rows if row[:3] == ("AttnSparsity", "full", "32"))
  for text, length in zip(line[3:5], LENGTHS, strict=True):
    cell = find(cells, "attn_sparsity", "full", 32, length)
    assert text == f"{cell.value:.4f} ± {cell.se:.4f}"
  limits = {row[2]: row[-1] for row in rows if row[0] == "least gamma"}
  assert limits == {"24": "0.3333", "32": "0.5000"}
  (line,) = (row for row in rows if row[:3] == ("sink mass", "full", "-"))
  assert line[-1] == "-"


def test_the_task_leaves_numbers_and_pictures(subject, made, tmp_path):
  request = requests.Request(
    path="run", modes=("full",), lengths=(40,), budgets=BUDGETS, max_rows=ROWS, batch_size=2
  )
  planned = tasks.TASKS["sparsity"](subject, request, tmp_path)
  told = planned.tell(plans.measure(planned.units, subject))
  assert "maps of layer by head in sparsity/\n" in told.text
  assert "| AttnSparsity " in told.text
  assert [find(told.cells, "gamma", "full", budget, 40).num_rows for budget in BUDGETS] == [
    3,
    3,
  ]
  drawn = {path.name for path in (tmp_path / "sparsity").iterdir()}
  assert drawn == {"by_length.png", "heads_full_24_40.png", "heads_full_32_40.png"}
  assert {path.name for path in told.pictures} == drawn


def test_rows_of_two_checkpoints_are_compared(subject, made):
  asked = dict(budgets=(24,), lengths=(40,), num_rows=ROWS)
  (unit,) = sparsity.plan(subject, modes=("sparse",), **asked)
  (value,) = plans.measure([unit], subject)
  found = {(x.metric, x.mode): x for x in unit.samples(value)}
  kept = found["AttnSparsity", "sparse"]
  expected = numbers(24, 40, "sparse", "attn_sparsity").mean((0, 2))
  np.testing.assert_allclose(kept.sums, expected)
  assert (kept.weights, kept.budget, kept.what) == ((1.0,) * ROWS, 24, "40 tokens")
  kl = found["KL(full to sparse), nats", "sparse"]
  np.testing.assert_allclose(kl.sums, numbers(24, 40, "both", "kl")[0, :, 0])
  assert len(found) == 2


def test_curves_and_maps_show_what_cells_say(cells, tmp_path, monkeypatch):
  figures = []
  plt = pictures.pyplot()
  monkeypatch.setattr(plt, "close", figures.append)
  some = [c for c in cells if c.budget in (None, 24) and c.mode != "sparse"]
  sparsity_show.draw(some, tmp_path)
  curves, *maps = figures
  panels = {axis.get_title(): axis for axis in curves.axes}
  lines = panels["AttnSparsity"].get_lines()
  values = [find(cells, "attn_sparsity", "full", 24, n).value for n in LENGTHS]
  assert any(np.array_equal(line.get_xydata(), np.c_[LENGTHS, values]) for line in lines)
  assert len(maps) == len(LENGTHS)
  shown = {axis.get_title().partition(":")[0]: axis for axis in maps[0].axes}
  image = shown["error of Theorem 1"].get_images()[0].get_array().filled(np.nan)
  assert np.isnan(image[0]).all()
  np.testing.assert_allclose(image[1], find(cells, "error", "full", 24, 40).heads[1])


def test_without_matplotlib_the_numbers_are_kept(cells, tmp_path, monkeypatch):
  monkeypatch.setattr(pictures, "why_none", lambda: "there is none.")
  assert sparsity_show.draw(cells, tmp_path / "new") == ("no pictures: there is none.\n", ())
  assert not (tmp_path / "new").exists()
