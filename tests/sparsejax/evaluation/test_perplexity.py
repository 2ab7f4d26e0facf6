"""Perplexity against numpy, from the model's logits."""

import math
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import errors, model, sharding
from sparsejax.configuration import build
from sparsejax.data import statistics
from sparsejax.evaluation import perplexity
from sparsejax.evaluation import subject as subjects
from tests import small

LENGTH, ROWS = 32, 5
BYTES = np.arange(320) ** 2 % 97 + 1


def make_rows(count, seed=0):
  batch = small.make_batch(rows=count, length=LENGTH, seed=seed)
  return [type(batch)(*(np.asarray(field[i]) for field in batch)) for i in range(count)]


class Rows(list):
  max_documents = 3


def make_source(name="text", bytes_per_id=BYTES, validation=()):
  return types.SimpleNamespace(
    name=name,
    train=make_rows(4, seed=9),
    validation=Rows(validation),
    bytes_per_id=bytes_per_id,
    fingerprint=name,
  )


@pytest.fixture(scope="module")
def subject():
  config = small.make_config(
    data__sequence_length=LENGTH, data__batch_size=4, attention__num_blocks=1
  )
  transformer = build.make_model(config, max_documents=4)
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  params = small.make_params(transformer, scale=5.0)
  sources = (
    make_source(validation=make_rows(ROWS)),
    make_source("empty"),
    make_source("synthetic", None, make_rows(3, seed=1)),
  )
  return subjects.Subject(
    path=pathlib.Path("runs/a/checkpoints/3"),
    step=3,
    config=config,
    transformer=transformer,
    backends=[],
    params=jax.device_put(params, sharding.replicated(mesh)),
    corpus=types.SimpleNamespace(sources=sources),
    mesh=mesh,
  )


@pytest.fixture(scope="module")
def cells(subject):
  """Of one block of 8 keys as trained, and of all four that a row has."""
  found = perplexity.run(subject, budgets=(8, 32))
  return {(cell.source, cell.mode, cell.budget): cell for cell in found}


@pytest.fixture(scope="module")
def by_hand(subject):
  """Logits of the text's rows, and from them every statistic in float64."""
  batch = small.make_batch(rows=ROWS, length=LENGTH, seed=0)
  params = jax.device_get(subject.params)

  @jax.jit
  def logits(params):
    return {
      mode: model.logits(
        params,
        subject.transformer.apply(
          {"params": params}, batch.inputs, batch.positions, batch.segments, stream=mode
        ).hidden_BTE,
      )
      for mode in perplexity.MODES
    }

  statistics_ = {}
  weights, targets = np.asarray(batch.weights), np.asarray(batch.targets)
  for mode, logits_BTV in logits(jax.tree.map(jnp.asarray, params)).items():
    x = np.asarray(logits_BTV, np.float64)
    log_normalizer = np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)) + x.max(-1)
    nll = log_normalizer - np.take_along_axis(x, targets[..., None], -1)[..., 0]
    nll_B, tokens_B = (nll * weights).sum(-1), weights.sum(-1)
    loss = nll_B.sum() / tokens_B.sum()
    residual = nll_B - loss * tokens_B
    statistics_[mode] = types.SimpleNamespace(
      loss=loss,
      loss_se=math.sqrt(ROWS / (ROWS - 1) * (residual**2).sum()) / tokens_B.sum(),
      bits_per_byte=nll_B.sum() / math.log(2) / (BYTES[targets] * weights).sum(),
      accuracy=((x.argmax(-1) == targets) * weights).sum() / tokens_B.sum(),
      num_tokens=tokens_B.sum(),
    )
  return statistics_


@pytest.mark.parametrize(("mode", "budget"), [("full", None), ("sparse", 8)])
def test_perplexity_is_the_exponential_of_the_mean(cells, by_hand, mode, budget):
  cell, expected = cells["text", mode, budget], by_hand[mode]
  assert cell.loss == pytest.approx(expected.loss, rel=1e-4)
  assert cell.perplexity == pytest.approx(math.exp(expected.loss), rel=1e-3)
  assert cell.num_tokens == expected.num_tokens
  assert cell.accuracy == pytest.approx(expected.accuracy)
  assert cell.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-4)
  assert cell.loss_se == pytest.approx(expected.loss_se, rel=1e-2)
  assert cell.perplexity_se == pytest.approx(cell.perplexity * cell.loss_se)


def test_streams_differ_and_a_budget_of_the_whole_row_is_full(cells):
  full, trained = cells["text", "full", None], cells["text", "sparse", 8]
  whole = cells["text", "sparse", 32]
  assert abs(full.loss - trained.loss) > 1e-3
  assert whole.loss == pytest.approx(full.loss, rel=1e-5)
  assert whole.accuracy == full.accuracy


def test_sparse_inference_is_compared_with_full_on_the_same_rows(cells):
  full, trained = cells["text", "full", None], cells["text", "sparse", 8]
  assert trained.gap == pytest.approx(trained.loss - full.loss, rel=1e-3)
  # What both have in common is not in it.
  assert 0 < trained.gap_se < trained.loss_se
  assert (full.gap, full.gap_se) == (None, None)
  assert cells["text", "sparse", 32].gap == pytest.approx(0.0, abs=1e-4)


def test_without_full_inference_there_is_nothing_to_compare_with(subject):
  (cell,) = [c for c in perplexity.run(subject, modes=("sparse",)) if c.source == "text"][1:]
  assert cell.gap is None


def test_every_source_with_validation_has_its_cells_and_a_baseline(cells, subject):
  assert list(cells) == [
    ("text", "unigram", None),
    ("synthetic", "unigram", None),
    ("text", "full", None),
    ("synthetic", "full", None),
    ("text", "sparse", 8),
    ("synthetic", "sparse", 8),
    ("text", "sparse", 32),
    ("synthetic", "sparse", 32),
  ]
  baseline = cells["text", "unigram", None]
  loss = statistics.unigram_loss(subject.corpus.sources[0], 320)
  assert baseline.loss == pytest.approx(loss)
  assert baseline.perplexity == pytest.approx(math.exp(loss))
  assert baseline.loss_se is baseline.bits_per_byte is baseline.accuracy is None


def test_synthetic_data_have_no_bytes(cells):
  assert cells["synthetic", "full", None].bits_per_byte is None


def counting(monkeypatch):
  """Scoring without a model; returns what is asked of it."""
  asked = []

  def make_score(transformer, stream, chunk_length):
    assert chunk_length == 24
    asked.append((stream, transformer.options.num_blocks, []))

    def score(params, batch):
      del params
      asked[-1][2].append(batch.inputs.shape[0])
      return batch.weights, batch.weights > 0

    return score

  monkeypatch.setattr(perplexity.scoring, "make_token_score", make_score)
  return asked


def test_without_budgets_it_is_that_of_training(subject, monkeypatch):
  asked = counting(monkeypatch)
  found = perplexity.run(subject, modes=("sparse",))
  assert [(stream, blocks) for stream, blocks, _ in asked] == [("sparse", 1)]
  assert [c.budget for c in found if c.mode == "sparse"] == [8, 8]


def test_rows_are_limited_and_batches_fit_the_devices(subject, monkeypatch):
  """A training pass has 4 rows; 8 devices need 8."""
  asked = counting(monkeypatch)
  found = perplexity.run(subject, modes=("full",), max_rows=2)
  assert asked == [("full", 1, [8, 8])]
  weights = [row.weights.sum() for row in make_rows(ROWS)[:2]]
  assert found[2].num_tokens == sum(weights)
  asked = counting(monkeypatch)
  perplexity.run(subject, modes=("full",), batch_size=9)
  # Of 16 rows that may be together there are 5 and 3.
  assert asked == [("full", 1, [8, 8])]


def test_data_without_validation_are_refused(subject):
  bare = subjects.Subject(
    **vars(subject) | dict(corpus=types.SimpleNamespace(sources=(make_source(),)))
  )
  with pytest.raises(errors.DataError, match=r"has a validation split; prepare it with --val"):
    perplexity.run(bare)


@pytest.mark.parametrize(
  ("modes", "budgets", "message"),
  [
    (["fulll"], [], r"unknown mode 'fulll'\. Did you mean 'full'\? There are: full, sparse\."),
    (["full"], [16], r"--budgets are of sparse inference; add sparse to --modes\."),
    (
      ["sparse"],
      [20],
      r"--budgets=20 is not a whole number of blocks of 8 keys; take 16 or 24",
    ),
    (["sparse"], [4], r"--budgets=4 is not a whole number of blocks of 8 keys; take 8 or 16"),
    (["sparse"], [0], r"--budgets=0 is not a whole number of blocks"),
    (
      ["sparse"],
      [8, 72],
      r"--budgets=72 exceeds rows of 64 tokens.*take at most 64, or longer",
    ),
  ],
)
def test_what_cannot_be_asked_is_refused(modes, budgets, message):
  with pytest.raises(errors.ConfigError, match=message):
    perplexity.check_modes(modes, budgets, block_size=8, sequence_length=64)


def test_rows_below_a_block_have_no_budget():
  with pytest.raises(errors.ConfigError, match=r"of 7 tokens.*whole; take longer rows with"):
    perplexity.check_modes(["sparse"], [8], block_size=8, sequence_length=7)


def test_what_can_be_asked_is_not():
  perplexity.check_modes(["full", "sparse"], [8, 64], block_size=8, sequence_length=64)
  perplexity.check_modes(["full"], [], block_size=8, sequence_length=64)


def test_a_run_checks_first(subject):
  with pytest.raises(errors.ConfigError, match=r"--budgets=12"):
    perplexity.run(subject, budgets=(12,))
