"""Puts evaluations to checkpoints and writes down what came out."""

from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import pathlib
import time
from typing import Any

import ml_collections

from sparsejax import checkpoint, errors
from sparsejax.configuration import build, record
from sparsejax.evaluation import (
  compare,
  extrapolation,
  ledger,
  page,
  plans,
  progress,
  results,
  tasks,
)
from sparsejax.evaluation import request as requests
from sparsejax.evaluation import subject as subjects


@dataclasses.dataclass
class _Asked:
  """A checkpoint and what it is asked.

  Attributes:
    subject: described.
    name: no other has it.
    request: what it is asked; no budgets where it chooses no blocks, and others beside it do.
    out: directory of its results.
    planned: by task.
    keys: of every unit, with the checkpoint's own part, by task.
    samples: that were found, by task.
  """

  subject: subjects.Subject
  name: str
  request: requests.Request
  out: pathlib.Path
  planned: dict[str, plans.Plan]
  keys: dict[str, list[dict[str, Any]]]
  samples: dict[str, list[plans.Samples]] = dataclasses.field(default_factory=dict)


def run(
  request: requests.Request, template: ml_collections.ConfigDict
) -> tuple[str, pathlib.Path]:
  """Answers a request; returns what to print, and the directory of the files.

  That is what the model ran on, a line for each operation and each choice that budgets make
  for it, the tables as markdown, and how many cells were taken from before.
  Each task leaves `TASK.json` (with config, commit, versions and device) and `TASK.md`;
  block_lists also `block_lists.npy`, int32 [layers, T, K, M], and locality for every context
  `lists/CONTEXT.npy`, int32 [steps, layers, rows, K, M]; throughput also a picture, and needle
  and sparsity theirs in folders of their names. All together are `results.json`, `results.md`
  and `report.html`.
  Of several checkpoints each has a directory of its own for what is not all together. What is
  finished is in `cells.jsonl` (see `ledger`), and not done again by a like request.

  Args:
    request: what to do.
    template: the config with every key (configs/base.py).

  Raises:
    UserError: and its kinds, for what cannot be answered; before anything is measured, but for
      damaged parameters and what only a run shows.
  """
  tasks.check(request)
  asked, out = _plan(request, template)
  with contextlib.ExitStack() as stack:
    environment = record.environment()
    made_by = dict(commit=environment["commit"], device=results.device(environment))
    books = [
      stack.enter_context(ledger.Ledger(x.out, **made_by, is_fresh=request.fresh))
      for x in asked
    ]
    missing = [
      unit.key["task"]
      for x, book in zip(asked, books, strict=True)
      for name, planned in x.planned.items()
      for unit, key in zip(planned.units, x.keys[name], strict=True)
      if book.find(key, unit.files) is None
    ]
    shown = stack.enter_context(contextlib.closing(progress.Progress(missing)))
    answers = [_answer(x, book, shown) for x, book in zip(asked, books, strict=True)]
  differences = _compare(asked) if request.compare is not None else []
  counts = [results.Count.of(book) for book in books]
  text = results.write_all(answers, differences, counts, out)
  text += "".join(
    f"{x.name} chooses no blocks: --budgets are not of it\n"
    for x in asked
    if x.request.budgets != request.budgets
  )
  page.write(answers, differences, counts, out)
  return text, out


def _plan(
  request: requests.Request, template: ml_collections.ConfigDict
) -> tuple[list[_Asked], pathlib.Path]:
  """All that will be done, and the directory of all together."""
  paths = [*request.paths, *([] if request.compare is None else [request.compare])]
  if len(paths) > 1 and request.out is None:
    raise errors.ConfigError(
      f"{len(paths)} checkpoints have one table; name a directory for it with --out."
    )
  found, own_requests = _describe(request, template, paths)
  first = found[0]
  out = pathlib.Path(request.out or first.path.parent.parent / "eval" / str(first.step))
  asked = []
  names = results.distinct_names(found)
  for subject, own_request, name in zip(found, own_requests, names, strict=True):
    _check_lengths(request, subject)
    own = out / name if len(found) > 1 else out
    planned = {task: tasks.TASKS[task](subject, own_request, own) for task in request.tasks}
    keys = {task: [_key(subject, unit) for unit in x.units] for task, x in planned.items()}
    asked.append(_Asked(subject, name, own_request, own, planned, keys))
  if request.compare is not None:
    *others, reference = asked
    if not any(_compared(planned) for planned in reference.planned.values()):
      raise errors.ConfigError(
        f"--compare={request.compare} compares sample by sample, and --tasks="
        f"{','.join(request.tasks)} has none; add one of {', '.join(tasks.COMPARED)}, or name "
        "the checkpoint in --workdir for answers side by side."
      )
    for own in others:
      for task in request.tasks:
        compare.check(
          own.subject,
          _compared(own.planned[task]),
          reference.subject,
          _compared(reference.planned[task]),
        )
  return asked, out


def _describe(
  request: requests.Request, template: ml_collections.ConfigDict, paths: Sequence[pathlib.Path]
) -> tuple[list[subjects.Subject], list[requests.Request]]:
  """The checkpoints, without parameters, and what each is asked."""
  found, own_requests = [], []
  for path in paths:
    describe = functools.partial(
      subjects.describe,
      path,
      template,
      # Of several paths, one may be a checkpoint itself.
      step=None if len(paths) > 1 and checkpoint.is_one(path) else request.step,
      sources=request.sources,
      sequence_length=request.sequence_length,
      kernels=request.kernels,
      rope_scaling=request.rope_scaling,
    )
    own = request
    try:
      subject = describe(budgets=request.budgets)
    except build.NoBlocksError:
      # Beside others, which have budgets, it has its window.
      if len(paths) == 1:
        raise
      own, subject = dataclasses.replace(request, budgets=()), describe()
    if any(subject.path.samefile(other.path) for other in found):
      raise errors.ConfigError(f"{subject.path} is named twice; name each checkpoint once.")
    found.append(subject)
    own_requests.append(own)
  if request.budgets and not any(own.budgets for own in own_requests):
    raise errors.ConfigError(
      f"--budgets={','.join(map(str, request.budgets))} is for methods that choose blocks, and "
      f"none of {', '.join(str(x.path) for x in found)} does; leave it out."
    )
  return found, own_requests


def _check_lengths(request: requests.Request, subject: subjects.Subject) -> None:
  length = subject.config.data.sequence_length
  trained, _ = subject.changes.get("data.sequence_length", (length, length))
  # How fast tokens are decoded does not depend on what RoPE makes of them.
  read = [length] if set(request.tasks) - {"throughput"} else []
  lengths = request.lengths if set(request.tasks) & tasks.READ_LENGTHS else ()
  extrapolation.check(subject.config, trained, [*read, *lengths], request.rope_scaling)
  if "locality" in request.tasks:
    steps = request.num_steps
    read = [context + steps for context in tasks.locality_contexts(subject, request)]
    try:
      extrapolation.check(subject.config, trained, read, request.rope_scaling)
    except errors.ConfigError as error:
      raise errors.ConfigError(
        f"--tasks=locality reads --num_steps={steps} tokens behind a context: {error}"
      ) from error


def _compared(planned: plans.Plan) -> list[plans.Unit]:
  return [unit for unit in planned.units if unit.samples is not None]


def _key(subject: subjects.Subject, unit: plans.Unit) -> dict[str, Any]:
  """All that a unit's value depends on, but for the program."""
  transformer = subject.transformer
  if (budget := unit.key.get("budget")) is not None:
    transformer = build.with_budget(transformer, budget)
  return plans.as_json(
    dict(
      unit=unit.key,
      step=subject.step,
      parameters=subject.fingerprint,
      config=record.digest(subject.config),
      rope_scaling=subject.config.model.rope_scaling.to_dict(),
      backends={
        choice.op: choice.backend
        for choice in build.choose_backends(subject.config, transformer)
      },
    )
  )


def _answer(asked: _Asked, book: ledger.Ledger, shown: progress.Progress) -> results.Checkpoint:
  """Measures what is missing, and writes down a checkpoint's answers."""
  loaded, answers, about = None, [], results.describe(asked.subject)
  for task, planned in asked.planned.items():
    values = []
    for unit, key in zip(planned.units, asked.keys[task], strict=True):
      if book.find(key, unit.files) is None:
        if loaded is None:
          loaded = subjects.with_params(asked.subject)
        shown.begin(_say(asked.subject, unit))
        clock = time.monotonic()
        value = plans.as_json(unit.measure(loaded))
        seconds = time.monotonic() - clock
        book.add(key, value, unit.files, seconds)
        shown.end(task, seconds)
        values.append(value)
      else:
        values.append(book.take(key, unit.files))
    asked.samples[task] = [
      samples
      for unit, value in zip(planned.units, values, strict=True)
      if unit.samples is not None
      for samples in unit.samples(value)
    ]
    answers.append(results.write(task, planned.tell(values), about, asked.out))
  # What plans keep of the model gives way to the next one's.
  asked.planned.clear()
  backends = tuple(f"backend of {choice}" for choice in asked.subject.backends)
  return results.Checkpoint(asked.name, about, backends, asked.out, tuple(answers))


def _say(subject: subjects.Subject, unit: plans.Unit) -> str:
  parts = [unit.key.get(name) for name in ("mode", "budget", "length")]
  return " ".join([subject.name, unit.key["task"], *(str(x) for x in parts if x is not None)])


def _compare(asked: Sequence[_Asked]) -> list[compare.Difference]:
  *others, reference = asked
  return [
    line
    for own in others
    for task, samples in own.samples.items()
    for line in compare.differences(
      task,
      own.name,
      samples,
      reference.name,
      reference.samples[task],
      same_tokenizer=_tokenizer(own) == _tokenizer(reference),
    )
  ]


def _tokenizer(asked: _Asked) -> str:
  return asked.subject.corpus.tokenizer.fingerprint
