"""Batch n of the global order depends on the sources, the seed and n, on nothing else."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest

from sparsejax import errors
from sparsejax.data import corpus, tokenizers
from tests.sparsejax.data.form import FORM


@pytest.fixture(scope="module")
def prepared(write_prepared):
  """Two directories that no token has in common, of 30 and 10 rows, as strings."""
  rng = np.random.default_rng(0)

  def documents(low, high, total):
    tokens = rng.integers(low, high, total).tolist()
    return [tokens[at : at + 7] for at in range(0, total, 7)]

  first = write_prepared(documents(1, 100, 241), documents(1, 100, 20), documents_per_shard=6)
  second = write_prepared(documents(100, 200, 81), documents(100, 200, 20))
  return str(first), str(second)


def open_corpus(names, weights=(), **changes):
  form = dataclasses.replace(FORM, **changes)
  return corpus.open_corpus(names, weights, form, builtin_directory="/nowhere")


def take(opened, count, **options):
  options = dict(first_row=0, batch_size=4) | options
  with opened.batches(**options) as batches:
    return list(itertools.islice(batches, count))


def assert_same(got, expected):
  assert len(got) == len(expected)
  for mine, theirs in zip(got, expected, strict=True):
    for name in mine._fields:
      np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name), err_msg=name)


@pytest.fixture(scope="module")
def in_order(prepared):
  """The first 30 global batches of 4 rows, each read on its own."""
  opened = open_corpus(prepared)
  return [opened.batch_at(4 * number, 4) for number in range(30)]


def test_reading_on_gives_the_batches_that_reading_alone_gives(prepared, in_order):
  assert_same(take(open_corpus(prepared), 30), in_order)


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_hosts_read_equal_parts_of_the_same_batches(prepared, in_order, num_hosts):
  parts = [
    take(open_corpus(prepared), 30, host=host, num_hosts=num_hosts) for host in range(num_hosts)
  ]
  joined = [
    type(in_order[0])(*map(np.concatenate, zip(*batches, strict=True)))
    for batches in zip(*parts, strict=True)
  ]
  assert_same(joined, in_order)


@pytest.mark.parametrize("num_threads", [1, 16])
def test_threads_do_not_change_the_order(prepared, in_order, num_threads):
  assert_same(take(open_corpus(prepared), 30, num_threads=num_threads), in_order)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_worker_processes_do_not_change_the_order(prepared, in_order, num_workers):
  assert_same(take(open_corpus(prepared), 30, num_workers=num_workers), in_order)


def test_batches_of_workers_own_their_memory(prepared):
  # Workers send large arrays through shared memory, which is gone when the reading ends.
  batches = take(open_corpus(prepared), 2, batch_size=512, num_workers=1)
  assert all(field.flags.owndata for batch in batches for field in batch)


@pytest.mark.parametrize("first_row", [4, 52])
def test_one_number_is_enough_to_resume(prepared, in_order, first_row):
  resumed = take(open_corpus(prepared), 10, first_row=first_row)
  assert_same(resumed, in_order[first_row // 4 :][:10])


def test_a_resumed_run_may_change_its_batch_size(prepared, in_order):
  rows = np.concatenate([batch.inputs for batch in in_order])
  (resumed,) = take(open_corpus(prepared), 1, first_row=20, batch_size=6)
  np.testing.assert_array_equal(resumed.inputs, rows[20:26])


def rows_of(opened, start, stop):
  return [opened.batch_at(row, 1).inputs[0].tobytes() for row in range(start, stop)]


def test_an_epoch_visits_every_row_once_and_the_next_in_another_order(prepared):
  opened = open_corpus(prepared[:1])
  size = len(opened.sources[0].train)
  assert size == 30
  first, second = rows_of(opened, 0, size), rows_of(opened, size, 2 * size)
  on_disk = {opened.sources[0].train[row].inputs.tobytes() for row in range(size)}
  assert set(first) == set(second) == on_disk
  assert len(on_disk) == size
  assert first != second


def test_rows_are_shuffled(prepared):
  opened = open_corpus(prepared[:1])
  as_packed = [opened.sources[0].train[row].inputs.tobytes() for row in range(30)]
  assert rows_of(opened, 0, 30) != as_packed


def test_the_seed_decides_the_order(prepared):
  orders = [rows_of(open_corpus(prepared, seed=seed), 0, 40) for seed in (1, 1, 2)]
  assert orders[0] == orders[1] != orders[2]


def test_rows_of_one_long_document_are_shuffled_by_the_seed_too(write_prepared):
  directory = str(write_prepared([list(range(1, 250))]))
  orders = [rows_of(open_corpus([directory], seed=seed), 0, 31) for seed in (1, 1, 2)]
  assert orders[0] == orders[1] != orders[2]


def test_equal_sources_do_not_move_in_step(write_prepared):
  tokens = np.arange(249) % 90
  pair = [str(write_prepared([(tokens + start).tolist()])) for start in (1, 101)]
  rows = open_corpus(pair).batch_at(0, 62).inputs
  is_second = rows.max(axis=1) >= 101
  assert is_second.sum() == 31
  assert (rows[is_second] - 100).tolist() != rows[~is_second].tolist()


def shares(opened, num_rows):
  """How many of the first rows come from the second of the prepared directories."""
  picked = opened.batch_at(0, num_rows).inputs
  return collections.Counter((picked.max(axis=1) >= 100).tolist())[True] / num_rows


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_sources_are_mixed_by_their_weights(prepared, share):
  assert shares(open_corpus(prepared, (1 - share, share)), 400) == pytest.approx(
    share, abs=0.01
  )


def test_without_weights_sources_are_mixed_by_their_size(prepared):
  assert shares(open_corpus(prepared), 400) == pytest.approx(10 / 40, abs=0.01)


def test_every_host_sees_the_mixture(prepared):
  opened = open_corpus(prepared, (0.5, 0.5))
  for host in range(2):
    batches = take(opened, 20, batch_size=8, host=host, num_hosts=2)
    of_second = np.mean([batch.inputs.max(axis=1) >= 100 for batch in batches])
    assert 0.3 < of_second < 0.7


def test_validation_is_apart_and_in_the_order_of_the_disk(prepared):
  source = open_corpus(prepared[:1]).sources[0]
  held_out = [source.validation[row].inputs.tobytes() for row in range(len(source.validation))]
  trained = {source.train[row].inputs.tobytes() for row in range(len(source.train))}
  assert not trained & set(held_out)
  other_seed = open_corpus(prepared[:1], seed=99).sources[0].validation
  assert [other_seed[row].inputs.tobytes() for row in range(len(other_seed))] == held_out


@pytest.mark.parametrize(
  "change",
  [dict(seed=4), dict(sequence_length=16), dict(ignore_first_tokens=False)],
  ids=lambda change: next(iter(change)),
)
def test_the_fingerprint_changes_with_what_rows_look_like(prepared, change):
  assert open_corpus(prepared, **change).fingerprint != open_corpus(prepared).fingerprint


def test_the_fingerprint_tells_sources_and_mixtures_apart(prepared):
  made = [
    open_corpus(prepared),
    open_corpus(prepared[:1]),
    open_corpus(prepared[::-1]),
    open_corpus(prepared, (0.5, 0.5)),
    open_corpus((*prepared, "recall"), (1, 1, 1)),
  ]
  assert len({opened.fingerprint for opened in made}) == len(made)


def test_the_fingerprint_is_the_same_wherever_the_tokens_lie(write_prepared):
  documents = [[1, 2, 3], [4, 5, 6, 7]]
  prints = {open_corpus([str(write_prepared(documents))]).fingerprint for _ in range(2)}
  assert len(prints) == 1
  other = open_corpus([str(write_prepared([[1, 2, 3], [4, 5, 6, 8]]))]).fingerprint
  assert other not in prints


def test_the_corpus_counts_the_documents_of_its_fullest_row(write_prepared):
  many_in_validation = write_prepared([[1] * 30], [[2, 3]] * 6)
  assert open_corpus([str(many_in_validation)]).max_documents == 4


def test_bytes_of_text_use_the_bytes_of_their_tokenizer(prepared):
  source = open_corpus(prepared[:1]).sources[0]
  np.testing.assert_array_equal(source.bytes_per_id, tokenizers.ByteTokenizer().bytes_per_id())


def test_recall_is_a_source_of_its_own(prepared):
  alone = open_corpus(["recall"])
  assert alone.sources[0].bytes_per_id is None
  assert len(alone.sources[0].validation) == 256
  assert alone.tokenizer.fingerprint == tokenizers.ByteTokenizer().fingerprint
  trained, held_out = alone.sources[0].train[0], alone.sources[0].validation[0]
  assert trained.inputs.tolist() != held_out.inputs.tolist()
  with pytest.raises(IndexError):
    alone.sources[0].validation[256]


def test_a_source_named_twice_is_refused(prepared):
  with pytest.raises(errors.DataError, match=r"names a source twice; use data\.weights"):
    open_corpus((prepared[0], prepared[0]))


def test_a_missing_source_is_refused(tmp_path):
  with pytest.raises(errors.DataError, match="absent"):
    open_corpus([str(tmp_path / "absent")])


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(prepared):
  with pytest.raises(errors.DataError, match=r"model\.vocab_size=256 is smaller than .* 258"):
    open_corpus(prepared, vocab_size=256)


def test_ids_the_model_does_not_have_are_refused_by_row(write_prepared):
  directory = write_prepared([[1, 2, 900, 3, 4]])
  with pytest.raises(errors.DataError, match=r"token id 900 in rows 0 to 0 .*vocab_size=320"):
    take(open_corpus([str(directory)]), 1, batch_size=1)


def test_sources_of_different_tokenizers_are_refused(prepared, write_prepared):
  bpe = tokenizers.train_bpe(["some text to learn from"] * 4, 300)
  other = str(write_prepared([[1, 2, 3]], tokenizer=bpe))
  with pytest.raises(errors.DataError, match=r"different tokenizers .*same --tokenizer"):
    open_corpus((prepared[0], other))


def test_a_batch_that_does_not_divide_among_hosts_is_refused(prepared):
  with pytest.raises(errors.DataError, match=r"batch_size=4 does not divide among 3 hosts"):
    take(open_corpus(prepared), 1, num_hosts=3)
