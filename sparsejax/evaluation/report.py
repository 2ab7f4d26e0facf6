"""Sets runs side by side: their curves as pictures, their tables and speed as JSON.

  python -m sparsejax.evaluation.report runs/full_20m runs/moba_20m runs/ssa_20m \
    --out=results/20m

Reads what train.py and eval.py left in each workdir; needs no checkpoint and no GPU. A run
of an earlier report is named by its summary: results/20m/summary.json:full_20m.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import json
import pathlib
import sys
from typing import Any

import numpy as np

from sparsejax import errors
from sparsejax.evaluation import perplexity, table


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
    sample: text written after the last step.
  """

  name: str
  config: dict[str, Any]
  config_hash: str
  environment: dict[str, Any]
  training: list[dict[str, float]]
  validation: list[dict[str, float]]
  cells: list[perplexity.Cell]
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
    cells=_newest_cells(workdir / "eval"),
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
    training=summary["training_curve"],
    validation=summary["validation_curve"],
    cells=[perplexity.Cell(**cell) for cell in summary["perplexity"]],
    sample=summary["sample"],
  )


def write(runs: Sequence[Run], out: str | pathlib.Path) -> str:
  """Writes `summary.json`, `table.md`, `curves.png` and `budgets.png`; returns the table."""
  out = pathlib.Path(out)
  out.mkdir(parents=True, exist_ok=True)
  (out / "summary.json").write_text(json.dumps([r.summary() for r in runs], indent=1) + "\n")
  text = markdown(runs)
  (out / "table.md").write_text(text)
  _draw_curves(runs, out / "curves.png")
  if any(run.cells for run in runs):
    _draw_budgets(runs, out / "budgets.png")
  return text


def markdown(runs: Sequence[Run]) -> str:
  """Speed of every run, then perplexity of every run."""
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
  parts = [table.align([header, *rows])]
  parts += [f"{run.name}\n\n{table.markdown(run.cells)}" for run in runs if run.cells]
  return "\n".join(parts)


def _newest_cells(folder: pathlib.Path) -> list[perplexity.Cell]:
  found = sorted(folder.glob("*/perplexity.json"), key=lambda path: int(path.parent.name))
  if not found:
    return []
  return [perplexity.Cell(**cell) for cell in json.loads(found[-1].read_text())["cells"]]


def _newest_sample(folder: pathlib.Path) -> str:
  found = sorted(folder.glob("*.txt"), key=lambda path: int(path.stem))
  return found[-1].read_text() if found else ""


def _draw_curves(runs: Sequence[Run], path: pathlib.Path) -> None:
  """Validation loss and the gap between the modes, by tokens and by time."""
  plt = _pyplot()
  figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex="col", layout="constrained")
  for number, run in enumerate(runs):
    if not run.validation:
      continue
    color = f"C{number}"
    tokens = [r["step"] * run.tokens_per_step / 1e6 for r in run.validation]
    for column, x in enumerate((tokens, run.minutes(run.validation))):
      for stream, style in (("full", "-"), ("sparse", "--")):
        y = [r[f"eval/{stream}/loss"] for r in run.validation]
        label = f"{run.name}, {stream} inference"
        axes[0, column].plot(x, y, style, color=color, marker=".", label=label)
      gap = [r["eval/gap"] for r in run.validation]
      axes[1, column].plot(x, gap, color=color, marker=".", label=run.name)
  axes[0, 0].set_ylabel("validation loss (nats/token)")
  axes[1, 0].set_ylabel("sparse - full (nats/token)")
  axes[1, 0].set_xlabel("training tokens (millions)")
  axes[1, 1].set_xlabel("training time (minutes)")
  axes[1, 0].axhline(0.0, color="black", linewidth=0.5)
  axes[1, 1].axhline(0.0, color="black", linewidth=0.5)
  axes[0, 0].legend(fontsize="small")
  axes[1, 0].legend(fontsize="small")
  figure.savefig(path, dpi=120)
  plt.close(figure)


def _draw_budgets(runs: Sequence[Run], path: pathlib.Path) -> None:
  """Perplexity against the keys that a query reads; full inference as a line across."""
  plt = _pyplot()
  figure, axis = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
  for number, run in enumerate(runs):
    color = f"C{number}"
    sparse = sorted((c.budget, c.perplexity) for c in run.cells if c.mode == "sparse")
    if sparse:
      axis.plot(
        *zip(*sparse, strict=True), marker="o", color=color, label=f"{run.name}, sparse"
      )
    for cell in run.cells:
      if cell.mode == "full":
        label = f"{run.name}, full"
        axis.axhline(cell.perplexity, color=color, linestyle=":", label=label)
  axis.set_xscale("log", base=2)
  axis.set_xlabel("budget (keys a query reads)")
  axis.set_ylabel("validation perplexity")
  axis.legend(fontsize="small")
  figure.savefig(path, dpi=120)
  plt.close(figure)


def _pyplot():
  try:
    import matplotlib
  except ImportError:
    raise errors.UserError(
      "pictures need the package matplotlib; install sparsejax[eval]."
    ) from None
  # Draws into files wherever it runs.
  matplotlib.use("Agg")
  from matplotlib import pyplot

  return pyplot


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
