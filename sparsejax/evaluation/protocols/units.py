"""Units of perplexity: one text at one length, in one mode and at one budget."""

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any

from sparsejax import errors, scoring
from sparsejax.configuration import build
from sparsejax.data import corpus as corpora
from sparsejax.data import statistics
from sparsejax.evaluation import by_decode, by_position, plans, token_scores
from sparsejax.evaluation import subject as subjects
from sparsejax.evaluation.protocols import parts
from sparsejax.evaluation.protocols import settings as protocols


def of_parts(
  subject: subjects.Subject,
  found: Sequence[parts.Part],
  asked: Sequence[tuple[str, int | None]],
  *,
  settings: protocols.Settings,
  max_rows: int,
  batch_size: int,
) -> list[plans.Unit]:
  """A unit for each mode, budget and part, parts one after the other.

  A value has sums of every row, window or document: fields of `scoring.RowScores`, words, and
  `positions` (see `by_position`).

  Args:
    subject: the checkpoint.
    found: parts.
    asked: modes and their budgets.
    settings, max_rows, batch_size: see `perplexity.plan`.

  Raises:
    ConfigError: rows of several documents that are to be decoded.
  """
  if settings.decode:
    _check_single(found)
  config = subject.config
  num_rows = batch_size or config.data.batch_size // config.train.accumulate_steps

  def name(part):
    lengths = {other.length for other in found}
    return part.source if len(lengths) == 1 else f"{part.source}, {part.length:,d} tokens"

  @functools.cache  # texts share a program
  def score(mode, budget, length):
    most = max(part.reading.max_documents for part in found if part.length == length)
    return _make_score(subject, mode, budget, most, decode=settings.decode)

  return [
    plans.Unit(
      key=dict(
        task="perplexity",
        source=part.source,
        data=part.fingerprint,
        protocol=settings.protocol,
        length=part.length,
        stride=part.stride,
        max_rows=max_rows,
        decode=settings.decode,
        mode=mode,
        budget=budget,
      ),
      measure=functools.partial(
        _measure,
        part=part,
        score=functools.partial(score, mode, budget, part.length),
        row_length=config.data.sequence_length,
        num_rows=num_rows,
      ),
      samples=functools.partial(
        samples,
        what=name(part),
        asked=part.fingerprint,
        text=part.reading.text,
        mode=mode,
        budget=budget,
      ),
      text=part.reading.text,
    )
    for mode, budget in asked
    for part in found
  ]


def baseline(source: corpora.Source) -> plans.Unit:
  """Of what is no model: the loss of knowing how often each id occurs."""

  def measure(subject):
    loss = statistics.unigram_loss(source, subject.config.model.vocab_size)
    return dict(loss=loss)

  key = dict(task="perplexity", source=source.name, data=source.fingerprint)
  return plans.Unit(key=dict(**key, mode="unigram", budget=None), measure=measure)


def _make_score(subject, mode, budget, max_documents: int, *, decode: bool):
  transformer = subject.transformer
  if budget is not None:
    transformer = build.with_budget(transformer, budget)
  transformer = transformer.clone(
    options=dataclasses.replace(transformer.options, max_documents=max_documents)
  )
  if decode:
    return by_decode.make_token_score(transformer, mode, subject.mesh)
  return scoring.make_token_score(transformer, mode, subject.config.loss.chunk_length)


def _check_single(found: Sequence[parts.Part]) -> None:
  for part in found:
    if part.reading.max_documents > 1:
      raise errors.ConfigError(
        f"--decode reads a row as one document, and rows of {part.source} have up to "
        f"{part.reading.max_documents}; take --protocol=sliding or documents."
      )


def _measure(
  subject: subjects.Subject, *, part: parts.Part, score, row_length: int, num_rows: int
) -> dict[str, Any]:
  """Sums of every row, window or document."""
  bounds = token_scores.position_bounds(part.length)
  sums = token_scores.sum_up(
    score(),
    subject.params,
    part.reading,
    bounds=bounds,
    max_length=row_length,
    rows=num_rows,
    mesh=subject.mesh,
  )
  return dict(
    **sums.whole._asdict(),
    num_words=part.reading.num_words_U,
    positions=by_position.as_values(bounds, sums.by_position),
  )


def samples(
  value: dict[str, Any],
  *,
  what: str,
  asked: str,
  text: str | None = None,
  mode: str,
  budget: int | None,
) -> list[plans.Samples]:
  """Rows, windows or documents of a value; see `plans.Samples`."""
  same, nll = dict(what=what, mode=mode, budget=budget), plans.floats(value["nll"])
  found = [
    plans.Samples(
      metric="loss (nats/token)",
      sums=nll,
      weights=tuple(value["num_tokens"]),
      asked=asked,
      **same,
    )
  ]
  if any(value["num_bytes"]):
    bits = tuple(x / math.log(2) for x in nll)
    found.append(
      plans.Samples(
        metric="bits/byte",
        sums=bits,
        weights=tuple(value["num_bytes"]),
        asked=asked if text is None else text,
        needs_tokenizer=text is None,
        **same,
      )
    )
  return found
