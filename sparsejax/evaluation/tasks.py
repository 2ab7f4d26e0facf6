"""The tasks of eval.py: what each asks of a checkpoint, and how it shows the answer."""

import numpy as np

from sparsejax import errors
from sparsejax.configuration import checks
from sparsejax.evaluation import (
  block_lists,
  decode_timing,
  diagnostics,
  harness,
  locality,
  markdown,
  perplexity,
  pictures,
  throughput,
)
from sparsejax.evaluation import request as requests
from sparsejax.evaluation.needles import show as needle_tables
from sparsejax.evaluation.needles import task as needles

# That throughput decodes together, if nobody says how many.
_ROWS = 8


def check(request: requests.Request) -> None:
  """Refuses what no checkpoint could answer.

  Raises:
    UserError: an unknown name, or a number out of range.
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


def _perplexity(subject, request: requests.Request, out):
  cells = perplexity.run(
    subject,
    modes=request.modes,
    budgets=request.budgets,
    max_rows=request.max_rows,
    batch_size=request.batch_size,
  )
  return cells, markdown.align(perplexity.rows(cells))


def _block_lists(subject, request: requests.Request, out):
  del request  # modes and budgets are not of this question
  blocks_LTKM = block_lists.choose(subject)
  out.mkdir(parents=True, exist_ok=True)
  np.save(out / "block_lists.npy", blocks_LTKM)
  cells = block_lists.describe(blocks_LTKM, subject.config.attention.block_size)
  return cells, markdown.align(block_lists.rows(cells))


def _diagnostics(subject, request: requests.Request, out):
  del request, out
  cells = diagnostics.run(subject)
  return cells, markdown.align(diagnostics.rows(cells))


def _locality(subject, request: requests.Request, out):
  cells = []
  for context in request.lengths or (subject.config.data.sequence_length // 2,):
    lists_SLBKM = locality.record(
      subject, context, num_rows=request.max_rows or 1, num_steps=request.num_steps
    )
    (out / "lists").mkdir(parents=True, exist_ok=True)
    np.save(out / "lists" / f"{context}.npy", lists_SLBKM)
    cells += locality.run(subject, lists_SLBKM, context, request.spare or (0, 16, 32, 64))
  return cells, markdown.align(locality.rows(cells))


def _throughput(subject, request: requests.Request, out):
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
  text = markdown.align(decode_timing.rows(cells))
  # What was measured is not lost for want of a picture.
  if (reason := pictures.why_none()) is not None:
    return cells, f"{text}\nno picture: {reason}\n"
  pictures.draw_throughput(cells, out / "throughput.png")
  return cells, text


def _needle(subject, request: requests.Request, out):
  cells = needles.run(
    subject,
    request.about_needles,
    lengths=request.lengths,
    modes=request.modes,
    budgets=request.budgets,
    num_rows=request.batch_size,
  )
  maps = needle_tables.draw(cells, out / "needle")
  return cells, f"{markdown.align(needle_tables.rows(cells))}\n{maps}"


def _lm_eval(subject, request: requests.Request, out):
  del out
  cells = harness.run(
    subject,
    request.lm_eval,
    modes=request.modes,
    budgets=request.budgets,
    lengths=request.lengths,
    batch_size=request.batch_size,
  )
  return cells, markdown.align(harness.rows(cells))


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
