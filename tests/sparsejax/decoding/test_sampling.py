"""The next token comes from the ids that may be drawn, as often as it is likely."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import errors
from sparsejax.decoding import sampling

NUM_DRAWS = 4000
# Probabilities of ids 0 to 5, all of them different.
PROBABILITY = np.array([0.05, 0.3, 0.1, 0.2, 0.31, 0.04])

draw = jax.jit(sampling.draw, static_argnums=(2, 3))


@functools.cache
def many_keys():
  return jax.random.split(jax.random.key(7), NUM_DRAWS)


def draw_many(logits_V, num_ids=None, **settings):
  """The same logits with many keys."""
  logits_BV = jnp.broadcast_to(jnp.asarray(logits_V, jnp.float32), (NUM_DRAWS, len(logits_V)))
  return np.asarray(draw(logits_BV, many_keys(), sampling.Sampling(**settings), num_ids))


def expected(probability_V, temperature=1.0, top_k=0, top_p=1.0):
  """By hand, one id after the other, from the most likely."""
  p = probability_V ** (1 / temperature)
  order = sorted(range(len(p)), key=lambda i: (-p[i], i))[: top_k or len(p)]
  p = {i: p[i] / p[order].sum() for i in order}
  kept = []
  while sum(p[i] for i in kept) < top_p and len(kept) < len(order):
    kept.append(order[len(kept)])
  result = np.zeros(len(probability_V))
  result[kept] = [p[i] for i in kept]
  return result / result.sum()


def check_frequencies(ids, probability_V):
  """Pearson's chi-square; its mean is the degrees of freedom, its variance twice them."""
  counts = np.bincount(ids, minlength=len(probability_V))
  possible = probability_V > 0
  assert counts[~possible].sum() == 0
  assert counts[possible].min() > 0
  expectation = len(ids) * probability_V[possible]
  chi_square = ((counts[possible] - expectation) ** 2 / expectation).sum()
  freedom = possible.sum() - 1
  assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(
  ("settings", "kept"),
  [
    (dict(), {0, 1, 2, 3, 4, 5}),
    (dict(temperature=2.0), {0, 1, 2, 3, 4, 5}),
    (dict(top_k=3), {1, 3, 4}),
    (dict(top_k=6), {0, 1, 2, 3, 4, 5}),
    # 0.31 + 0.3 is short of it.
    (dict(top_p=0.62), {1, 3, 4}),
    (dict(top_p=0.6), {1, 4}),
    # Of three ids alone, two have three quarters.
    (dict(top_k=3, top_p=0.75), {1, 4}),
    # Colder, the first two have two thirds of everything.
    (dict(temperature=0.5, top_p=0.75), {1, 4}),
    (dict(temperature=2.0, top_p=0.6), {1, 3, 4}),
  ],
)
def test_ids_are_drawn_as_often_as_they_are_likely(settings, kept):
  by_hand = expected(PROBABILITY, **settings)
  assert set(np.flatnonzero(by_hand)) == kept
  # A constant added to all logits is no probability.
  check_frequencies(draw_many(np.log(PROBABILITY) + 50.0, **settings), by_hand)


@pytest.mark.parametrize(
  "settings", [dict(temperature=0.0, top_k=3, top_p=0.5), dict(top_k=1), dict(top_p=1e-9)]
)
def test_one_id_always_remains_and_is_the_most_likely(settings):
  """Of several, the lowest."""
  assert set(draw_many([0.0, 2.0, -1.0, 2.0, 2.0], **settings)) == {1}


@pytest.mark.parametrize("temperature", [0.0, sampling.COLDEST, 1e-3])
@pytest.mark.parametrize("scale", [1.0, 1e35])
def test_the_cold_draw_the_most_likely_id(temperature, scale):
  logits_V = scale * np.array([-3.0, 1.0, 1.5, -np.inf])
  assert set(draw_many(logits_V, temperature=temperature)) == {2}


@pytest.mark.parametrize("settings", [dict(top_k=3), dict(top_p=0.5)])
def test_ties_at_the_edge_go_to_the_lower_id(settings):
  """Five of the six are equally likely; three of them are needed for half."""
  logits_V = [0.0, 0.0, -9.0, 0.0, 0.0, 0.0]
  assert set(draw_many(logits_V, **settings)) == {0, 1, 3}


@pytest.mark.parametrize("settings", [dict(), dict(top_k=3), dict(top_p=0.9)])
def test_a_row_depends_on_its_own_key_and_logits(settings):
  settings = sampling.Sampling(**settings)
  logits_BV = 2 * jax.random.normal(jax.random.key(1), (64, 20))
  keys_B = many_keys()[:64]
  together = draw(logits_BV, keys_B, settings)
  order = np.random.default_rng(0).permutation(64)
  np.testing.assert_array_equal(
    draw(logits_BV[order], keys_B[order], settings), together[order]
  )
  alone = draw(logits_BV[5:6], keys_B[5:6], settings)
  np.testing.assert_array_equal(alone, together[5:6])
  # Rows of the same key and logits agree; other keys draw other ids.
  first_B = np.zeros(64, np.int32)
  assert len(set(np.asarray(draw(logits_BV[first_B], keys_B[first_B], settings)))) == 1
  assert len(set(np.asarray(draw(logits_BV[first_B], keys_B, settings)))) > 1


def test_excluding_ids_changes_only_draws_of_them():
  everything = draw_many(np.log(PROBABILITY))
  for settings in (dict(top_k=3), dict(top_p=0.62)):
    drawn = draw_many(np.log(PROBABILITY), **settings)
    stays = np.isin(everything, [1, 3, 4])
    np.testing.assert_array_equal(drawn[stays], everything[stays])
    assert not np.array_equal(drawn, everything)


@pytest.mark.parametrize(
  "settings", [dict(), dict(temperature=0.0), dict(top_k=5), dict(top_p=0.99)]
)
def test_padding_is_never_drawn(settings):
  """Nor does it weigh on the others, though it is the likeliest by far."""
  logits_V = [*np.log(PROBABILITY), 9.0, np.nan]
  drawn = draw_many(logits_V, num_ids=6, **settings)
  np.testing.assert_array_equal(drawn, draw_many(logits_V[:6], **settings))
  assert set(draw_many(logits_V[:7], **settings)) >= {6}


def test_probabilities_are_summed_in_float32():
  """All but the last of 300 are needed for so much, which bfloat16 would not know."""
  logits_BV = jnp.full((NUM_DRAWS, 300), 7.0, jnp.bfloat16)
  drawn = draw(logits_BV, many_keys(), sampling.Sampling(top_p=298.5 / 300))
  assert drawn.dtype == jnp.int32
  check_frequencies(drawn, np.append(np.full(299, 1 / 299), 0.0))


@pytest.mark.parametrize(
  ("setting", "value", "message"),
  [
    ("temperature", -0.5, r"temperature=-0.5 is neither 0 nor a number from 1e-06 up; take 0"),
    ("temperature", 1e-7, r"temperature=1e-07 is neither"),
    ("temperature", float("nan"), r"temperature=nan is neither"),
    ("temperature", float("inf"), r"temperature=inf is neither"),
    ("top_k", -1, r"top_k=-1 is not a whole number from 0 up; take 0"),
    ("top_k", 2.5, r"top_k=2.5 is not a whole number"),
    ("top_k", True, r"top_k=True is not a whole number"),
    ("top_p", 0.0, r"top_p=0.0 is not above 0 and at most 1; take 1 .* temperature=0"),
    ("top_p", 1.01, r"top_p=1.01 is not above 0"),
    ("top_p", float("nan"), r"top_p=nan is not above 0"),
  ],
)
def test_settings_out_of_range_are_refused(setting, value, message):
  with pytest.raises(errors.ConfigError, match=message):
    sampling.Sampling(**{setting: value})


def test_arguments_that_do_not_fit_are_refused():
  logits_BV, keys_B = jnp.zeros((2, 8)), many_keys()[:2]
  with pytest.raises(
    ValueError, match=r"2 rows of logits need as many keys, got keys of \(3,\)"
  ):
    sampling.draw(logits_BV, many_keys()[:3], sampling.Sampling())
  for num_ids in (0, 9):
    with pytest.raises(ValueError, match=f"num_ids={num_ids} must be from 1 to the 8 ids"):
      sampling.draw(logits_BV, keys_B, sampling.Sampling(), num_ids)
