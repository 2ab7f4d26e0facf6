"""Puts evaluations to a checkpoint and writes down what came out."""

from collections.abc import Sequence
import dataclasses
import json
import math
import pathlib

import ml_collections
import numpy as np

from sparsejax import errors
from sparsejax.configuration import checks, record
from sparsejax.evaluation import (
  block_lists,
  decode_timing,
  diagnostics,
  harness,
  locality,
  perplexity,
  pictures,
  throughput,
)
from sparsejax.evaluation import subject as subjects
from sparsejax.evaluation.needles import show as needle_tables
from sparsejax.evaluation.needles import task as needles

# That throughput decodes together, if nobody says how many.
_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Request:
  """What to evaluate, and how.

  Attributes:
    path: a workdir or a checkpoint.
    step: of a workdir; None is the newest.
    tasks: names of `TASKS`.
    modes: of inference.
    budgets: keys a query reads under sparse inference; () is that of training.
    sources: data instead of the checkpoint's own.
    sequence_length: tokens per row; None is that of training.
    max_rows: rows of each source; 0 takes all.
    batch_size: rows at once; 0 is that of training.
    kernels: `auto` or `strict`; None is as trained.
    lengths: contexts, in tokens, after which is decoded; () is half of `sequence_length`. Of
      questions about needles, their lengths; () is `sequence_length`.
    num_steps: that are decoded after a context.
    spare: slots for blocks beyond those of a list; () is 0, 16, 32 and 64 for locality, and
      all pages on the device for throughput.
    kv_gib: sizes of caches on the device, of which throughput takes its rows.
    about_needles: what is asked about needles.
    lm_eval: what the task of that name asks.
    out: directory for the results; None is `eval/STEP` in the workdir.
  """

  path: str | pathlib.Path
  step: int | None = None
  tasks: tuple[str, ...] = ("perplexity",)
  modes: tuple[str, ...] = perplexity.MODES
  budgets: tuple[int, ...] = ()
  sources: tuple[str, ...] = ()
  sequence_length: int | None = None
  max_rows: int = 0
  batch_size: int = 0
  kernels: str | None = None
  lengths: tuple[int, ...] = ()
  num_steps: int = 128
  spare: tuple[int, ...] = ()
  kv_gib: tuple[float, ...] = ()
  about_needles: needles.Settings = dataclasses.field(default_factory=needles.Settings)
  lm_eval: harness.Options = dataclasses.field(default_factory=harness.Options)
  out: str | pathlib.Path | None = None


def run(request: Request, template: ml_collections.ConfigDict) -> tuple[str, pathlib.Path]:
  """Answers a request; returns what to print, and the directory of the files.

  That is what the model ran on, a line for each operation and each choice that budgets make
  for it, and the tables as markdown.
  Each task leaves `TASK.json` (with config, commit, versions and device) and `TASK.md`;
  block_lists also `block_lists.npy`, int32 [layers, T, K, M], and locality for every context
  `lists/CONTEXT.npy`, int32 [steps, layers, rows, K, M]; throughput also a picture, and needle
  its maps in `needle`.

  Args:
    request: what to do.
    template: the config with every key (configs/base.py).

  Raises:
    UserError: and its kinds, for what cannot be answered.
  """
  for task in request.tasks:
    if task not in TASKS:
      raise errors.ConfigError(errors.one_of("task", task, TASKS))
  for mode in request.modes:
    if mode not in perplexity.MODES:
      raise errors.ConfigError(errors.one_of("mode", mode, perplexity.MODES))
  kernels = checks.CHOICES["attention.kernels"]
  if request.kernels not in (None, *kernels):
    raise errors.ConfigError(errors.one_of("--kernels", request.kernels, kernels))
  short = [length for length in request.lengths if length < 1]
  if short:
    raise errors.ConfigError(f"--lengths={short[0]} must be at least 1.")
  if request.num_steps < 2:
    raise errors.ConfigError(f"--num_steps={request.num_steps} must be at least 2.")
  if "needle" in request.tasks:
    needles.check_lengths(request.lengths)
  if "lm_eval" in request.tasks:
    harness.check(request.lm_eval)
  subject = subjects.load(
    request.path,
    template,
    step=request.step,
    sources=request.sources,
    sequence_length=request.sequence_length,
    kernels=request.kernels,
    budgets=request.budgets,
  )
  out = pathlib.Path(request.out or subject.path.parent.parent / "eval" / str(subject.step))
  tables = []
  for task in request.tasks:
    cells, text = TASKS[task](subject, request, out)
    tables.append(_write(task, cells, text, subject, out))
  backends = "".join(f"backend of {choice}\n" for choice in subject.backends)
  return backends + "\n".join(tables), out


def _perplexity(subject, request: Request, out):
  cells = perplexity.run(
    subject,
    modes=request.modes,
    budgets=request.budgets,
    max_rows=request.max_rows,
    batch_size=request.batch_size,
  )
  return cells, markdown(cells)


def _block_lists(subject, request: Request, out):
  del request  # modes and budgets are not of this question
  blocks_LTKM = block_lists.choose(subject)
  out.mkdir(parents=True, exist_ok=True)
  np.save(out / "block_lists.npy", blocks_LTKM)
  cells = block_lists.describe(blocks_LTKM, subject.config.attention.block_size)
  return cells, align(block_lists.rows(cells))


def _diagnostics(subject, request: Request, out):
  del request, out
  cells = diagnostics.run(subject)
  return cells, align(diagnostics.rows(cells))


def _locality(subject, request: Request, out):
  cells = []
  for context in request.lengths or (subject.config.data.sequence_length // 2,):
    lists_SLBKM = locality.record(
      subject, context, num_rows=request.max_rows or 1, num_steps=request.num_steps
    )
    (out / "lists").mkdir(parents=True, exist_ok=True)
    np.save(out / "lists" / f"{context}.npy", lists_SLBKM)
    cells += locality.run(subject, lists_SLBKM, context, request.spare or (0, 16, 32, 64))
  return cells, align(locality.rows(cells))


def _throughput(subject, request: Request, out):
  cells = throughput.run(
    subject,
    modes=request.modes,
    budgets=request.budgets,
    lengths=request.lengths or (subject.config.data.sequence_length // 2,),
    num_rows=request.batch_size or _ROWS,
    kv_gib=request.kv_gib,
    spare=request.spare,
    num_steps=request.num_steps,
  )
  out.mkdir(parents=True, exist_ok=True)
  text = align(decode_timing.rows(cells))
  # What was measured is not lost for want of a picture.
  if (reason := pictures.why_none()) is not None:
    return cells, f"{text}\nno picture: {reason}\n"
  pictures.draw_throughput(cells, out / "throughput.png")
  return cells, text


def _needle(subject, request: Request, out):
  cells = needles.run(
    subject,
    request.about_needles,
    lengths=request.lengths,
    modes=request.modes,
    budgets=request.budgets,
    num_rows=request.batch_size,
  )
  maps = needle_tables.draw(cells, out / "needle")
  return cells, f"{align(needle_tables.rows(cells))}\n{maps}"


def _lm_eval(subject, request: Request, out):
  del out
  cells = harness.run(
    subject,
    request.lm_eval,
    modes=request.modes,
    budgets=request.budgets,
    lengths=request.lengths,
    batch_size=request.batch_size,
  )
  return cells, align(harness.rows(cells))


# Each gives cells, and a table of them as markdown.
TASKS = {
  "perplexity": _perplexity,
  "block_lists": _block_lists,
  "diagnostics": _diagnostics,
  "locality": _locality,
  "throughput": _throughput,
  "needle": _needle,
  "lm_eval": _lm_eval,
}


def markdown(cells: Sequence[perplexity.Cell]) -> str:
  """The cells as a markdown table, columns aligned for a terminal."""
  rows = [
    (
      *("data", "inference", "budget", "perplexity", "bits/byte", "loss", "above full"),
      *("accuracy", "tokens"),
    )
  ]
  rows += [
    (
      cell.source,
      cell.mode,
      _number(cell.budget, "d"),
      _with_error(cell.perplexity, cell.perplexity_se, 3),
      _number(cell.bits_per_byte, ".4f"),
      _with_error(cell.loss, cell.loss_se, 4),
      "-" if cell.gap is None else _with_error(cell.gap, cell.gap_se, 4),
      _number(cell.accuracy, ".1%"),
      _number(cell.num_tokens, ",d"),
    )
    for cell in cells
  ]
  return align(rows)


def align(rows: Sequence[Sequence[str]]) -> str:
  """Rows, the first being the header, as a markdown table with columns of equal width."""
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
  lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
  return "\n".join(lines) + "\n"


def _write(task: str, cells, text: str, subject: subjects.Subject, out: pathlib.Path) -> str:
  backends = {choice.op: {} for choice in subject.backends}
  for choice in subject.backends:
    backends[choice.op][choice.backend] = None
  content = dict(
    task=task,
    run=subject.path.parent.parent.name,
    step=subject.step,
    method="+".join(subject.transformer.options.pattern),
    environment=record.environment(),
    backends={op: ", ".join(names) for op, names in backends.items()},
    config_hash=record.digest(subject.config),
    config=record.as_json(subject.config),
    cells=[dataclasses.asdict(cell) for cell in cells],
  )
  out.mkdir(parents=True, exist_ok=True)
  (out / f"{task}.json").write_text(json.dumps(content, indent=2) + "\n")
  (out / f"{task}.md").write_text(text)
  return text


def _number(value: float | None, form: str) -> str:
  return "-" if value is None else format(value, form)


def _with_error(value: float, error: float | None, digits: int) -> str:
  known = error is not None and not math.isnan(error)
  return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if known else "")
