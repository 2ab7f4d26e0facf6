"""Puts evaluations to a checkpoint and writes down what came out."""

import pathlib

import ml_collections

from sparsejax.evaluation import request as requests
from sparsejax.evaluation import results, tasks
from sparsejax.evaluation import subject as subjects


def run(
  request: requests.Request, template: ml_collections.ConfigDict
) -> tuple[str, pathlib.Path]:
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
  tasks.check(request)
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
    cells, text = tasks.TASKS[task](subject, request, out)
    tables.append(results.write(task, cells, text, subject, out))
  backends = "".join(f"backend of {choice}\n" for choice in subject.backends)
  return backends + "\n".join(tables), out
