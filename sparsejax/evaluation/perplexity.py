"""Perplexity of held-out text, under full inference and under sparse inference at budgets."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any

import numpy as np

from sparsejax import errors, scoring
from sparsejax.configuration import build
from sparsejax.data import corpus, statistics
from sparsejax.evaluation import markdown, plans
from sparsejax.evaluation import subject as subjects

MODES = ("full", "sparse")
_ALL = 2**62


@dataclasses.dataclass(frozen=True)
class Cell:
  """One line of the table.

  Attributes:
    source: name of the data.
    mode: `full`, `sparse`, or `unigram` for the baseline that ignores context.
    budget: keys a query reads; None where that does not apply.
    loss, loss_se: nats per token and its standard error over rows.
    perplexity, perplexity_se: exp(loss), and its standard error.
    bits_per_byte: of the text; None for synthetic data and for the baseline.
    accuracy: of the most likely token; None for the baseline.
    num_tokens: that count.
    gap, gap_se: loss above that of full inference, and its standard error over the same rows;
      None where full inference was not asked for, and for what is not sparse.
  """

  source: str
  mode: str
  budget: int | None
  loss: float
  loss_se: float | None
  perplexity: float
  perplexity_se: float | None
  bits_per_byte: float | None
  accuracy: float | None
  num_tokens: int | None
  gap: float | None = None
  gap_se: float | None = None


def check_modes(
  modes: Sequence[str], budgets: Sequence[int], block_size: int, sequence_length: int
) -> None:
  """Checks what is asked for before anything is loaded.

  Raises:
    ConfigError: an unknown mode, or a budget that is no whole number of blocks.
  """
  for mode in modes:
    if mode not in MODES:
      raise errors.ConfigError(errors.one_of("mode", mode, MODES))
  if budgets and "sparse" not in modes:
    raise errors.ConfigError("--budgets are of sparse inference; add sparse to --modes.")
  for budget in budgets:
    if budget < block_size or budget % block_size:
      below = max(1, budget // block_size) * block_size
      raise errors.ConfigError(
        f"--budgets={budget} is not a whole number of blocks of {block_size} keys; take "
        f"{below} or {below + block_size}."
      )
    if budget > sequence_length:
      raise errors.ConfigError(
        f"--budgets={budget} exceeds rows of {sequence_length} tokens, which it would read "
        f"whole; take at most {sequence_length // block_size * block_size}, or longer rows "
        "with --sequence_length."
      )


def run(
  subject: subjects.Subject,
  *,
  modes: Sequence[str] = MODES,
  budgets: Sequence[int] = (),
  max_rows: int = 0,
  batch_size: int = 0,
) -> list[Cell]:
  """Scores the validation rows of every source; see `plan`."""
  planned = plan(
    subject, modes=modes, budgets=budgets, max_rows=max_rows, batch_size=batch_size
  )
  return cells(planned.units, plans.measure(planned.units, subject))


def plan(
  subject: subjects.Subject,
  *,
  modes: Sequence[str] = MODES,
  budgets: Sequence[int] = (),
  max_rows: int = 0,
  batch_size: int = 0,
) -> plans.Plan:
  """Units of a source, a mode and a budget each, and of a source for the baseline.

  Args:
    subject: the checkpoint.
    modes: of inference.
    budgets: keys a query reads under sparse inference; () is that of training.
    max_rows: rows of each source; 0 takes all.
    batch_size: rows at once; 0 is that of a training pass.

  Raises:
    ConfigError: see `check_modes`; or rows that do not divide among the devices.
    DataError: no source has a validation split.
  """
  config, options = subject.config, subject.transformer.options
  length = config.data.sequence_length
  check_modes(modes, budgets, options.block_size, length)
  batch_size = batch_size or config.data.batch_size // config.train.accumulate_steps
  batch_size = -(-batch_size // subject.mesh.size) * subject.mesh.size
  sources = [source for source in subject.corpus.sources if source.validation]
  if not sources:
    raise errors.DataError(
      "none of the data has a validation split; prepare it with --validation_fraction above 0."
    )
  asked = [("unigram", None)]
  # Full inference first: the others are compared with it.
  for mode in sorted(modes, key=MODES.index):
    asked += [(mode, x) for x in (budgets or [options.budget] if mode == "sparse" else [None])]

  @functools.cache  # sources share a program
  def score(mode, budget):
    transformer = subject.transformer
    if budget is not None:
      transformer = build.with_budget(transformer, budget)
    return scoring.make_score(transformer, mode, config.loss.chunk_length)

  units = tuple(
    plans.Unit(
      key=dict(
        task="perplexity",
        source=source.name,
        data=_identity(source),
        length=length,
        max_rows=max_rows,
        mode=mode,
        budget=budget,
      ),
      measure=functools.partial(
        _measure,
        number=number,
        score=None if mode == "unigram" else functools.partial(score, mode, budget),
        num_rows=max_rows or _ALL,
        batch_size=batch_size,
      ),
      samples=None
      if mode == "unigram"
      else functools.partial(_samples, source=source.name, mode=mode, budget=budget),
    )
    for mode, budget in asked
    for number, source in enumerate(subject.corpus.sources)
    if source.validation
  )

  def tell(values):
    found = cells(units, values)
    return plans.Told(found, markdown.align(rows(found)))

  return plans.Plan(units, tell)


def _identity(source: corpus.Source) -> str:
  """Of the rows that are scored: a fingerprint says nothing of how rows are made."""
  rows_ = source.validation
  return plans.digest([source.fingerprint, len(rows_), [x.tolist() for x in rows_[0]]])


def _measure(
  subject: subjects.Subject,
  *,
  number: int,
  score: Callable | None,
  num_rows: int,
  batch_size: int,
) -> dict[str, Any]:
  """Scores of a source's rows; of the baseline, which is no model, its loss."""
  source = subject.corpus.sources[number]
  if score is None:
    vocab_size = subject.config.model.vocab_size
    return dict(loss=statistics.unigram_loss(source, vocab_size))
  scores = scoring.score_rows(
    score(),
    subject.params,
    source.validation,
    bytes_per_id=source.bytes_per_id,
    batch_size=batch_size,
    num_rows=num_rows,
    mesh=subject.mesh,
  )
  return scores._asdict()


def _samples(value, *, source: str, mode: str, budget: int | None) -> list[plans.Samples]:
  """Rows."""
  same = dict(what=source, mode=mode, budget=budget)
  found = [
    plans.Samples(
      metric="loss (nats/token)",
      sums=tuple(value["nll"]),
      weights=tuple(value["num_tokens"]),
      **same,
    )
  ]
  if any(value["num_bytes"]):
    bits = tuple(x / math.log(2) for x in value["nll"])
    found.append(
      plans.Samples(metric="bits/byte", sums=bits, weights=tuple(value["num_bytes"]), **same)
    )
  return found


def cells(units: Sequence[plans.Unit], values: Sequence[Any]) -> list[Cell]:
  """Lines of the table, in the order of units."""
  found, in_full = [], {}
  for unit, value in zip(units, values, strict=True):
    source, mode, budget = (unit.key[name] for name in ("source", "mode", "budget"))
    if mode == "unigram":
      found.append(_baseline(source, value["loss"]))
      continue
    scores = scoring.RowScores(*(np.array(value[name]) for name in scoring.RowScores._fields))
    gap = {}
    if mode == "full":
      in_full[source] = scores
    elif source in in_full:
      more, error = scoring.compare(scores, in_full[source])
      gap = dict(gap=more, gap_se=error)
    found.append(_cell(source, mode, budget, scoring.summarize(scores), **gap))
  return found


def _cell(
  source: str, mode: str, budget: int | None, summary: scoring.Summary, **gap: float
) -> Cell:
  return Cell(
    source=source,
    mode=mode,
    budget=budget,
    loss=summary.loss,
    loss_se=summary.loss_se,
    perplexity=summary.perplexity,
    perplexity_se=summary.perplexity_se,
    bits_per_byte=summary.bits_per_byte,
    accuracy=float(summary.accuracy),
    num_tokens=summary.num_tokens,
    **gap,
  )


def _baseline(source: str, loss: float) -> Cell:
  return Cell(source, "unigram", None, loss, None, math.exp(loss), None, None, None, None)


def rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
  """Rows of a table, the header first."""
  header = (
    *("data", "inference", "budget", "perplexity", "bits/byte", "loss", "above full"),
    *("accuracy", "tokens"),
  )
  return [
    header,
    *(
      (
        cell.source,
        cell.mode,
        markdown.number(cell.budget, "d"),
        markdown.with_error(cell.perplexity, cell.perplexity_se, 3),
        markdown.number(cell.bits_per_byte, ".4f"),
        markdown.with_error(cell.loss, cell.loss_se, 4),
        "-" if cell.gap is None else markdown.with_error(cell.gap, cell.gap_se, 4),
        markdown.number(cell.accuracy, ".1%"),
        markdown.number(cell.num_tokens, ",d"),
      )
      for cell in cells
    ),
  ]
