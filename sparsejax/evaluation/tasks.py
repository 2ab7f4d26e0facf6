"""The tasks of eval.py: what each asks of a checkpoint, and how it shows the answer."""

import dataclasses
import functools
import itertools

import jax
import numpy as np

from sparsejax import errors
from sparsejax.configuration import build
from sparsejax.evaluation import (
  block_lists,
  decode_timing,
  diagnostics,
  harness,
  locality,
  markdown,
  perplexity,
  pictures,
  plans,
  show_positions,
  sparsity,
  sparsity_show,
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
  _check_names(request)
  _check_use(request)
  for task in request.tasks:
    if task not in TASKS:
      raise errors.ConfigError(errors.one_of("task", task, TASKS))
  for mode in request.modes:
    if mode not in perplexity.MODES:
      raise errors.ConfigError(errors.one_of("mode", mode, perplexity.MODES))
  short = [length for length in request.lengths if length < 1]
  if short:
    raise errors.ConfigError(f"--lengths={short[0]} must be at least 1.")
  for flag, least in (("max_rows", 0), ("batch_size", 0), ("num_steps", 2)):
    number = getattr(request, flag)
    if number < least:
      raise errors.ConfigError(f"--{flag}={number} must be at least {least}.")
  if "perplexity" in request.tasks:
    request.about_perplexity.check()
  if "needle" in request.tasks:
    needles.check_lengths(request.lengths)
  if "lm_eval" in request.tasks:
    harness.check(request.lm_eval)


def _check_use(request: requests.Request) -> None:
  """Refuses settings that would be thought to count, and that nothing asked for reads."""
  if request.spare and "sparse" not in request.modes and "locality" not in request.tasks:
    raise errors.ConfigError(
      f"--spare={','.join(map(str, request.spare))} is of lists under sparse inference; add "
      "sparse to --modes, or leave it out."
    )
  if (
    request.sources and request.about_perplexity.corpus and set(request.tasks) == {"perplexity"}
  ):
    raise errors.ConfigError(
      "--corpus and --sources are two texts for perplexity to be of; give one of them."
    )


def _check_names(request: requests.Request) -> None:
  """Refuses lists that ask nothing, or the same twice."""
  for flag in ("tasks", "modes"):
    if not getattr(request, flag):
      raise errors.ConfigError(f"--{flag}= names none; name one at least, or leave it out.")
  # No path is the working directory to pathlib.
  for flag, paths in (
    ("workdir", request.paths),
    ("compare", [request.compare]),
    ("out", [request.out]),
  ):
    if "" in paths:
      raise errors.ConfigError(f"--{flag} has an empty path; name one in its place.")
  for flag in ("tasks", "modes", "budgets", "lengths", "spare", "kv_gib"):
    given = getattr(request, flag)
    if twice := [x for i, x in enumerate(given) if x in given[:i]]:
      text = ",".join(map(str, given))
      raise errors.ConfigError(f"--{flag}={text} names {twice[0]} twice; name each once.")


def _perplexity(subject, request: requests.Request, out):
  planned = perplexity.plan(
    subject,
    settings=request.about_perplexity,
    lengths=request.lengths,
    modes=request.modes,
    budgets=request.budgets,
    max_rows=request.max_rows,
    batch_size=request.batch_size,
  )

  def tell(values):
    told = planned.tell(values)
    text, drawn = show_positions.show(told.cells, out)
    return plans.Told(told.cells, told.text + text, drawn)

  return plans.Plan(planned.units, tell)


def _block_lists(subject, request: requests.Request, out):
  del request  # modes and budgets are not of this question
  name = "block_lists.npy"
  block_lists.check(subject)

  def measure(subject):
    blocks_LTKM = block_lists.choose(subject)
    np.save(out / name, blocks_LTKM)
    return block_lists.describe(blocks_LTKM, subject.config.attention.block_size)

  def tell(values):
    cells = _cells(values, block_lists.Cell)
    return plans.Told(cells, markdown.align(block_lists.rows(cells)))

  unit = plans.Unit(
    key=dict(task="block_lists", data=subject.corpus.fingerprint),
    measure=measure,
    files=(name,),
  )
  return plans.Plan((unit,), tell)


def _diagnostics(subject, request: requests.Request, out):
  del request, out
  diagnostics.check(subject)

  def tell(values):
    cells = _cells(values, diagnostics.Cell)
    return plans.Told(cells, markdown.align(diagnostics.rows(cells)))

  unit = plans.Unit(
    key=dict(task="diagnostics", data=subject.corpus.fingerprint), measure=diagnostics.run
  )
  return plans.Plan((unit,), tell)


def _with_budget(subject, budget: int | None):
  """The same, read by so many keys when sparse; None is as trained."""
  if budget is None:
    return subject
  transformer = build.with_budget(subject.transformer, budget)
  return dataclasses.replace(subject, transformer=transformer)


def locality_contexts(subject, request: requests.Request) -> tuple[int, ...]:
  """Tokens before the steps of locality."""
  return request.lengths or (subject.config.data.sequence_length // 2,)


def _locality(subject, request: requests.Request, out):
  spare, num_rows = request.spare or (0, 16, 32, 64), request.max_rows or 1

  def measure(subject, *, context: int, budget: int | None, name: str):
    subject = _with_budget(subject, budget)
    lists_SLBKM = locality.record(
      subject, context, num_rows=num_rows, num_steps=request.num_steps
    )
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    np.save(out / name, lists_SLBKM)
    return locality.run(subject.transformer.options, lists_SLBKM, context, spare)

  def tell(values):
    cells = _cells(values, locality.Cell)
    return plans.Told(cells, markdown.align(locality.rows(cells)))

  units = []
  asked = itertools.product(request.budgets or (None,), locality_contexts(subject, request))
  for budget, context in asked:
    given = _with_budget(subject, budget)
    locality.check(given, context, num_rows=num_rows, num_steps=request.num_steps)
    folder = "lists" if budget is None else f"lists_{budget}"
    name = f"{folder}/{context}.npy"
    units.append(
      plans.Unit(
        key=dict(
          task="locality",
          data=subject.corpus.fingerprint,
          budget=budget,
          length=context,
          num_rows=num_rows,
          num_steps=request.num_steps,
          spare=spare,
        ),
        measure=functools.partial(measure, context=context, budget=budget, name=name),
        files=(name,),
      )
    )
  return plans.Plan(tuple(units), tell)


def _throughput(subject, request: requests.Request, out):
  devices, num_steps = jax.devices(), request.num_steps
  asked = list(
    throughput.cells_asked(
      request.modes,
      request.budgets,
      request.lengths or (subject.config.data.sequence_length // 2,),
      request.kv_gib,
      request.spare,
      request.batch_size or _ROWS,
    )
  )
  for cell in asked:
    throughput.check(subject, cell, num_steps)

  def measure(subject, *, cell: throughput.Asked):
    return [throughput.measure(subject, cell, num_steps)]

  def tell(values):
    cells = _cells(values, decode_timing.Cell)
    out.mkdir(parents=True, exist_ok=True)
    text = markdown.align(decode_timing.rows(cells))
    # What was measured is not lost for want of a picture.
    if (reason := pictures.why_none()) is not None:
      return plans.Told(cells, f"{text}\nno picture: {reason}\n")
    pictures.draw_throughput(cells, out / "throughput.png")
    return plans.Told(cells, text, (out / "throughput.png",))

  units = tuple(
    plans.Unit(
      key=dict(
        task="throughput",
        data=subject.corpus.fingerprint,
        device=f"{len(devices)} x {devices[0].device_kind}",
        mode=cell.mode,
        budget=cell.budget,
        length=cell.context,
        spare=cell.spare,
        kv_gib=cell.kv_gib,
        num_rows=cell.num_rows,
        num_steps=num_steps,
      ),
      measure=functools.partial(measure, cell=cell),
    )
    for cell in asked
  )
  return plans.Plan(units, tell)


def _needle(subject, request: requests.Request, out):
  units = needles.plan(
    subject,
    request.about_needles,
    lengths=request.lengths,
    modes=request.modes,
    budgets=request.budgets,
    num_rows=request.batch_size,
  )

  def tell(values):
    cells = needles.cells(units, values, request.about_needles)
    maps = needle_tables.draw(cells, out / "needle")
    return plans.Told(cells, f"{markdown.align(needle_tables.rows(cells))}\n{maps}")

  return plans.Plan(units, tell)


def _lm_eval(subject, request: requests.Request, out):
  del out
  return harness.plan(
    subject,
    request.lm_eval,
    modes=request.modes,
    budgets=request.budgets,
    lengths=request.lengths,
    batch_size=request.batch_size,
  )


def _sparsity(subject, request: requests.Request, out):
  units = sparsity.plan(
    subject,
    modes=request.modes,
    budgets=request.budgets,
    lengths=request.lengths,
    num_rows=request.max_rows,
    batch_size=request.batch_size,
  )

  def tell(values):
    cells = sparsity.cells(units, values, subject)
    text, drawn = sparsity_show.draw(cells, out / "sparsity")
    return plans.Told(cells, f"{markdown.align(sparsity_show.rows(cells))}\n{text}", drawn)

  return plans.Plan(units, tell)


def _cells(values, kind):
  """Cells of units whose values are lists of them."""
  return [plans.restore(kind, cell) for value in values for cell in value]


# That read contexts of --lengths, and are refused those beyond what RoPE reaches.
READ_LENGTHS = {"perplexity", "locality", "needle", "lm_eval", "sparsity"}

# That say what they found of single samples.
COMPARED = ("perplexity", "needle", "lm_eval", "sparsity")

# Each makes a plan, of a checkpoint that is described and not yet loaded, a request, and the
# directory of results.
TASKS = {
  "perplexity": _perplexity,
  "block_lists": _block_lists,
  "diagnostics": _diagnostics,
  "locality": _locality,
  "throughput": _throughput,
  "needle": _needle,
  "lm_eval": _lm_eval,
  "sparsity": _sparsity,
}
