"""Perplexity of held-out text, under full inference and under sparse inference at budgets."""

from collections.abc import Sequence
import dataclasses
from typing import Any

from sparsejax import errors, scoring
from sparsejax.evaluation import by_position, markdown, plans
from sparsejax.evaluation import subject as subjects
from sparsejax.evaluation.protocols import parts
from sparsejax.evaluation.protocols import settings as protocols
from sparsejax.evaluation.protocols import units as scoring_units

MODES = ("full", "sparse")


@dataclasses.dataclass(frozen=True)
class Cell:
  """One line of the table.

  Attributes:
    source: name of the data.
    mode: `full`, `sparse`, or `unigram` for the baseline that ignores context.
    budget: keys a query reads; None where that does not apply.
    loss, loss_se: nats per token and its standard error over rows, windows or documents; no
      error of a single one.
    perplexity, perplexity_se: exp(loss), and its standard error.
    bits_per_byte: of the text; None for synthetic data and for the baseline.
    accuracy: of the most likely token; None for the baseline.
    num_tokens: that count.
    gap, gap_se: loss above that of full inference, and its standard error over the same rows;
      None where full inference was not asked for, and for what is not sparse.
    protocol: see `protocols.settings.Settings`.
    length: tokens of a row or a window.
    stride: between windows; None where there are none.
    decoded: whether tokens were scored by decoding.
    num_samples: rows, windows or documents.
    num_bytes: UTF-8 bytes of the text; None as `bits_per_byte`.
    num_words: pieces between white space; None where units are no whole documents.
    word_perplexity, byte_perplexity: exp of the nats per word and per byte, as
      lm-evaluation-harness has them; None where those are not counted.
    positions: the same by context.
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
  protocol: str = "rows"
  length: int | None = None
  stride: int | None = None
  decoded: bool = False
  num_samples: int | None = None
  num_bytes: int | None = None
  num_words: int | None = None
  word_perplexity: float | None = None
  byte_perplexity: float | None = None
  positions: tuple[by_position.Position, ...] = ()


def from_json(cell: dict) -> Cell:
  """A cell from its record in `perplexity.json`."""
  found = tuple(
    plans.restore(by_position.Position, position) for position in cell.get("positions", ())
  )
  return plans.restore(Cell, cell | dict(positions=found))


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
      most = sequence_length // block_size * block_size
      remedy = f"take at most {most}, or" if most else "take"
      raise errors.ConfigError(
        f"--budgets={budget} exceeds rows of {sequence_length} tokens, which it would read "
        f"whole; {remedy} longer rows with --sequence_length or --lengths."
      )


def run(
  subject: subjects.Subject, settings: protocols.Settings | None = None, **options
) -> list[Cell]:
  """Scores a text in every mode, budget and length; see `plan`."""
  planned = plan(subject, settings, **options)
  return cells(planned.units, plans.measure(planned.units, subject))


def plan(
  subject: subjects.Subject,
  settings: protocols.Settings | None = None,
  *,
  lengths: Sequence[int] = (),
  modes: Sequence[str] = MODES,
  budgets: Sequence[int] = (),
  max_rows: int = 0,
  batch_size: int = 0,
) -> plans.Plan:
  """Units of a text, a mode, a budget and a length each, and of a source for the baseline.

  Args:
    subject: the checkpoint.
    settings: what is read; None is packed rows of the validation splits.
    lengths: tokens of a row or a window; () is the protocol's own, or a row of the subject.
    modes: of inference.
    budgets: keys a query reads under sparse inference; () is that of training.
    max_rows: rows, windows or documents of each text; 0 takes all. Of `pg19`, samples.
    batch_size: rows at once, as long as those of the subject; of shorter ones as many more.
      0 is that of a training pass.

  Raises:
    ConfigError: what `check_modes` refuses, or `settings.choose_lengths` or `choose_stride`;
      or rows of several documents that are to be decoded.
    DataError: no text to score, or one with another tokenizer.
  """
  settings = settings or protocols.Settings()
  options, row_length = subject.transformer.options, subject.config.data.sequence_length
  lengths = protocols.choose_lengths(settings.protocol, lengths, row_length)
  check_modes(modes, budgets, options.block_size, max(lengths))
  found = parts.find(subject, settings, lengths=lengths, most=max_rows)
  units = []
  if settings.protocol == "rows" and not settings.corpus:
    units += [
      scoring_units.baseline(source) for source in parts.with_validation(subject.corpus)
    ]
  asked = []
  # Full inference first: the others are compared with it.
  for mode in sorted(modes, key=MODES.index):
    asked += [(mode, x) for x in (budgets or [options.budget] if mode == "sparse" else [None])]

  units += scoring_units.of_parts(
    subject, found, asked, settings=settings, max_rows=max_rows, batch_size=batch_size
  )

  def tell(values):
    found = cells(units, values)
    return plans.Told(found, markdown.align(rows(found)))

  return plans.Plan(tuple(units), tell)


def cells(units: Sequence[plans.Unit], values: Sequence[Any]) -> list[Cell]:
  """Lines of the table, in the order of units."""
  found, in_full = [], {}
  for unit, value in zip(units, values, strict=True):
    key = unit.key
    if key["mode"] == "unigram":
      (loss,) = plans.floats([value["loss"]])
      exp = scoring.exp(loss)
      found.append(
        Cell(key["source"], "unigram", None, loss, None, exp, None, None, None, None)
      )
      continue
    place = key["source"], key["length"]
    if key["mode"] == "full":
      in_full[place] = value
    full = None if key["mode"] == "full" else in_full.get(place)
    found.append(_cell(key, value, full))
  return found


def _cell(key, value: dict[str, Any], full: dict[str, Any] | None) -> Cell:
  scores = by_position.scores(value)
  summary = scoring.summarize(scores)
  nll, num_bytes = scores.nll.sum(), int(scores.num_bytes.sum())
  num_words = None if value["num_words"] is None else int(sum(value["num_words"]))
  return Cell(
    source=key["source"],
    mode=key["mode"],
    budget=key["budget"],
    loss=float(summary.loss),
    loss_se=by_position.known(summary.loss_se),
    perplexity=summary.perplexity,
    perplexity_se=by_position.known(summary.perplexity_se),
    bits_per_byte=summary.bits_per_byte,
    accuracy=float(summary.accuracy),
    num_tokens=summary.num_tokens,
    **by_position.gap(scores, None if full is None else by_position.scores(full)),
    protocol=key["protocol"],
    length=key["length"],
    stride=key["stride"],
    decoded=key["decode"],
    num_samples=summary.num_rows,
    num_bytes=num_bytes or None,
    num_words=num_words,
    word_perplexity=scoring.exp(nll / num_words) if num_words else None,
    byte_perplexity=scoring.exp(nll / num_bytes) if num_bytes else None,
    positions=by_position.of_values(
      value["positions"], None if full is None else full["positions"]
    ),
  )


def rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
  """Rows of a table, the header first; columns that tell nothing are left out."""
  has_lengths = len({cell.length for cell in cells if cell.mode in MODES}) > 1
  has_words = any(cell.word_perplexity is not None for cell in cells)
  header = (
    *("data", "inference", "budget", *(["length"] if has_lengths else [])),
    *("perplexity", *(["per word"] if has_words else [])),
    *("bits/byte", "loss", "above full", "accuracy", "tokens"),
  )
  return [header, *(_row(cell, has_lengths, has_words) for cell in cells)]


def _row(cell: Cell, has_lengths: bool, has_words: bool) -> tuple[str, ...]:
  length = markdown.number(cell.length, ",d")
  # Of a model that knows little it has more digits than a table has room for.
  is_large = cell.word_perplexity is not None and cell.word_perplexity >= 1e6
  per_word = markdown.number(cell.word_perplexity, ".3e" if is_large else ".3f")
  return (
    *(cell.source, cell.mode, markdown.number(cell.budget, "d")),
    *([length] if has_lengths else []),
    markdown.with_error(cell.perplexity, cell.perplexity_se, 3),
    *([per_word] if has_words else []),
    markdown.number(cell.bits_per_byte, ".4f"),
    markdown.with_error(cell.loss, cell.loss_se, 4),
    "-" if cell.gap is None else markdown.with_error(cell.gap, cell.gap_se, 4),
    markdown.number(cell.accuracy, ".1%"),
    markdown.number(cell.num_tokens, ",d"),
  )
