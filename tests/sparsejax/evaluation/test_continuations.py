"""Log-likelihoods of continuations: which ids count, what is cut, and what padding changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import errors, model, sharding
from sparsejax.evaluation import continuations, row_batches
from tests import small

PAIRS = [
  continuations.Pair([5, 6, 7], [8, 9]),
  continuations.Pair([1], [300]),
  continuations.Pair(list(range(100)), list(range(150, 160))),
  continuations.Pair([7] * 3, list(range(61))),
]


@functools.cache
def make(method="moba"):
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  changes = dict(infllmv2__dense_length=40) if method == "infllmv2" else {}
  transformer = small.make_model(attention__method=method, **changes)
  params = jax.device_put(small.make_params(transformer, scale=4.0), sharding.replicated(mesh))
  return transformer, params, mesh


def make_scorer(method="moba", stream="sparse", **options):
  transformer, params, mesh = make(method)
  options = dict(max_length=64, chunk_length=24) | options
  return continuations.Scorer(transformer, params, stream=stream, mesh=mesh, **options)


def alone(pair, max_length, method="moba", stream="sparse"):
  """By all logits of a row of the pair's own length."""
  transformer, params, _ = make(method)
  ids = np.array([*pair.context, *pair.continuation][-(max_length + 1) :])
  inputs = jnp.asarray(ids[None, :-1])
  output = jax.jit(functools.partial(transformer.apply, stream=stream))(
    {"params": params}, inputs, jnp.arange(inputs.shape[1])[None], jnp.ones_like(inputs)
  )
  count = len(pair.continuation)
  logits_TV = np.asarray(model.logits(params, output.hidden_BTE)[0, -count:], np.float64)
  log_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
  targets = np.asarray(pair.continuation)
  total = log_TV[np.arange(count), targets].sum()
  return total, bool((logits_TV.argmax(-1) == targets).all()), int(logits_TV[-1].argmax())


@pytest.mark.parametrize("stream", ["full", "sparse"])
def test_a_pair_scores_as_it_does_alone(stream):
  found = make_scorer(stream=stream)(PAIRS)
  for pair, likelihood in zip(PAIRS, found, strict=True):
    total, is_greedy, _ = alone(pair, 64, stream=stream)
    assert likelihood.log_probability == pytest.approx(total, rel=1e-4)
    assert likelihood.is_greedy == is_greedy


def test_the_greedy_continuation_is_known_as_such():
  """And with its last id changed, it is not."""
  context, greedy = PAIRS[0].context, []
  for _ in range(3):
    _, _, best = alone(continuations.Pair(context + greedy, [0]), 64)
    greedy.append(best)
  other = [*greedy[:-1], (greedy[-1] + 1) % 320]
  found = make_scorer()([continuations.Pair(context, ids) for ids in (greedy, other)])
  assert [likelihood.is_greedy for likelihood in found] == [True, False]


def test_padding_does_not_make_a_short_row_sparse():
  """InfLLM-V2 reads rows below its threshold whole."""
  pair = continuations.Pair(list(range(30)), list(range(200, 208)))
  options = dict(method="infllmv2", max_length=128)
  likelihood, again = make_scorer(**options)([pair, pair])
  total, _, _ = alone(pair, 128, method="infllmv2")
  full, _, _ = alone(pair, 128, method="infllmv2", stream="full")
  assert total == full
  assert likelihood.log_probability == pytest.approx(total, rel=1e-5)
  assert again == likelihood


def test_rows_have_few_lengths():
  assert row_batches.row_lengths(500, 16) == [64, 128, 256, 500]
  assert row_batches.row_lengths(48, 16) == [48]
  assert row_batches.row_lengths(96, 24) == [72, 96]
  assert row_batches.row_lengths(256, 16, dense_length=100) == [64, 99, 128, 256]
  assert row_batches.row_lengths(256, 16, dense_length=1000) == [64, 128, 256]


def test_one_program_serves_a_length(monkeypatch):
  """Short rows are scored by more at a time; few of them by fewer."""
  scorer = make_scorer(max_length=256, rows=8)
  shapes = []
  score = scorer._score

  def remember(params, batch):
    shapes.append(batch.inputs.shape)
    return score(params, batch)

  monkeypatch.setattr(scorer, "_score", remember)
  short = [continuations.Pair([i], [i + 1]) for i in range(40)]
  long = continuations.Pair([1] * 200, [2])
  found = scorer([*short, long])
  assert shapes == [(8, 256), (32, 64), (8, 64)]
  assert len(found) == 41
  assert found[:40] != found[1:]
  assert found[3].log_probability == pytest.approx(alone(short[3], 256)[0], rel=1e-4)
  assert score._cache_size() == 3


def test_a_row_scores_the_continuation_alone():
  row = continuations.make_row(continuations.Pair([5, 6, 7], [8, 9]), 6, 8)
  np.testing.assert_array_equal(row.inputs, [5, 6, 7, 8, 0, 0])
  np.testing.assert_array_equal(row.targets, [6, 7, 8, 9, 0, 0])
  np.testing.assert_array_equal(row.weights, [0, 0, 1, 1, 0, 0])
  np.testing.assert_array_equal(row.segments, [1, 1, 1, 1, 0, 0])
  np.testing.assert_array_equal(row.positions, np.arange(6))


def test_a_context_that_is_too_long_loses_its_beginning():
  """The last id is never read, so that one more than a row fits."""
  pair = continuations.Pair([1, 2, 3, 4], [5, 6])
  np.testing.assert_array_equal(continuations.make_row(pair, 5, 5).inputs, [1, 2, 3, 4, 5])
  np.testing.assert_array_equal(continuations.make_row(pair, 4, 4).inputs, [2, 3, 4, 5])
  row = continuations.make_row(pair, 2, 2)
  np.testing.assert_array_equal(row.inputs, [4, 5])
  np.testing.assert_array_equal(row.weights, [1, 1])


def test_rolling_pieces_are_those_of_the_harness():
  """Its own example: ten ids, four at a time."""
  assert continuations.rolling_pairs(list(range(10)), 99, 4) == [
    ([99], [0, 1, 2, 3]),
    ([3], [4, 5, 6, 7]),
    ([5, 6, 7], [8, 9]),
  ]
  assert continuations.rolling_pairs([1, 2], 99, 4) == [([99], [1, 2])]
  assert continuations.rolling_pairs([], 99, 4) == []


@pytest.mark.parametrize("count", [1, 7, 8, 9, 40])
def test_every_id_of_a_rolling_text_counts_once(count):
  pieces = continuations.rolling_pairs(list(range(count)), 99, 8)
  assert [i for piece in pieces for i in piece.continuation] == list(range(count))
  for piece in pieces[1:]:
    assert len(piece.context) + len(piece.continuation) == 9


@pytest.mark.parametrize(
  ("pair", "message"),
  [
    (([], [1]), "request 1 has no ids of a context"),
    (([1], []), "request 1 has no ids of a continuation"),
    (([1], [2] * 65), "request 1 has 65 ids, more than the 64 .*--sequence_length"),
  ],
)
def test_what_cannot_be_scored_is_refused(pair, message):
  with pytest.raises(errors.DataError, match=message):
    make_scorer()([PAIRS[0], continuations.Pair(*pair)])


def test_nothing_asked_is_nothing_answered():
  assert make_scorer()([]) == []
