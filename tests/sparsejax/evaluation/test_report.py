"""Runs side by side, from what they left in their directories."""

import builtins
import dataclasses
import json
import math

import pytest

from sparsejax import errors
from sparsejax.configuration import record
from sparsejax.evaluation import diagnostics, perplexity, report
from tests import small

CELLS = [
  perplexity.Cell("web", "full", None, 2.0, 0.01, 7.389, 0.07, 0.9, 0.4, 1000),
  perplexity.Cell("web", "sparse", 16, 2.5, 0.01, 12.182, 0.1, 1.2, 0.3, 1000),
]
SEEN = [
  diagnostics.Cell("gap", 0.25, ()),
  diagnostics.Cell("loss_full", 3.0, ()),
  diagnostics.Cell("full/entropy", 1.5, (1.0, None, 2.0)),
]


def training_line(step, seconds, speed):
  return {
    "step": step,
    "time": 0.0,
    "train/loss": 5.0,
    "perf/step_seconds": seconds,
    "perf/tokens_per_second": speed,
    "perf/memory_gib": 1.5,
    "perf/mfu": 0.3,
  }


def validation_line(step, full, sparse):
  values = {"eval/full/loss": full, "eval/sparse/loss": sparse, "eval/gap": sparse - full}
  return {"step": step, "time": 0.0} | values


def make_workdir(folder, name="a", method="ssa", cells=CELLS, validation=True):
  """A run of 30 steps: a slow line with the compilation, then 2 s and 4 s a step."""
  workdir = folder / name
  workdir.mkdir()
  config = small.make_config(attention__method=method)
  content = dict(hash=record.digest(config), config=record.as_json(config))
  (workdir / "config.json").write_text(json.dumps(content))
  starts = [dict(device="old", num_devices=1, commit="000"), dict(
    device="cpu", num_devices=8, commit="abc123"
  )]  # fmt: skip
  (workdir / "environment.jsonl").write_text("".join(json.dumps(x) + "\n" for x in starts))
  lines = [training_line(1, 60.0, 1.0), training_line(10, 2.0, 100.0)]
  lines += [training_line(20, 4.0, 200.0), training_line(30, 4.0, 600.0)]
  if validation:
    lines += [validation_line(10, 4.0, 4.5), validation_line(30, 3.0, 3.25)]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (workdir / "metrics.jsonl").write_text(text)
  for step, scale in ((9, 100.0), (30, 1.0)) if cells else ():
    (workdir / "eval" / str(step)).mkdir(parents=True)
    written = [
      dataclasses.asdict(dataclasses.replace(cell, perplexity=scale * cell.perplexity))
      for cell in cells
    ]
    (workdir / "eval" / str(step) / "perplexity.json").write_text(
      json.dumps(dict(cells=written))
    )
  (workdir / "samples").mkdir()
  (workdir / "samples" / "9.txt").write_text("old")
  (workdir / "samples" / "30.txt").write_text("new")
  return workdir


def look_at(workdir, cells, step=30):
  """Leaves diagnostics in a workdir, as eval.py does."""
  folder = workdir / "eval" / str(step)
  folder.mkdir(parents=True, exist_ok=True)
  content = dict(cells=[dataclasses.asdict(cell) for cell in cells])
  (folder / "diagnostics.json").write_text(json.dumps(content))
  return workdir


def table_of(text):
  return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]


def test_a_run_is_read_as_it_was_left(tmp_path):
  run = report.read(make_workdir(tmp_path))
  assert run.name == "a"
  assert run.environment["commit"] == "abc123"
  assert [line["step"] for line in run.training] == [1, 10, 20, 30]
  assert [line["step"] for line in run.validation] == [10, 30]
  # Of step 30, which is newer than step 9 though not in the order of letters.
  assert run.cells == CELLS
  assert run.sample == "new"
  assert run.tokens_per_step == 8 * 64


def test_time_is_that_of_training_without_compilation(tmp_path):
  """1 step and 9 steps of 2 s, then 20 of 4 s."""
  run = report.read(make_workdir(tmp_path))
  minutes = run.minutes([{"step": 10}, {"step": 15}, {"step": 30}])
  assert minutes.tolist() == pytest.approx([20 / 60, 40 / 60, 100 / 60])


def test_the_summary_is_of_the_whole_run(tmp_path):
  run = report.read(make_workdir(tmp_path))
  summary = run.summary()
  assert summary["method"] == "ssa"
  assert summary["steps"] == 30
  assert summary["tokens"] == 30 * 512
  assert summary["minutes"] == pytest.approx(1.667)
  assert summary["tokens_per_second"] == 200.0
  assert summary["mfu"] == 0.3
  assert summary["mfu_dense_equivalent"] is None
  assert summary["memory_gib"] == 1.5
  assert summary["validation"]["eval/gap"] == 0.25
  assert summary["perplexity"] == [dataclasses.asdict(cell) for cell in CELLS]
  assert summary["config_hash"] == record.digest(small.make_config())


def test_a_report_has_a_table_a_summary_and_pictures(tmp_path):
  runs = [make_workdir(tmp_path, "a"), make_workdir(tmp_path, "b", "moba")]
  out = tmp_path / "results" / "x"
  text = report.write([report.read(path) for path in runs], out)
  assert sorted(path.name for path in out.iterdir()) == [
    "budgets.png",
    "curves.png",
    "summary.json",
    "table.md",
  ]
  for picture in ("budgets.png", "curves.png"):
    content = (out / picture).read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    assert len(content) > 5000
  summaries = json.loads((out / "summary.json").read_text())
  assert [(run["name"], run["method"]) for run in summaries] == [("a", "ssa"), ("b", "moba")]
  assert (out / "table.md").read_text() == text
  header, _, row = table_of(text)[:3]
  assert header[:5] == ["run", "method", "steps", "tokens", "minutes"]
  assert header[5:] == ["tokens/s", "device", "commit"]
  assert row == ["a", "ssa", "30", "0.0M", "1.67", "200", "8 x cpu", "abc123"]
  assert text.count("| web  | sparse    | 16     |") == 2


def test_runs_without_validation_or_evaluation_are_reported_too(tmp_path):
  """Beside one that has both."""
  bare = make_workdir(tmp_path, "bare", cells=[], validation=False)
  run = report.read(bare)
  assert run.cells == run.validation == []
  text = report.write([run, report.read(make_workdir(tmp_path))], tmp_path / "out")
  assert text.count("| web ") == 2
  assert run.summary()["validation"] is None
  report.write([run, report.read(make_workdir(tmp_path, "c", cells=[]))], tmp_path / "more")
  assert not (tmp_path / "more" / "budgets.png").exists()


def test_diagnostics_are_those_of_the_newest_step_that_has_them(tmp_path):
  """Step 100 has none; step 30 is newer than step 9."""
  workdir = make_workdir(tmp_path)
  assert report.read(workdir).diagnostics == report.read(workdir).summary()["diagnostics"] == []
  look_at(look_at(workdir, SEEN[:1], step=9), SEEN)
  (workdir / "eval" / "100").mkdir()
  run = report.read(workdir)
  assert run.diagnostics == SEEN
  assert run.summary()["diagnostics"] == [dataclasses.asdict(cell) for cell in SEEN]


def test_diagnostics_have_a_picture_and_a_table(tmp_path):
  """Rows in an order of their own; numbers that it does not know come last."""
  names = ["kl", "gap", "sparse/union", "later", "sparse/entropy", "full/union"]
  more = [diagnostics.Cell(name, 0.125, ()) for name in names]
  runs = [
    report.read(look_at(make_workdir(tmp_path, "a"), SEEN)),
    report.read(make_workdir(tmp_path, "b")),
    report.read(look_at(make_workdir(tmp_path, "c"), more)),
  ]
  text = report.write(runs, tmp_path / "out")
  assert (tmp_path / "out" / "diagnostics.png").read_bytes().startswith(b"\x89PNG\r\n")
  _, table = text.split("\ndiagnostics, means over layers\n\n")
  header, _, *rows = table_of(table)
  assert header == ["number", "a", "b", "c"]
  assert rows == [
    ["loss_full", "3.0000", "-", "-"],
    ["gap", "0.2500", "-", "0.1250"],
    ["kl", "-", "-", "0.1250"],
    ["full/entropy", "1.5000", "-", "-"],
    ["sparse/entropy", "-", "-", "0.1250"],
    ["full/union", "-", "-", "0.1250"],
    ["sparse/union", "-", "-", "0.1250"],
    ["later", "-", "-", "0.1250"],
  ]
  text = report.write(runs[1:2], tmp_path / "none")
  assert "diagnostics" not in text
  assert not (tmp_path / "none" / "diagnostics.png").exists()


def test_a_directory_that_is_no_run_is_refused(tmp_path):
  with pytest.raises(errors.DataError, match=r"elsewhere is not the workdir of a run: "):
    report.read(tmp_path / "elsewhere")
  workdir = make_workdir(tmp_path)
  (workdir / "metrics.jsonl").write_text(json.dumps(validation_line(1, 2.0, 2.0)))
  with pytest.raises(errors.DataError, match=r"metrics.jsonl has no training step\."):
    report.read(workdir)


def test_a_run_of_an_earlier_report_is_read_from_its_summary(tmp_path):
  run = report.read(look_at(make_workdir(tmp_path), SEEN))
  report.write([run], tmp_path / "first")
  again = report.read(f"{tmp_path}/first/summary.json:a")
  assert again == run
  with pytest.raises(errors.DataError, match=r"summary.json has no run 'b'; there are a\."):
    report.read(f"{tmp_path}/first/summary.json:b")
  with pytest.raises(errors.DataError, match=r"none.json is not the summary of a report"):
    report.read(f"{tmp_path}/none.json:a")


def test_a_report_from_before_there_were_diagnostics_is_read(tmp_path):
  run = report.read(make_workdir(tmp_path))
  summary = run.summary()
  del summary["diagnostics"]
  (tmp_path / "summary.json").write_text(json.dumps([summary]))
  assert report.read(f"{tmp_path}/summary.json:a") == run


def test_the_command_line(tmp_path, capsys):
  workdir, out = make_workdir(tmp_path), tmp_path / "out"
  assert report.main([str(workdir), f"--out={out}"]) == 0
  said = capsys.readouterr()
  assert said.out == f"{(out / 'table.md').read_text()}\nsaved in {out}\n"
  assert report.main([str(tmp_path / "nowhere"), f"--out={out}"]) == 2
  said = capsys.readouterr()
  assert said.err.startswith(f"error: {tmp_path / 'nowhere'} is not the workdir of a run")
  assert said.out == ""


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
  import_ = builtins.__import__

  def without_matplotlib(name, *arguments):
    if name == "matplotlib":
      raise ImportError(name)
    return import_(name, *arguments)

  run = report.read(make_workdir(tmp_path))
  monkeypatch.setattr(builtins, "__import__", without_matplotlib)
  with pytest.raises(errors.UserError, match=r"matplotlib; pip install -e '\.\[eval\]'"):
    report.write([run], tmp_path / "out")


def test_numbers_that_are_not_finite_are_null_in_the_summary_and_read_again(tmp_path):
  """Of a run of one logged step, which has no speed, that diverged; its pictures are drawn."""
  cells = [dataclasses.replace(CELLS[0], loss=math.nan, perplexity=math.nan), CELLS[1]]
  workdir = make_workdir(tmp_path, cells=cells)
  look_at(workdir, [diagnostics.Cell("gap", math.nan, ()), SEEN[2]])
  lines = [training_line(1, 60.0, 1.0), validation_line(1, math.inf, math.nan)]
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  out = tmp_path / "first"
  text = report.write([report.read(workdir)], out)
  (summary,) = json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)
  assert summary["tokens_per_second"] is None
  assert summary["perplexity"][0]["perplexity"] is None
  assert summary["validation"]["eval/full/loss"] is None
  again = report.write([report.read(f"{out}/summary.json:a")], tmp_path / "second")
  assert again == text
  assert json.loads((tmp_path / "second" / "summary.json").read_text()) == [summary]
  assert (tmp_path / "second" / "diagnostics.png").is_file()
