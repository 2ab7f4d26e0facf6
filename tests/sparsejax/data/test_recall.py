"""Every question of an example has one answer, and it stands in the same row."""

import numpy as np
import pytest

from sparsejax import errors
from sparsejax.data import recall


def make(**changes):
  options = dict(sequence_length=64, vocab_size=256, num_pairs=6, num_queries=3, seed=1)
  return recall.RecallRows(**options | changes)


@pytest.mark.parametrize("sequence_length", [17, 18, 63, 64])
@pytest.mark.parametrize("row", [0, 1, 12345, recall.NUM_ROWS - 1])
def test_what_counts_is_the_value_after_the_keys_only_other_place(sequence_length, row):
  example = make(sequence_length=sequence_length)[row]
  counted = np.flatnonzero(example.weights)
  assert len(counted) == 3
  for place in counted:
    key = example.inputs[place]
    assert 64 <= key < 128
    (first,) = np.flatnonzero(example.inputs[:place] == key)
    assert example.inputs[first + 1] == example.targets[place]
    assert 128 <= example.targets[place] < 256


def test_questions_stand_at_the_end():
  assert np.flatnonzero(make()[0].weights).tolist() == [59, 61, 63]


def test_keys_are_distinct_and_noise_is_neither_key_nor_value():
  example = make()[7]
  hay = np.append(example.inputs[:59], 0)
  (keys,) = np.nonzero((hay >= 64) & (hay < 128))
  assert len(set(hay[keys].tolist())) == len(keys) == 6
  rest = np.delete(hay, np.concatenate([keys, keys + 1]))
  assert (rest < 64).all()


def test_a_row_is_one_document_whose_targets_are_its_next_inputs():
  example = make()[0]
  np.testing.assert_array_equal(example.inputs[1:], example.targets[:-1])
  assert set(example.segments.tolist()) == {1}
  assert example.positions.tolist() == list(range(64))


def test_a_row_depends_on_the_seed_and_its_number_alone():
  assert make()[5].inputs.tolist() == make()[5].inputs.tolist()
  assert make()[5].inputs.tolist() != make()[6].inputs.tolist()
  assert make()[5].inputs.tolist() != make(seed=2)[5].inputs.tolist()


def test_pairs_are_spread_over_the_whole_row():
  rows = make(sequence_length=256)
  places = np.concatenate([np.flatnonzero(rows[r].inputs[:250] >= 128) for r in range(200)])
  share, _ = np.histogram(places, bins=5, range=(0, 250))
  np.testing.assert_allclose(share / share.sum(), 0.2, atol=0.03)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(num_pairs=65, sequence_length=512), r"recall_pairs=65 .* 256 has 64"),
    (dict(num_queries=7), r"recall_queries=7 must be from 1 to data\.recall_pairs=6"),
    (dict(num_queries=0), r"recall_queries=0 must be from 1"),
    (dict(sequence_length=16), r"sequence_length=16 is too short .* at least 17"),
  ],
  ids=["pairs", "queries", "none", "short"],
)
def test_what_does_not_fit_is_refused(changes, message):
  with pytest.raises(errors.DataError, match=message):
    make(**changes)


@pytest.mark.parametrize("row", [-1, recall.NUM_ROWS])
def test_there_are_no_other_rows(row):
  with pytest.raises(IndexError):
    make()[row]
