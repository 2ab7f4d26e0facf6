"""Scores by decoding are those of a forward pass."""

import pathlib
import types

import jax
import numpy as np
import pytest

from sparsejax import errors, scoring, sharding
from sparsejax.configuration import build
from sparsejax.data import batch as data
from sparsejax.data import tokenizers
from sparsejax.decoding import cache as caches
from sparsejax.evaluation import by_decode, perplexity, row_batches
from sparsejax.evaluation import subject as subjects
from sparsejax.evaluation.protocols import settings as protocols
from tests import small
from tests.sparsejax.decoding.models import model_of

# Tokens of rows of 40, and of these how many count, the last ones.
ROWS = ((40, 30), (33, 1), (20, 20), (9, 4))


def make_batch():
  rng = np.random.default_rng(0)
  rows = [
    row_batches.make_row(rng.integers(256, size=size + 1), scored, 40) for size, scored in ROWS
  ]
  blank = data.Batch(*(np.zeros_like(field) for field in rows[0]))
  return data.Batch(*(np.stack(field) for field in zip(*rows, blank, strict=True)))


@pytest.mark.parametrize(
  ("name", "stream"),
  [("ssa_nosa", "sparse"), ("nsa", "sparse")],
)
def test_every_counted_token_has_the_score_of_a_forward_pass(name, stream):
  """Rows of other lengths beside each other, read as a prompt up to where they count."""
  transformer, params = model_of(name)
  batch = make_batch()
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  score = by_decode.make_token_score(transformer, stream, mesh)
  nll_BT, is_hit_BT = score(params, batch)
  wanted_BT, wanted_hit_BT = scoring.make_token_score(transformer, stream, 24)(params, batch)
  counted = batch.weights > 0
  assert counted.sum() == 55
  np.testing.assert_allclose(nll_BT[counted], wanted_BT[counted], rtol=2e-4, atol=2e-4)
  np.testing.assert_array_equal(is_hit_BT[counted], wanted_hit_BT[counted])
  # Of what was read as a prompt there is no score.
  assert not np.asarray(nll_BT)[0, :10].any()
  assert np.asarray(nll_BT)[0, 10:].all()


@pytest.fixture(scope="module")
def subject():
  config = small.make_config(data__sequence_length=32, data__batch_size=4)
  config.attention.update(method="moba", num_blocks=2)
  transformer = build.make_model(config, max_documents=4)
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  params = small.make_params(transformer, scale=4.0)
  return subjects.Subject(
    path=pathlib.Path("runs/a/checkpoints/3"),
    step=3,
    config=config,
    transformer=transformer,
    backends=[],
    params=jax.device_put(params, sharding.replicated(mesh)),
    corpus=types.SimpleNamespace(sources=(), tokenizer=tokenizers.ByteTokenizer()),
    mesh=mesh,
  )


def ask(subject, tmp_path, *, decode, **options):
  path = tmp_path / "text.txt"
  path.write_text("Perplexity by cache decode equals perplexity by forward pass.")
  settings = protocols.Settings(
    protocol="sliding", corpus=(str(path),), stride=8, decode=decode
  )
  return perplexity.run(subject, settings, lengths=(24,), **options)


def test_perplexity_by_decoding_is_that_of_a_forward_pass(subject, tmp_path):
  """On eight devices, windows of three blocks of which sparse inference reads two."""
  found = ask(subject, tmp_path, decode=True)
  wanted = ask(subject, tmp_path, decode=False)
  for ours, theirs in zip(found, wanted, strict=True):
    assert (ours.decoded, theirs.decoded) == (True, False)
    assert (ours.mode, ours.num_tokens) == (theirs.mode, theirs.num_tokens)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert ours.accuracy == theirs.accuracy
  _, sparse = found
  assert abs(sparse.gap) > 1e-3
  assert sparse.gap == pytest.approx(wanted[1].gap, abs=1e-5)


def test_a_cache_that_does_not_fit_is_refused(subject, tmp_path, monkeypatch):
  monkeypatch.setattr(caches, "free_bytes", lambda: 1000)
  with pytest.raises(errors.UserError, match=r"a cache of 8 rows takes .* and the device"):
    ask(subject, tmp_path, decode=True, modes=("full",))
