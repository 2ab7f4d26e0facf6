"""Schedules point by point, and what the optimizer chain does to gradients and weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import optimizer, parameters
from tests import small


def make_options(**changes):
  keys = dict(
    schedule="cosine",
    peak_lr=1.0,
    end_lr=0.1,
    warmup_steps=10,
    decay_steps=20,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    clip=1.0,
  )
  return optimizer.Options(**keys | changes)


@pytest.mark.parametrize(
  ("name", "points"),
  [
    ("cosine", {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.55, 100: 0.1}),
    ("linear", {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.55, 100: 0.1}),
    ("wsd", {0: 0.0, 10: 1.0, 50: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
    ("constant", {0: 0.0, 5: 0.5, 10: 1.0, 100: 1.0}),
  ],
)
def test_schedules(name, points):
  schedule = optimizer.make_schedule(make_options(schedule=name), 100)
  for step, expected in points.items():
    np.testing.assert_allclose(schedule(step), expected, rtol=1e-5, atol=1e-7)


def test_cosine_is_a_cosine():
  schedule = optimizer.make_schedule(make_options(warmup_steps=0, end_lr=0.0), 100)
  for step in (0, 25, 50, 75, 100):
    expected = 0.5 * (1 + np.cos(np.pi * step / 100))
    np.testing.assert_allclose(schedule(step), expected, atol=1e-6)


def test_norms_do_not_decay_and_matrices_do():
  params = small.make_params(small.make_model())
  mask = optimizer.decayed(params)
  undecayed = [
    path for path, is_decayed in jax.tree_util.tree_leaves_with_path(mask) if not is_decayed
  ]
  # Stacked over layers a norm's scale has two axes, so a rule by rank would let it decay.
  assert len(undecayed) == 3
  assert all(path[-1].key == "scale" for path in undecayed)


def test_the_mask_is_the_same_for_boxed_parameters():
  transformer = small.make_model()
  boxed = jax.eval_shape(lambda: parameters.init(transformer, jax.random.key(0)))
  plain = jax.tree.leaves(optimizer.decayed(small.make_params(transformer)))
  assert jax.tree.leaves(optimizer.decayed(boxed)) == plain


def test_one_update_is_clipped_adamw():
  options = make_options(schedule="constant", warmup_steps=0)
  chain = optimizer.make_optimizer(options, optimizer.make_schedule(options, 10))
  params = {"kernel": jnp.array([1.0, -2.0]), "scale": jnp.array([3.0])}
  grads = {"kernel": jnp.array([30.0, 0.0]), "scale": jnp.array([40.0])}
  updates, _ = chain.update(grads, chain.init(params), params)
  new = optax.apply_updates(params, updates)
  # Of norm 50, clipped to 1. Adam's first step is the sign, whatever the size.
  np.testing.assert_allclose(new["kernel"], [1.0 - (1.0 + 0.1), -2.0 + 0.2], rtol=1e-4)
  np.testing.assert_allclose(new["scale"], [3.0 - 1.0], rtol=1e-4)


def test_clipping_is_by_the_global_norm():
  """Adam hides the size of a first step; its second moment does not."""
  options = make_options(schedule="constant", warmup_steps=0)
  chain = optimizer.make_optimizer(options, optimizer.make_schedule(options, 10))
  params = {"kernel": jnp.zeros(2)}
  _, state = chain.update({"kernel": jnp.array([30.0, 40.0])}, chain.init(params), params)
  (nu,) = [x for x in jax.tree.leaves(state) if x.shape == (2,) and (x < 0.05).all()]
  np.testing.assert_allclose(nu, 0.05 * np.array([0.6, 0.8]) ** 2, rtol=1e-4)


def test_options_are_those_of_the_base_config():
  names = {field.name for field in dataclasses.fields(optimizer.Options)}
  assert names == set(small.make_config().optimizer)
