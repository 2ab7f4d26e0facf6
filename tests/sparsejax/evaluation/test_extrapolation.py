"""Scalings of RoPE in place of a checkpoint's, and how far each reaches."""

import pytest

from sparsejax import errors
from sparsejax.evaluation import extrapolation
from tests import small

TRAINED = 64


def make_config(**scaling):
  config = small.make_config()
  config.model.rope_scaling.update(scaling)
  return config


def test_words_are_a_scaling():
  assert extrapolation.parse([]) is None
  assert extrapolation.parse(["default"]).given == dict(rope_type="default")
  words = ["llama3", "factor=8", "low_freq_factor=0.5", "original_max_position_embeddings=32"]
  assert extrapolation.parse(words).given == dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=0.5,
    original_max_position_embeddings=32,
  )


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["lama3"], r"unknown --rope_scaling 'lama3'\. Did you mean 'llama3'\?"),
    (["factor=4"], r"unknown --rope_scaling 'factor=4'.*There are: default, llama3"),
    (
      ["llama3", "factor=4", "factor=8"],
      "--rope_scaling=llama3,factor=4,factor=8 has factor twice",
    ),
    (["llama3", "facter=4"], r"unknown value of --rope_scaling 'facter'.*mean 'factor'"),
    (["llama3", "factor"], r"factor takes a number"),
    (["llama3", "factor=four"], r"factor=four takes a number"),
    (["llama3", "original_max_position_embeddings=1.5"], r"=1\.5 takes a whole number"),
    (["default", "factor=4"], r"=default stretches nothing and has no factor; take llama3"),
  ],
)
def test_words_that_are_none_are_refused(words, message):
  with pytest.raises(errors.ConfigError, match=message):
    extrapolation.parse(words)


def test_what_was_trained_without_scaling_is_stretched_from_its_rows():
  config = make_config()
  extrapolation.apply(config, extrapolation.parse(["llama3", "factor=2"]), TRAINED)
  scaling = config.model.rope_scaling
  assert (scaling.rope_type, scaling.factor) == ("llama3", 2.0)
  assert scaling.original_max_position_embeddings == TRAINED
  assert extrapolation.reach(config, TRAINED) == 128


def test_what_was_trained_with_scaling_keeps_what_is_not_named():
  config = make_config(rope_type="llama3", factor=4.0, original_max_position_embeddings=32)
  extrapolation.apply(config, extrapolation.parse(["llama3", "factor=16"]), TRAINED)
  assert config.model.rope_scaling.original_max_position_embeddings == 32
  assert extrapolation.reach(config, TRAINED) == 512
  extrapolation.apply(config, extrapolation.parse(["default"]), TRAINED)
  assert extrapolation.reach(config, TRAINED) == TRAINED


@pytest.mark.parametrize(
  ("word", "message"),
  [
    ("factor=0", r"factor=0\.0 must be a finite number from 1 up"),
    ("factor=0.5", r"factor=0\.5 must be a finite number from 1 up"),
    ("factor=inf", r"factor=inf must be a finite number from 1 up"),
    ("factor=nan", r"factor=nan must be a finite number from 1 up"),
    ("original_max_position_embeddings=0", r"embeddings=0 must be at least 1\."),
    ("low_freq_factor=0", r"low_freq_factor=0\.0 must be above 0 and below"),
    ("low_freq_factor=4", r"low_freq_factor=4\.0 must be .* below high_freq_factor=4\.0"),
    ("high_freq_factor=inf", r"high_freq_factor=inf, a finite number"),
  ],
)
def test_numbers_that_make_no_sense_are_refused(word, message):
  with pytest.raises(errors.ConfigError, match=rf"^--rope_scaling: .*{message}"):
    extrapolation.apply(make_config(), extrapolation.parse(["llama3", word]), TRAINED)


@pytest.mark.parametrize(
  ("own", "override", "lengths", "message"),
  [
    ({}, [], [64], None),
    ({}, [], [], None),
    ({}, [], [32, 65], r"65 tokens is beyond the 64 .*llama3,factor=2 to stretch"),
    ({}, ["default"], [4096], None),
    ({}, ["llama3", "factor=2"], [128], None),
    ({}, ["llama3", "factor=2"], [256], r"256 tokens is beyond the 128 .*factor=4 to stretch"),
    (dict(rope_type="llama3", original_max_position_embeddings=64), [], [256], None),
    # Rows of training are within reach, whatever the config says.
    (dict(rope_type="llama3", original_max_position_embeddings=8), [], [64], None),
    (dict(rope_type="llama3", original_max_position_embeddings=8), [], [65], r"beyond the 64"),
  ],
)
def test_lengths_beyond_reach_are_refused(own, override, lengths, message):
  config, scaling = make_config(**own), extrapolation.parse(override)
  if scaling is not None:
    extrapolation.apply(config, scaling, TRAINED)
  if message is None:
    extrapolation.check(config, TRAINED, lengths, scaling)
  else:
    with pytest.raises(errors.ConfigError, match=message):
      extrapolation.check(config, TRAINED, lengths, scaling)
