"""Documents by length: which are read, in which shares, and that order stays a function."""

import numpy as np
import pytest

from configs import smoke
from sparsejax import errors
from sparsejax.configuration import build
from sparsejax.data import corpus, rows, shards
from tests.sparsejax.data.form import FORM

LENGTHS = {"short": range(3, 6), "middle": range(6, 12), "long": range(12, 30)}
BOUNDS = (3, 6, 12, 30)


@pytest.fixture(scope="module")
def directory(write_prepared):
  """Ids 1 to 99 in short documents, from 100 in middle ones, from 200 in long ones."""
  rng = np.random.default_rng(0)
  documents = []
  for kind, first in zip(LENGTHS, (1, 100, 200), strict=True):
    for size in rng.choice(LENGTHS[kind], 20):
      documents.append(rng.integers(first, first + 99, size).tolist())
  # Of a length that no bucket takes.
  documents += [[310] * 2, [311] * 30]
  rng.shuffle(documents)
  return write_prepared(documents, documents[:3], documents_per_shard=7)


def open_corpus(directory, weights=(1.0, 1.0, 1.0), bounds=BOUNDS, names=None):
  buckets = corpus.LengthBuckets(bounds, weights) if bounds else None
  names = names or [str(directory)]
  shares = (1.0,) * len(names)
  return corpus.open_corpus(names, shares, FORM, builtin_directory="/nowhere", buckets=buckets)


def kinds(batch):
  """Of every row: 0, 1 or 2 for the kind that all of its tokens are of."""
  of_row = []
  for inputs, segments in zip(batch.inputs, batch.segments, strict=True):
    (kind,) = set(inputs[segments > 0] // 100)
    of_row.append(kind)
  return of_row


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (4.0, 1.0, 1.0), (1, 2, 3)])
def test_buckets_give_the_shares_asked_for(directory, weights):
  """Rows are of one bucket each; documents outside of all are not read."""
  batch = open_corpus(directory, weights).batch_at(0, 240)
  counts = np.bincount(kinds(batch), minlength=3)
  np.testing.assert_allclose(counts / 240, np.divide(weights, sum(weights)), atol=0.01)
  assert not np.isin(batch.inputs, (310, 311)).any()


def test_a_batch_is_a_function_of_its_number(directory):
  opened = open_corpus(directory)
  with opened.batches(first_row=40, batch_size=4, num_hosts=2, host=1) as batches:
    read_on = [next(batches) for _ in range(6)]
  for number, batch in enumerate(read_on):
    alone = open_corpus(directory).batch_at(40 + 4 * number, 4)
    np.testing.assert_array_equal(batch.inputs, alone.inputs[2:])


def test_every_document_of_a_bucket_is_read_once_an_epoch(directory):
  records = shards.Records(directory, shards.load(directory), "train")
  tokens_M = rows.document_lengths(records)
  assert len(tokens_M) == 62
  packed = rows.PackedRows(
    records, sequence_length=8, seed=1, ignore_first_tokens=True, lengths=(6, 12)
  )
  assert packed.num_tokens == tokens_M[(tokens_M >= 6) & (tokens_M < 12)].sum()
  got = [packed[0].inputs[:1], *(packed[i].targets for i in range(len(packed)))]
  got = np.sort(np.concatenate(got))
  expected = [t for i in range(len(records)) for t in records[i] if 100 <= t < 200]
  np.testing.assert_array_equal(got[got > 0], np.sort(expected))


def test_without_buckets_nothing_changes(directory):
  """Neither the fingerprint, which checkpoints remember, nor the order."""
  opened = open_corpus(directory, bounds=())
  (source,) = opened.sources
  assert source.buckets == (source.train,)
  unbucketed = corpus.Corpus(opened.sources, (1.0,), FORM)
  assert opened.fingerprint == unbucketed.fingerprint
  fingerprints = {
    opened.fingerprint,
    open_corpus(directory).fingerprint,
    open_corpus(directory, (1.0, 1.0, 2.0)).fingerprint,
    open_corpus(directory, (1.0, 1.0), (3, 6, 12)).fingerprint,
  }
  assert len(fingerprints) == 4


def test_synthetic_rows_keep_their_share(directory):
  """They have no documents to sort; sources share the rows as they do without buckets."""
  opened = open_corpus(directory, names=[str(directory), "recall"])
  assert [len(source.buckets) for source in opened.sources] == [3, 1]
  batch = opened.batch_at(0, 200)
  # Recall's ids are of all kinds.
  is_text = [
    len(set(inputs[segments > 0] // 100)) == 1
    for inputs, segments in zip(batch.inputs, batch.segments, strict=True)
  ]
  assert abs(np.mean(is_text) - 0.5) < 0.05


def test_a_bucket_without_documents_is_refused(directory):
  with pytest.raises(
    errors.DataError, match=r"no document of 31 to 39 tokens .*have 2 to 30, so leave"
  ):
    open_corpus(directory, (1.0, 1.0), (3, 31, 40))


def test_a_row_of_the_most_documents_is_counted_among_the_buckets(directory):
  opened = open_corpus(directory, (1.0,), (3, 6))
  (source,) = opened.sources
  assert opened.max_documents == max(
    source.buckets[0].max_documents, source.validation.max_documents
  )
  for row in range(len(source.buckets[0])):
    assert source.buckets[0][row].segments.max() <= opened.max_documents


@pytest.mark.parametrize(("weights", "expected"), [((), (1.0, 1.0)), ((1, 3), (1, 3))])
def test_the_config_says_which(directory, weights, expected):
  config = smoke.get_config()
  config.data.update(
    sources=(str(directory),), length_buckets=(3, 6, 12), length_weights=weights
  )
  opened = build.make_corpus(config, "/nowhere")
  alone = corpus.open_corpus(
    [str(directory)],
    (),
    corpus.RowFormat(
      sequence_length=256,
      vocab_size=320,
      seed=config.seed,
      ignore_first_tokens=True,
      recall_pairs=8,
      recall_queries=4,
    ),
    builtin_directory="/nowhere",
    buckets=corpus.LengthBuckets((3, 6, 12), expected),
  )
  assert opened.fingerprint == alone.fingerprint
