"""Perplexity of held-out text, under full inference and under sparse inference at budgets."""

from collections.abc import Sequence
import dataclasses
import math

from sparsejax import errors, scoring
from sparsejax.configuration import build
from sparsejax.data import statistics
from sparsejax.evaluation import markdown
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
  """Scores the validation rows of every source.

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
  cells = []
  for source in sources:
    loss = statistics.unigram_loss(source, config.model.vocab_size)
    cells.append(_baseline(source.name, loss))
  in_full: dict[str, scoring.RowScores] = {}
  # Full inference first: the others are compared with it.
  for mode in sorted(modes, key=MODES.index):
    for budget in (budgets or [options.budget]) if mode == "sparse" else [None]:
      transformer = subject.transformer
      if budget is not None:
        transformer = build.with_budget(transformer, budget)
      score = scoring.make_score(transformer, mode, config.loss.chunk_length)
      for source in sources:
        scores = scoring.score_rows(
          score,
          subject.params,
          source.validation,
          bytes_per_id=source.bytes_per_id,
          batch_size=batch_size,
          num_rows=max_rows or _ALL,
          mesh=subject.mesh,
        )
        gap = {}
        if mode == "full":
          in_full[source.name] = scores
        elif source.name in in_full:
          more, error = scoring.compare(scores, in_full[source.name])
          gap = dict(gap=more, gap_se=error)
        cells.append(_cell(source.name, mode, budget, scoring.summarize(scores), **gap))
  return cells


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
