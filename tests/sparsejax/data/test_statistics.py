"""The loss of a model without context, against counts by hand."""

import math

import numpy as np
import pytest

from sparsejax.data import corpus, statistics


def open_source(directory, *, ignore_first_tokens=False):
  form = corpus.RowFormat(
    sequence_length=8,
    vocab_size=320,
    seed=0,
    ignore_first_tokens=ignore_first_tokens,
    recall_pairs=1,
    recall_queries=1,
  )
  return corpus.open_corpus([str(directory)], (), form, builtin_directory="/nowhere").sources[0]


def test_it_is_the_cross_entropy_of_the_training_frequencies(write_prepared):
  train = np.random.default_rng(0).choice([5, 6, 7], p=[0.6, 0.3, 0.1], size=801).tolist()
  held_out = [5] * 3 + [6] * 5 + [7] * 2
  source = open_source(write_prepared([train], [held_out]))
  # Every token but the first of a split is a target; each id counts once more in training.
  known = {i: 1 + train[1:].count(i) for i in (5, 6, 7)}
  total = sum(known.values()) + 320 - 3
  expected = -sum(math.log(known[i] / total) for i in held_out[1:]) / 9
  assert statistics.unigram_loss(source, 320) == pytest.approx(expected, rel=1e-12)


def test_targets_that_do_not_count_in_the_loss_do_not_count_here(write_prepared):
  directory = write_prepared([[5, 6], [9, 6], [9, 6]])
  source = open_source(directory, ignore_first_tokens=True)
  # The targets are 6, 6, 6: the nines open documents.
  expected = -math.log(4 / (4 + 319))
  assert statistics.unigram_loss(source, 320) == pytest.approx(expected, rel=1e-12)


def test_ids_never_seen_in_training_cost_what_one_sight_costs(write_prepared):
  source = open_source(write_prepared([[5, 5, 5]], [[7, 7]]))
  assert statistics.unigram_loss(source, 320) == pytest.approx(-math.log(1 / 322), rel=1e-12)


def test_a_sample_of_rows_comes_from_all_over_the_split(write_prepared):
  # First half fives, second half sixes: the first rows alone would say otherwise.
  source = open_source(write_prepared([[5] * 800 + [6] * 801], [[5] * 11 + [6] * 10]))
  # A vocabulary as small as can be, so that the ids never seen weigh little.
  whole = statistics.unigram_loss(source, 7)
  assert whole == pytest.approx(math.log(2), rel=0.02)
  assert statistics.unigram_loss(source, 7, max_rows=20) == pytest.approx(whole, rel=0.1)
