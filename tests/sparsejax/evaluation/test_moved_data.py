"""Checkpoints whose training data lie elsewhere, or have become others."""

import pytest

from configs import base
from sparsejax import errors
from sparsejax.data import prepare
from sparsejax.evaluation import subject as subjects
from tests import small


def write(path, text):
  raw = path.with_suffix(".txt")
  raw.write_text(text)
  prepare.prepare([str(raw)], path, prepare.Settings(validation_fraction=0.0))


@pytest.fixture
def trained(tmp_path):
  """A checkpoint, and where its data are."""
  data = tmp_path / "data"
  write(data, "what a model has read. " * 40)
  config = small.make_config(data__sources=(str(data),))
  small.save_checkpoints(tmp_path / "run", config)
  return tmp_path / "run", data


def test_data_that_have_moved_can_be_named(trained):
  workdir, data = trained
  data.rename(data.with_name("elsewhere"))
  message = r"data does not exist; .*\nThe checkpoint's tokenizer is with .* with --sources\."
  with pytest.raises(errors.DataError, match=message):
    subjects.describe(workdir, base.get_config())
  moved = (str(data.with_name("elsewhere")),)
  found = subjects.describe(workdir, base.get_config(), sources=moved)
  assert found.corpus.tokenizer.encode("é") == list("é".encode())
  with pytest.raises(errors.DataError, match=r"nowhere does not exist; make one with[^\n]*$"):
    subjects.describe(workdir, base.get_config(), sources=(str(data.with_name("nowhere")),))


def test_who_needs_the_tokenizer_alone_may_have_other_data(trained):
  workdir, data = trained
  before = subjects.describe(workdir, base.get_config()).corpus
  data.rename(data.with_name("before"))
  write(data, "something else. " * 40)
  with pytest.raises(errors.CheckpointError, match=r"have changed since training"):
    subjects.describe(workdir, base.get_config())
  after = subjects.describe(workdir, base.get_config(), checks_data=False).corpus
  assert after.fingerprint != before.fingerprint
  assert after.tokenizer.fingerprint == before.tokenizer.fingerprint
