r"""Sets runs side by side: their curves as pictures, their tables and speed as JSON.

  python -m sparsejax.evaluation.report runs/full_20m runs/moba_20m runs/ssa_20m \
    --out=results/20m

Reads what train.py and eval.py left in each workdir; needs no checkpoint and no GPU. A run
of an earlier report is named by its summary: results/20m/summary.json:full_20m.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import json
import math
import pathlib
import sys
from typing import Any

import numpy as np

from sparsejax import errors
from sparsejax.evaluation import diagnostics, markdown, perplexity, pictures, plans

# Diagnostics in the order of rows and panels, whatever the stream; others come after these.
_ORDER = (
  *("loss_full", "loss_sparse", "gap", "kl"),
  *("attn_sparsity", "entropy", "sink"),
  *("overlap_mean", "overlap_min", "forced_share", "union", "align"),
)


@dataclasses.dataclass(frozen=True)
class Run:
  """What one workdir tells.

  Attributes:
    name: of the workdir.
    config: every key by its dotted path.
    config_hash: of the same.
    environment: of the last start: versions, commit, device, command.
    training: logged values of training steps, in order, each with `step` and `time`.
    validation: the same for validations.
    cells: of the perplexity table of the last evaluated step.
    diagnostics: numbers of the last step that was looked at.
    sample: text written after the last step.
  """

  name: str
  config: dict[str, Any]
  config_hash: str
  environment: dict[str, Any]
  training: list[dict[str, float]]
  validation: list[dict[str, float]]
  cells: list[perplexity.Cell]
  diagnostics: list[diagnostics.Cell]
  sample: str

  @property
  def tokens_per_step(self) -> int:
    return self.config["data.batch_size"] * self.config["data.sequence_length"]

  def minutes(self, records: Sequence[dict[str, float]]) -> np.ndarray:
    """Training time at each record's step, pauses for validation left out."""
    steps = [0, *(r["step"] for r in self.training)]
    # The first line of a run carries the compilation; the speed is that of the lines after.
    seconds = [r["perf/step_seconds"] for r in self.training]
    seconds[0] = seconds[min(1, len(seconds) - 1)]
    clock = np.cumsum(np.diff(steps) * np.array(seconds)) / 60
    return np.interp([r["step"] for r in records], steps, [0.0, *clock])

  def summary(self) -> dict[str, Any]:
    """The run as it goes into JSON."""
    speeds = [r["perf/tokens_per_second"] for r in self.training[1:]] or [float("nan")]
    last = self.training[-1]
    # Of runs from before layers could differ there is one name alone.
    config = {"attention.layer_methods": ()} | self.config
    return dict(
      name=self.name,
      method="+".join(config["attention.layer_methods"]) or config["attention.method"],
      steps=int(last["step"]),
      tokens=int(last["step"] * self.tokens_per_step),
      minutes=round(float(self.minutes([last])[0]), 3),
      tokens_per_second=float(np.median(speeds)),
      mfu=last.get("perf/mfu"),
      mfu_dense_equivalent=last.get("perf/mfu_dense_equivalent"),
      memory_gib=last["perf/memory_gib"],
      validation=self.validation[-1] if self.validation else None,
      perplexity=[dataclasses.asdict(cell) for cell in self.cells],
      diagnostics=[dataclasses.asdict(cell) for cell in self.diagnostics],
      config_hash=self.config_hash,
      config=self.config,
      environment=self.environment,
      sample=self.sample,
      training_curve=self.training,
      validation_curve=self.validation,
    )


def read(source: str | pathlib.Path) -> Run:
  """Reads a workdir, or what a report says of a run (`FILE.json:NAME`).

  Raises:
    DataError: it is neither, or has no logged step.
  """
  file, _, name = str(source).rpartition(":")
  if file.endswith(".json"):
    return _read_summary(pathlib.Path(file), name)
  workdir = pathlib.Path(source)
  try:
    config = json.loads((workdir / "config.json").read_text())
    environment = (workdir / "environment.jsonl").read_text().splitlines()[-1]
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
  except OSError as error:
    raise errors.DataError(f"{workdir} is not the workdir of a run: {error}") from error
  records = [json.loads(line) for line in lines]
  training = [r for r in records if "train/loss" in r]
  if not training:
    raise errors.DataError(f"{workdir}/metrics.jsonl has no training step.")
  return Run(
    name=workdir.name,
    config=config["config"],
    config_hash=config["hash"],
    environment=json.loads(environment),
    training=training,
    validation=[r for r in records if "eval/full/loss" in r],
    cells=_perplexity(_newest_cells(workdir / "eval", "perplexity")),
    diagnostics=_diagnostics(_newest_cells(workdir / "eval", "diagnostics")),
    sample=_newest_sample(workdir / "samples"),
  )


def _read_summary(path: pathlib.Path, name: str) -> Run:
  try:
    summaries = {summary["name"]: summary for summary in json.loads(path.read_text())}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise errors.DataError(f"{path} is not the summary of a report: {error!r}") from error
  if name not in summaries:
    raise errors.DataError(f"{path} has no run {name!r}; there are {', '.join(summaries)}.")
  summary = summaries[name]
  return Run(
    name=name,
    config=summary["config"],
    config_hash=summary["config_hash"],
    environment=summary["environment"],
    training=_records(summary["training_curve"]),
    validation=_records(summary["validation_curve"]),
    cells=_perplexity(summary["perplexity"]),
    # Reports from before there were diagnostics say nothing of them.
    diagnostics=_diagnostics(summary.get("diagnostics", [])),
    sample=summary["sample"],
  )


def write(runs: Sequence[Run], out: str | pathlib.Path) -> str:
  """Writes `summary.json`, `table.md` and pictures; returns the table.

  The pictures are `curves.png`, `budgets.png` where a run has a perplexity table, and
  `diagnostics.png` where a run has diagnostics.
  """
  out = pathlib.Path(out)
  out.mkdir(parents=True, exist_ok=True)
  (out / "summary.json").write_text(plans.text([r.summary() for r in runs], indent=1))
  text = table(runs)
  (out / "table.md").write_text(text)
  pictures.draw_curves(runs, out / "curves.png")
  if any(run.cells for run in runs):
    pictures.draw_budgets(runs, out / "budgets.png")
  if any(run.diagnostics for run in runs):
    pictures.draw_diagnostics(runs, _names(runs), out / "diagnostics.png")
  return text


def table(runs: Sequence[Run]) -> str:
  """Speed of every run, then perplexity of every run, then diagnostics side by side."""
  header = ("run", "method", "steps", "tokens", "minutes", "tokens/s", "device", "commit")
  rows = []
  for run in runs:
    summary = run.summary()
    rows.append(
      (
        run.name,
        summary["method"],
        f"{summary['steps']:,}",
        f"{summary['tokens'] / 1e6:.1f}M",
        f"{summary['minutes']:.2f}",
        f"{summary['tokens_per_second']:,.0f}",
        f"{run.environment['num_devices']} x {run.environment['device']}",
        run.environment["commit"],
      )
    )
  parts = [markdown.align([header, *rows])]
  parts += [
    f"{run.name}\n\n{markdown.align(perplexity.rows(run.cells))}" for run in runs if run.cells
  ]
  if any(run.diagnostics for run in runs):
    parts.append(f"diagnostics, means over layers\n\n{markdown.align(_side_by_side(runs))}")
  return "\n".join(parts)


def _side_by_side(runs: Sequence[Run]) -> list[tuple[str, ...]]:
  """A row for each number of diagnostics, a column for each run; the header first."""
  values = [{cell.name: f"{cell.value:.4f}" for cell in run.diagnostics} for run in runs]
  return [
    ("number", *(run.name for run in runs)),
    *((name, *(of_run.get(name, "-") for of_run in values)) for name in _names(runs)),
  ]


def _names(runs: Sequence[Run]) -> list[str]:
  """Numbers that some run has, each `full/` followed by its `sparse/`."""

  def place(name: str):
    number = name.rpartition("/")[2]
    return _ORDER.index(number) if number in _ORDER else len(_ORDER), number, name

  return sorted({cell.name for run in runs for cell in run.diagnostics}, key=place)


def _newest_cells(folder: pathlib.Path, task: str) -> list[dict[str, Any]]:
  found = sorted(folder.glob(f"*/{task}.json"), key=lambda path: int(path.parent.name))
  return json.loads(found[-1].read_text())["cells"] if found else []


def _perplexity(cells: Sequence[dict[str, Any]]) -> list[perplexity.Cell]:
  return [perplexity.from_json(cell) for cell in cells]


def _diagnostics(cells: Sequence[dict[str, Any]]) -> list[diagnostics.Cell]:
  return [plans.restore(diagnostics.Cell, cell) for cell in cells]


def _records(lines: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
  """Logged values from JSON, NaN where they were not finite."""
  return [{name: math.nan if x is None else x for name, x in line.items()} for line in lines]


def _newest_sample(folder: pathlib.Path) -> str:
  found = sorted(folder.glob("*.txt"), key=lambda path: int(path.stem))
  return found[-1].read_text() if found else ""


def main(arguments: list[str] | None = None) -> int:
  """The command line; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m sparsejax.evaluation.report",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("runs", nargs="+", help="workdirs, or runs of reports: FILE.json:NAME")
  parser.add_argument("--out", required=True, help="directory to write")
  options = parser.parse_args(arguments)
  try:
    text = write([read(run) for run in options.runs], options.out)
  except errors.UserError as error:
    sys.stderr.write(f"error: {error}\n")
    return 2
  sys.stdout.write(f"{text}\nsaved in {options.out}\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
