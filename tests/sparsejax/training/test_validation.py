"""Validation: the same rows under both modes of inference."""

import math
import types

import jax
import numpy as np
import pytest

from sparsejax import losses, model, sharding
from sparsejax.training import validation
from tests import small

LENGTH = 32
BYTES = np.arange(320) ** 2 % 97 + 1


def make_rows(count, seed):
  batch = small.make_batch(rows=count, length=LENGTH, seed=seed)
  return [type(batch)(*(np.asarray(field[i]) for field in batch)) for i in range(count)]


def make_source(name, rows, bytes_per_id=None):
  return types.SimpleNamespace(name=name, validation=rows, bytes_per_id=bytes_per_id)


def make_corpus(*sources):
  return types.SimpleNamespace(sources=sources)


@pytest.fixture(scope="module")
def parts():
  transformer = small.make_model(attention__num_blocks=1)
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  params = small.make_params(transformer, scale=5.0)

  @jax.jit
  def direct(params, batch):
    found = {}
    for stream in validation.STREAMS:
      output = transformer.apply(
        {"params": params}, batch.inputs, batch.positions, batch.segments, stream=stream
      )
      found[stream] = losses.next_token(
        output.hidden_BTE, model.unembedding(params), batch.targets, chunk_length=LENGTH
      )
    return found

  return transformer, mesh, params, direct


@pytest.fixture(scope="module")
def result(parts):
  """Sources of 11 and 3 rows, of which at most 8 are asked for."""
  transformer, mesh, params, _ = parts
  corpus = make_corpus(
    make_source("data/web", make_rows(11, seed=0), BYTES),
    make_source("empty", []),
    make_source("recall", make_rows(3, seed=1)),
  )
  validator = validation.Validator(
    transformer, corpus, mesh, batch_size=8, num_batches=1, chunk_length=24
  )
  assert validator
  return validator.run(jax.device_put(params, sharding.replicated(mesh)))


def sums(parts, stream, count, seed):
  """Loss, hits and tokens of the first rows, scored without the module."""
  _, _, params, direct = parts
  batch = small.make_batch(rows=11 if seed == 0 else 3, length=LENGTH, seed=seed)
  found = direct(params, batch)[stream]
  weights = np.asarray(batch.weights)[:count]
  nll = (np.asarray(found.nll)[:count] * weights).sum()
  hits = (np.asarray(found.is_hit)[:count] * weights).sum()
  num_bytes = (BYTES[np.asarray(batch.targets)[:count]] * weights).sum()
  return nll, hits, weights.sum(), num_bytes


@pytest.mark.parametrize("stream", validation.STREAMS)
def test_losses_are_those_of_direct_scoring(parts, result, stream):
  web, recall = sums(parts, stream, 8, 0), sums(parts, stream, 3, 1)
  assert result[f"eval/web/{stream}/loss"] == pytest.approx(web[0] / web[2], rel=1e-4)
  assert result[f"eval/web/{stream}/accuracy"] == pytest.approx(web[1] / web[2])
  bits = web[0] / math.log(2) / web[3]
  assert result[f"eval/web/{stream}/bpb"] == pytest.approx(bits, rel=1e-4)
  assert result[f"eval/recall/{stream}/loss"] == pytest.approx(recall[0] / recall[2], rel=1e-4)
  assert f"eval/recall/{stream}/bpb" not in result
  both = (web[0] + recall[0]) / (web[2] + recall[2])
  assert result[f"eval/{stream}/loss"] == pytest.approx(both, rel=1e-4)


def test_the_gap_is_of_the_same_rows(result):
  gap = result["eval/sparse/loss"] - result["eval/full/loss"]
  assert result["eval/gap"] == pytest.approx(gap)
  assert abs(gap) > 1e-3


def scores_of(seen, parts, rows, num_batches):
  """The values of a validator whose scoring is a count of rows."""
  transformer, mesh, _, _ = parts
  validator = validation.Validator(
    transformer,
    make_corpus(make_source("one", rows)),
    mesh,
    batch_size=8,
    num_batches=num_batches,
    chunk_length=24,
  )

  def score(params, batch):
    del params
    seen.append(np.asarray(batch.inputs))
    return batch.weights.sum(-1), batch.weights.sum(-1)

  validator._scores = dict.fromkeys(validation.STREAMS, score)
  return validator.run(None)


@pytest.mark.parametrize(("num_batches", "calls"), [(0, 3), (1, 1), (2, 2), (9, 3)])
def test_as_many_batches_as_asked_for_and_0_is_all(parts, num_batches, calls):
  seen = []
  values = scores_of(seen, parts, make_rows(17, seed=2), num_batches)
  assert len(seen) == 2 * calls
  # Full and sparse read the same rows.
  for full, sparse in zip(seen[:calls], seen[calls:], strict=True):
    np.testing.assert_array_equal(full, sparse)
  assert values == {
    "eval/full/loss": 1.0,
    "eval/full/accuracy": 1.0,
    "eval/sparse/loss": 1.0,
    "eval/sparse/accuracy": 1.0,
    "eval/gap": 0.0,
  }


def test_without_validation_rows_there_is_nothing_to_run(parts):
  transformer, mesh, _, _ = parts
  validator = validation.Validator(
    transformer,
    make_corpus(make_source("one", None)),
    mesh,
    batch_size=8,
    num_batches=1,
    chunk_length=24,
  )
  assert not validator


def test_the_line_for_people():
  values = {"eval/full/loss": 2.0, "eval/sparse/loss": 2.25, "eval/gap": 0.25}
  text = "eval step 7: loss full 2.0000 sparse 2.2500 (gap +0.2500)"
  assert validation.line(7, values) == text
  values |= {"eval/full/bpb": 1.5, "eval/sparse/bpb": 1.75}
  assert validation.line(7, values) == f"{text}, bits/byte 1.500 1.750"
