"""How well a model predicts rows of tokens, under any of its streams."""

from collections.abc import Callable, Iterator, Sequence
import math
from typing import NamedTuple

import jax
import numpy as np

from sparsejax import losses, model, sharding
from sparsejax.attention import method
from sparsejax.data import batch as data


class RowScores(NamedTuple):
  """Sums over the counted tokens of each row; every field is [B].

  Attributes:
    nll: negative log-likelihood, nats.
    hits: tokens whose target had the largest logit.
    num_tokens: tokens that count.
    num_bytes: UTF-8 bytes of text they stand for; 0 where there is no text.
  """

  nll: np.ndarray
  hits: np.ndarray
  num_tokens: np.ndarray
  num_bytes: np.ndarray


def make_score(
  transformer: model.Transformer, stream: method.Stream, chunk_length: int
) -> Callable[[dict, data.Batch], tuple[jax.Array, jax.Array]]:
  """Returns a jitted `score(params, batch) -> (nll_B, hits_B)` under one stream."""

  score_tokens = make_token_score(transformer, stream, chunk_length)

  @jax.jit
  def score(params, batch):
    nll_BT, is_hit_BT = score_tokens(params, batch)
    return (nll_BT * batch.weights).sum(-1), (is_hit_BT * batch.weights).sum(-1)

  return score


def make_token_score(
  transformer: model.Transformer, stream: method.Stream, chunk_length: int
) -> Callable[[dict, data.Batch], tuple[jax.Array, jax.Array]]:
  """Returns a jitted `score(params, batch) -> (nll_BT, is_hit_BT)` under one stream.

  Whatever weights say, every target is scored: nats, and whether its logit is the largest.
  """

  @jax.jit
  def score(params, batch):
    output = transformer.apply(
      {"params": params}, batch.inputs, batch.positions, batch.segments, stream=stream
    )
    predictions = losses.next_token(
      output.hidden_BTE, model.unembedding(params), batch.targets, chunk_length=chunk_length
    )
    return predictions.nll, predictions.is_hit

  return score


def score_rows(
  score,
  params,
  rows: Sequence[data.Batch],
  *,
  bytes_per_id: np.ndarray | None,
  batch_size: int,
  num_rows: int,
  mesh: jax.sharding.Mesh,
) -> RowScores:
  """Scores the first `num_rows` rows of a split, `batch_size` at a time.

  Args:
    score: from `make_score`.
    params: of the model.
    rows: the split.
    bytes_per_id: bytes of text each id stands for; None where there is no text.
    batch_size: rows per call. The last batch is filled with rows of padding, so that one
      compiled shape serves all.
    num_rows: how many rows, at most.
    mesh: where parameters are.
  """
  pieces = []
  with sharding.use(mesh):
    for stacked, count in _batches(rows, batch_size, num_rows):
      nll_B, hits_B = jax.device_get(score(params, sharding.put_batch(stacked, mesh)))
      num_bytes_B = np.zeros(batch_size)
      if bytes_per_id is not None:
        num_bytes_B = (bytes_per_id[stacked.targets] * stacked.weights).sum(-1)
      scores = RowScores(nll_B, hits_B, stacked.weights.sum(-1), num_bytes_B)
      pieces.append(RowScores(*(field[:count] for field in scores)))
  return RowScores(*(np.concatenate(field) for field in zip(*pieces, strict=True)))


def _batches(rows, batch_size: int, num_rows: int) -> Iterator[tuple[data.Batch, int]]:
  num_rows = min(num_rows, len(rows))
  for start in range(0, num_rows, batch_size):
    picked = [rows[row] for row in range(start, min(start + batch_size, num_rows))]
    count = len(picked)
    blank = data.Batch(*(np.zeros_like(field) for field in picked[0]))
    picked += [blank] * (batch_size - count)
    yield data.Batch(*(np.stack(field) for field in zip(*picked, strict=True))), count


class Summary(NamedTuple):
  """Scores of many rows in the units people quote.

  Attributes:
    loss: mean negative log-likelihood per token, nats.
    loss_se: its standard error, rows being the independent units.
    perplexity: exp(loss).
    perplexity_se: its standard error, to first order.
    bits_per_byte: of the text; None where there is none.
    accuracy: share of tokens whose target had the largest logit.
    num_tokens: tokens that count.
    num_rows: rows scored.
  """

  loss: float
  loss_se: float
  perplexity: float
  perplexity_se: float
  bits_per_byte: float | None
  accuracy: float
  num_tokens: int
  num_rows: int


def summarize(scores: RowScores) -> Summary:
  """Means over tokens, with errors from the spread between rows (ratio estimator).

  NaN is the mean of no tokens.
  """
  nll, num_tokens = scores.nll.astype(np.float64), scores.num_tokens.astype(np.float64)
  total = num_tokens.sum() or math.nan
  loss = nll.sum() / total
  loss_se = ratio_error(nll, num_tokens)
  perplexity = exp(loss)
  num_bytes = scores.num_bytes.sum()
  return Summary(
    loss=loss,
    loss_se=loss_se,
    perplexity=perplexity,
    perplexity_se=perplexity * loss_se,
    bits_per_byte=nll.sum() / math.log(2) / num_bytes if num_bytes else None,
    accuracy=scores.hits.sum() / total,
    num_tokens=int(num_tokens.sum()),
    num_rows=len(nll),
  )


def compare(scores: RowScores, others: RowScores) -> tuple[float, float]:
  """How much more loss per token, in nats, than others have on the same rows, and its error.

  Row by row, so that what makes rows hard for both is not in the error.

  Raises:
    ValueError: the rows do not count the same tokens.
  """
  if not np.array_equal(scores.num_tokens, others.num_tokens):
    raise ValueError("scores are of different rows")
  num_tokens = scores.num_tokens.astype(np.float64)
  more = scores.nll.astype(np.float64) - others.nll.astype(np.float64)
  return more.sum() / (num_tokens.sum() or math.nan), ratio_error(more, num_tokens)


def exp(nats: float) -> float:
  """Perplexity of a loss; infinite where a float has no room for it."""
  with np.errstate(over="ignore"):
    return float(np.exp(nats))


def ratio_error(sums: np.ndarray, num_tokens: np.ndarray) -> float:
  """Standard error of a mean per token, from the spread of rows' sums.

  NaN for a single row, for no tokens and for sums that are not finite.
  """
  rows, total = len(sums), num_tokens.sum()
  if rows < 2 or not total or not np.isfinite(sums).all():
    return math.nan
  # Tokens of a row depend on each other; rows are the smallest pieces that hardly do.
  residual = sums - sums.sum() / total * num_tokens
  return float(math.sqrt((residual**2).sum() * rows / (rows - 1)) / total)
