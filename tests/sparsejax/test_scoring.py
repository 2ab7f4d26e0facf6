"""Sums over rows, and the statistics made of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import losses, model, scoring, sharding
from tests import small


def make_rows(count=5):
  batch = small.make_batch(rows=count)
  return [type(batch)(*(np.asarray(field[i]) for field in batch)) for i in range(count)]


@pytest.mark.parametrize("stream", ["full", "sparse"])
def test_rows_are_scored_one_by_one(stream):
  """Against the model run on each row alone; the last batch is filled up and cut."""
  transformer = small.make_model()
  params = small.make_params(transformer, scale=4.0)
  rows = make_rows()
  table = np.arange(320) % 7
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  scores = scoring.score_rows(
    scoring.make_score(transformer, stream, 24),
    jax.device_put(params, sharding.replicated(mesh)),
    rows,
    bytes_per_id=table,
    batch_size=8,
    num_rows=100,
    mesh=mesh,
  )

  @jax.jit
  def alone(row):
    row = jax.tree.map(lambda x: x[None], row)
    output = transformer.apply(
      {"params": params}, row.inputs, row.positions, row.segments, stream=stream
    )
    return losses.next_token(
      output.hidden_BTE, model.unembedding(params), row.targets, chunk_length=64
    )

  for i, row in enumerate(rows):
    predictions = alone(row)
    np.testing.assert_allclose(
      scores.nll[i], (predictions.nll[0] * row.weights).sum(), rtol=1e-4
    )
    assert scores.hits[i] == (predictions.is_hit[0] * row.weights).sum()
    assert scores.num_tokens[i] == row.weights.sum()
    assert scores.num_bytes[i] == (table[row.targets] * row.weights).sum()
  assert len(scores.nll) == 5


def test_num_rows_is_a_limit():
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  scores = scoring.score_rows(
    lambda params, batch: (jnp.zeros(8), jnp.zeros(8)),
    None,
    make_rows(),
    bytes_per_id=None,
    batch_size=8,
    num_rows=3,
    mesh=mesh,
  )
  assert len(scores.nll) == 3
  assert not scores.num_bytes.any()


def make_scores(rng, rows):
  num_tokens = rng.integers(50, 100, rows).astype(float)
  nll = num_tokens * (2.0 + 0.3 * rng.normal(size=rows))
  return scoring.RowScores(nll, num_tokens / 4, num_tokens, 2 * num_tokens)


def test_summary_is_per_token():
  scores = make_scores(np.random.default_rng(0), 40)
  summary = scoring.summarize(scores)
  loss = scores.nll.sum() / scores.num_tokens.sum()
  assert summary.loss == pytest.approx(loss)
  assert summary.perplexity == pytest.approx(math.exp(loss))
  assert summary.bits_per_byte == pytest.approx(loss / math.log(2) / 2)
  assert summary.accuracy == pytest.approx(0.25)
  assert summary.num_rows == 40


def test_the_standard_error_is_the_spread_of_repetitions():
  rng = np.random.default_rng(1)
  summaries = [scoring.summarize(make_scores(rng, 40)) for _ in range(400)]
  spread = np.std([summary.loss for summary in summaries])
  stated = np.mean([summary.loss_se for summary in summaries])
  assert stated == pytest.approx(spread, rel=0.15)
  assert summaries[0].perplexity_se == pytest.approx(
    summaries[0].loss_se * summaries[0].perplexity
  )


def test_one_row_has_no_error_and_no_text_no_bytes():
  scores = make_scores(np.random.default_rng(2), 1)
  summary = scoring.summarize(scores._replace(num_bytes=np.zeros(1)))
  assert math.isnan(summary.loss_se)
  assert summary.bits_per_byte is None


def test_scores_of_the_same_rows_are_compared_row_by_row():
  """Rows that are hard for both differ by a constant: that has no error."""
  scores = make_scores(np.random.default_rng(3), 40)
  worse = scores._replace(nll=scores.nll + 0.25 * scores.num_tokens)
  assert scoring.compare(worse, scores) == pytest.approx((0.25, 0.0), abs=1e-9)
  rng = np.random.default_rng(4)
  noisy = worse._replace(nll=worse.nll + rng.normal(size=40) * scores.num_tokens)
  more, error = scoring.compare(noisy, scores)
  residual = noisy.nll - scores.nll - more * scores.num_tokens
  assert error == pytest.approx(
    math.sqrt(40 / 39 * (residual**2).sum()) / scores.num_tokens.sum()
  )
  with pytest.raises(ValueError, match="different rows"):
    scoring.compare(scores._replace(num_tokens=scores.num_tokens + 1), scores)
