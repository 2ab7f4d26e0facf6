"""How likely a model finds continuations of contexts, many rows at a time.

Letters: B rows, T tokens.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import jax
import tqdm

from sparsejax import attention, errors, model, scoring
from sparsejax.attention import method
from sparsejax.data import batch as data
from sparsejax.evaluation import row_batches
from sparsejax.evaluation.protocols import windows


class Pair(NamedTuple):
  """Ids that are read, at least one, and the ids behind them that are scored."""

  context: Sequence[int]
  continuation: Sequence[int]


class Likelihood(NamedTuple):
  """Of a continuation.

  Attributes:
    log_probability: of all its ids, nats.
    is_greedy: whether each of its ids has the largest logit.
  """

  log_probability: float
  is_greedy: bool


class Scorer:
  """Log-likelihoods under one stream of a model, by whole-row forward passes.

  Rows are padded on the right to one of few lengths, with one program for each. Attention
  looks back alone, and padding is no document, so that a row's score does not depend on them.
  """

  def __init__(
    self,
    transformer: model.Transformer,
    params: dict,
    *,
    stream: method.Stream,
    mesh: jax.sharding.Mesh,
    max_length: int,
    chunk_length: int,
    rows: int = 8,
  ):
    """Compiles nothing yet.

    Args:
      transformer, params: the model.
      stream: `full` or `sparse`.
      mesh: where the parameters are.
      max_length: tokens that the model reads at a time.
      chunk_length: positions of each row whose logits exist at the same time.
      rows: of `max_length` tokens that are scored together; of shorter ones, as many more.
    """
    self.max_length = max_length
    self._params, self._mesh, self._rows = params, mesh, rows
    self._score = scoring.make_score(transformer, stream, chunk_length)
    options = transformer.options
    self.lengths = row_batches.row_lengths(
      max_length, options.block_size, attention.dense_length(options)
    )

  def __call__(self, pairs: Sequence[Pair], *, progress: bool = False) -> list[Likelihood]:
    """Scores continuations, in the order given.

    Args:
      pairs: of which contexts that do not fit in a row lose ids on the left.
      progress: whether a bar shows how many are done.

    Raises:
      DataError: an empty context or continuation, or a continuation longer than a row.
    """
    for number, pair in enumerate(pairs):
      _check(pair, number, self.max_length)
    found: list[Likelihood | None] = [None] * len(pairs)
    with tqdm.tqdm(total=len(pairs), desc="log-likelihoods", disable=not progress) as bar:
      batches = row_batches.by_length(
        [self._length(pair) for pair in pairs],
        max_length=self.max_length,
        rows=self._rows,
        num_devices=self._mesh.size,
      )
      for length, numbers, batch_size in batches:
        scores = scoring.score_rows(
          self._score,
          self._params,
          [make_row(pairs[number], length, self.max_length) for number in numbers],
          bytes_per_id=None,
          batch_size=batch_size,
          num_rows=len(numbers),
          mesh=self._mesh,
        )
        for number, nll, hits, num_tokens in zip(
          numbers, scores.nll, scores.hits, scores.num_tokens, strict=True
        ):
          found[number] = Likelihood(-float(nll), bool(hits == num_tokens))
        bar.update(len(numbers))
    return found

  def _length(self, pair: Pair) -> int:
    """Of a pair's row."""
    needed = min(len(pair.context) + len(pair.continuation) - 1, self.max_length)
    return self.lengths[bisect.bisect_left(self.lengths, needed)]


def make_row(pair: Pair, length: int, max_length: int) -> data.Batch:
  """One row of `length` tokens, in which the ids of the continuation count.

  Its context loses ids on the left if both, without the last id, exceed `max_length`.
  """
  ids = [*pair.context, *pair.continuation][-(max_length + 1) :]
  return row_batches.make_row(ids, len(pair.continuation), length)


def rolling_pairs(ids: Sequence[int], prefix: int, max_length: int) -> list[Pair]:
  """Pieces of a text in which each id is scored once, as lm-evaluation-harness cuts them.

  The first piece follows `prefix` alone, and later ones the id before them; the last begins
  earlier and scores only what is left, so that it has as much context as there is room for.

  Args:
    ids: of the text; without any, there are no pieces.
    prefix: id that opens the text and is not scored.
    max_length: tokens that the model reads at a time.
  """
  whole = [prefix, *ids]
  return [
    Pair(whole[span.start : span.first], whole[span.first : span.stop])
    for span in windows.rolling(len(ids), max_length, max_length)
  ]


def _check(pair: Pair, number: int, max_length: int) -> None:
  if not len(pair.context) or not len(pair.continuation):
    what = "continuation" if len(pair.context) else "context"
    raise errors.DataError(f"request {number} has no ids of a {what}; give it some text.")
  if len(pair.continuation) > max_length:
    raise errors.DataError(
      f"the continuation of request {number} has {len(pair.continuation)} ids, more than the "
      f"{max_length} of a row; take longer rows with --sequence_length."
    )
