"""`eval.py --tasks=needle`: a checkpoint's answers, by kind, length, depth, mode and budget."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import math
from typing import Any

import numpy as np

from sparsejax import errors, model
from sparsejax.configuration import build
from sparsejax.decoding import generate as generation
from sparsejax.evaluation import perplexity, plans
from sparsejax.evaluation import subject as subjects
from sparsejax.evaluation.needles import answers, associations, haystacks, kinds, questions

KINDS = (*kinds.KINDS, associations.KIND)
SHORTEST = 256
_NUM_ROWS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What is asked.

  Attributes:
    kinds: of questions, from `KINDS`.
    haystack: what needles are hidden in, of `haystacks.NAMES`.
    depths: of what is asked for, in percent of the haystack.
    num_questions: of each kind, length and depth.
    seed: of all questions.
  """

  kinds: tuple[str, ...] = KINDS
  haystack: str = "noise"
  depths: tuple[int, ...] = (0, 25, 50, 75, 100)
  num_questions: int = 20
  seed: int = 0

  def __post_init__(self):
    for kind in self.kinds:
      if kind not in KINDS:
        raise errors.ConfigError(errors.one_of("--needle_kinds", kind, KINDS))
    if self.haystack not in haystacks.NAMES:
      raise errors.ConfigError(errors.one_of("--haystack", self.haystack, haystacks.NAMES))
    for depth in self.depths:
      if not 0 <= depth <= 100:
        raise errors.ConfigError(
          f"--depths={depth} is not a percentage; take numbers from 0, the beginning, to 100."
        )
    for flag, values in (("--needle_kinds", self.kinds), ("--depths", self.depths)):
      if not values or len(set(values)) < len(values):
        given = ",".join(map(str, values))
        raise errors.ConfigError(f"{flag}={given} must name one at least, and none twice.")
    if self.num_questions < 1:
      raise errors.ConfigError(f"--questions={self.num_questions} must be at least 1.")
    if self.seed < 0:
      raise errors.ConfigError(f"--seed={self.seed} must be at least 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """Questions of one kind, length and depth, under one mode and budget.

  Attributes:
    kind: of the questions.
    haystack: what needles are hidden in.
    mode: `full` or `sparse`.
    budget: keys a query reads; None under full inference.
    length: tokens of a question and its answer.
    depth: of what is asked for, in percent of the haystack.
    accuracy: mean share of the answers that the greedy continuation gives.
    accuracy_se: its standard error over questions; None of one question.
    loss: nats per token of the right continuation, each after the right ones before it.
    top1: share of those tokens that have the largest logit.
    num_questions: that were asked.
  """

  kind: str
  haystack: str
  mode: str
  budget: int | None
  length: int
  depth: int
  accuracy: float
  accuracy_se: float | None
  loss: float
  top1: float
  num_questions: int


def check_lengths(lengths: Sequence[int]) -> None:
  """Checks what can be checked before anything is loaded.

  Raises:
    ConfigError: a length below 256 tokens.
  """
  for length in lengths:
    if length < SHORTEST:
      raise errors.ConfigError(
        f"--lengths={length} is too short for needles; take at least {SHORTEST} tokens."
      )


def run(
  subject: subjects.Subject,
  settings: Settings,
  *,
  lengths: Sequence[int] = (),
  modes: Sequence[str] = perplexity.MODES,
  budgets: Sequence[int] = (),
  num_rows: int = 0,
  generate: answers.Generate = generation.generate,
) -> list[Cell]:
  """Asks all questions in every mode and budget; see `plan`.

  Returns:
    Cells by kind, mode, budget, length and depth, in the order they were named.
  """
  units = plan(
    subject,
    settings,
    lengths=lengths,
    modes=modes,
    budgets=budgets,
    num_rows=num_rows,
    generate=generate,
  )
  return cells(units, plans.measure(units, subject), settings)


def plan(
  subject: subjects.Subject,
  settings: Settings,
  *,
  lengths: Sequence[int] = (),
  modes: Sequence[str] = perplexity.MODES,
  budgets: Sequence[int] = (),
  num_rows: int = 0,
  generate: answers.Generate = generation.generate,
) -> tuple[plans.Unit, ...]:
  """Units of a mode, a budget and a length each, with all kinds and depths.

  Args:
    subject: the checkpoint.
    settings: what is asked.
    lengths: tokens of a question with its answer; () is a row of the subject.
    modes: of inference.
    budgets: keys a query reads under sparse inference; () is that of training.
    num_rows: questions at once; 0 is 8.
    generate: continues prompts.

  Raises:
    ConfigError: lengths beyond the rows of the subject or too short for a kind, or what
      `perplexity.check_modes` refuses.
    DataError: see `haystacks.corpus_ids`, or no answer that is not in the haystack.
  """
  config, options = subject.config, subject.transformer.options
  row_length = config.data.sequence_length
  lengths = tuple(lengths) or (row_length,)
  check_lengths(lengths)
  for length in lengths:
    if length > row_length:
      raise errors.ConfigError(
        f"--lengths={length} exceeds the model's rows of {row_length} tokens; take at most "
        f"that, or --sequence_length={length} to ask beyond what it was trained on."
      )
  perplexity.check_modes(modes, budgets, options.block_size, row_length)
  make, num_rows = _maker(subject, settings, max(lengths)), num_rows or _NUM_ROWS

  @functools.cache  # of all modes the same
  def asked(length: int) -> list[questions.Question]:
    return [
      make(kind, length, depth, number)
      for kind in settings.kinds
      for depth in settings.depths
      for number in range(settings.num_questions)
    ]

  # Impossible ones are refused before others are put to the model.
  for length in lengths:
    for kind in settings.kinds:
      make(kind, length, settings.depths[0], 0)
  vocab_size = subject.transformer.shape.vocab_size
  about = dict(
    tokenizer=subject.corpus.tokenizer.fingerprint,
    # Of pairs that are drawn from all ids, and nothing else.
    vocab_size=vocab_size if associations.KIND in settings.kinds else None,
    settings=plans.as_json(dataclasses.asdict(settings)),
    # Of what needles are hidden in, and nothing else.
    data=subject.corpus.fingerprint if settings.haystack == "corpus" else None,
  )
  return tuple(
    plans.Unit(
      key=dict(task="needle", length=length, mode=mode, budget=budget, **about),
      measure=functools.partial(
        _measure,
        transformer=transformer,
        stream=mode,
        asked=functools.partial(asked, length),
        num_rows=num_rows,
        generate=generate,
      ),
      samples=functools.partial(
        _samples, settings=settings, length=length, mode=mode, budget=budget
      ),
    )
    for length in lengths
    for mode, budget, transformer in _models(subject, modes, budgets)
  )


def _measure(
  subject: subjects.Subject,
  *,
  transformer: model.Transformer,
  stream: str,
  asked: Callable[[], list[questions.Question]],
  num_rows: int,
  generate: answers.Generate,
) -> dict[str, Any]:
  """Of every question how much of it was answered, and how likely the right answer is."""
  same = dict(stream=stream, mesh=subject.mesh, num_rows=num_rows)
  accuracy_Q = answers.greedy(
    asked(),
    transformer,
    subject.params,
    tokenizer=subject.corpus.tokenizer,
    generate=generate,
    **same,
  )
  scores = answers.forced(
    asked(),
    transformer,
    subject.params,
    chunk_length=subject.config.loss.chunk_length,
    **same,
  )
  return dict(
    accuracy=accuracy_Q, nll=scores.nll, hits=scores.hits, num_tokens=scores.num_tokens
  )


def _grouped(value: dict[str, Any], settings: Settings) -> list[np.ndarray]:
  """Accuracy, nats, hits and tokens of each question, all [kinds, depths, questions]."""
  shape = len(settings.kinds), len(settings.depths), settings.num_questions
  names = "accuracy", "nll", "hits", "num_tokens"
  return [np.array(value[name], np.float64).reshape(shape) for name in names]


def _samples(
  value, *, settings: Settings, length: int, mode: str, budget: int | None
) -> list[plans.Samples]:
  """Questions of each kind, each the mean of what it is with its needle at every depth."""
  accuracy, nll, _, num_tokens = _grouped(value, settings)
  found = []
  for number, kind in enumerate(settings.kinds):
    of_metrics = {
      "accuracy": (accuracy[number].mean(0), np.ones(settings.num_questions)),
      "loss of the answer (nats/token)": (nll[number].sum(0), num_tokens[number].sum(0)),
    }
    for metric, (sums, weights) in of_metrics.items():
      found.append(
        plans.Samples(
          what=f"{kind}, {length} tokens",
          mode=mode,
          budget=budget,
          metric=metric,
          sums=tuple(sums.tolist()),
          weights=tuple(weights.tolist()),
        )
      )
  return found


def cells(units: Sequence[plans.Unit], values: Sequence[Any], settings: Settings) -> list[Cell]:
  """Cells by kind, mode, budget, length and depth, in the order they were named."""
  found = {}
  for unit, value in zip(units, values, strict=True):
    mode, budget, length = (unit.key[name] for name in ("mode", "budget", "length"))
    of_unit = _grouped(value, settings)
    for i, kind in enumerate(settings.kinds):
      for j, depth in enumerate(settings.depths):
        found[kind, mode, budget, length, depth] = Cell(
          kind=kind,
          haystack=settings.haystack,
          mode=mode,
          budget=budget,
          length=length,
          depth=depth,
          **_summary(*(x[i, j] for x in of_unit)),
        )
  models = dict.fromkeys((unit.key["mode"], unit.key["budget"]) for unit in units)
  lengths = dict.fromkeys(unit.key["length"] for unit in units)
  return [
    found[kind, mode, budget, length, depth]
    for kind in settings.kinds
    for mode, budget in models
    for length in lengths
    for depth in settings.depths
  ]


def _maker(subject: subjects.Subject, settings: Settings, longest: int):
  """A function of kind, length, depth and number that makes a question."""
  tokenizer, ids = subject.corpus.tokenizer, None
  if settings.haystack == "corpus":
    ids = haystacks.corpus_ids(subject.corpus, longest)
  draw = dict(noise=haystacks.noise, repeated=haystacks.repeated)
  hay = draw[settings.haystack](tokenizer) if ids is None else haystacks.passages(ids)
  text = questions.Maker(tokenizer, hay)
  pairs = None
  if associations.KIND in settings.kinds:
    pairs = associations.Maker(subject.transformer.shape.vocab_size, settings.haystack, ids)

  def make(kind: str, length: int, depth: int, number: int) -> questions.Question:
    place = dict(length=length, depth=depth, seed=settings.seed, number=number)
    return pairs.make(**place) if kind == associations.KIND else text.make(kind, **place)

  return make


def _models(subject: subjects.Subject, modes, budgets) -> Iterator[tuple]:
  """Mode, budget and model, one after another."""
  for mode in modes:
    if mode == "full":
      yield mode, None, subject.transformer
      continue
    for budget in budgets or [subject.transformer.options.budget]:
      yield mode, budget, build.with_budget(subject.transformer, budget)


def _summary(accuracy_Q, nll_Q, hits_Q, num_tokens_Q) -> dict:
  n = len(accuracy_Q)
  return dict(
    accuracy=float(accuracy_Q.mean()),
    accuracy_se=float(accuracy_Q.std(ddof=1) / math.sqrt(n)) if n > 1 else None,
    loss=float(nll_Q.sum() / num_tokens_Q.sum()),
    top1=float(hits_Q.sum() / num_tokens_Q.sum()),
    num_questions=n,
  )
