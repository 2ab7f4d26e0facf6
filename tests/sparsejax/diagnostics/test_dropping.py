"""Theorem 1 of SSA: worked by hand, against the operations that models run, and as a bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from sparsejax.diagnostics import attention_mass, dropping


def measure(scores_S, v_SD, blocks_M, block_size):
  """Of one query and one head."""
  return dropping.measure(
    jnp.array(scores_S, jnp.float32)[None, None, None],
    jnp.array(v_SD, jnp.float32)[None, :, None],
    jnp.array(blocks_M, jnp.int32)[None, None, None],
    block_size,
  )


def test_both_sides_by_hand():
  """Masses of 1/8, 1/8, 1/4 and 1/2; the middle block of one key is dropped."""
  scores = np.log([1, 1, 2, 4])
  values = [[0, 0], [3, 4], [6, 8], [0, 1]]
  found = measure(scores, values, [0, 1, 3], 1)
  full, sparse = np.array([15, 20 + 4]) / 8, np.array([3, 4 + 4]) / 6
  np.testing.assert_allclose(found.mass.item(), 1 / 4, rtol=1e-6)
  np.testing.assert_allclose(found.error.item(), np.linalg.norm(full - sparse), rtol=1e-6)
  np.testing.assert_allclose(found.bound.item(), (10 + np.linalg.norm(sparse)) / 4, rtol=1e-6)


def test_the_bound_is_met_where_values_are_opposite():
  """Half of the mass on a dropped value, half on its opposite: no bound can be less."""
  found = measure([0.0, 0.0], [[2.0, 0.0], [-2.0, 0.0]], [1, -1], 1)
  assert (found.error.item(), found.bound.item()) == (2.0, 2.0)


def test_where_all_is_listed_nothing_is_lost():
  found = measure([0.3, -1.0, 2.0], [[1, 2], [3, 4], [5, 6]], [1, 0], 2)
  assert [x.item() for x in found] == [0.0, 0.0, 0.0]


def test_keys_that_a_query_does_not_see_are_not_dropped():
  """The largest value is after the query."""
  found = measure([0.0, 0.0, -np.inf], [[3.0, 0.0], [0.0, 0.0], [99.0, 0.0]], [1], 1)
  assert [x.item() for x in found] == [0.5, 1.5, 1.5]


def test_mass_that_underflows_is_still_all_that_sparse_attention_has():
  found = measure([500.0, 0.0], [[1.0, 0.0], [0.0, 2.0]], [1], 1)
  np.testing.assert_allclose([x.item() for x in found], [1.0, 5**0.5, 3.0], rtol=1e-6)


def test_a_query_that_lists_nothing_reads_nothing():
  found = measure([0.0, 0.0], [[3.0, 0.0], [5.0, 0.0]], [-1], 1)
  assert [x.item() for x in found] == [1.0, 4.0, 5.0]


@pytest.fixture(scope="module")
def problem():
  rng = np.random.default_rng(0)
  b, t, h, k, d, size = 2, 48, 4, 2, 8, 8
  q, key, v = (
    jnp.asarray(rng.normal(size=(b, t, heads, d)), jnp.float32) * scale
    for heads, scale in ((h, 3.0), (k, 1.0), (k, 1.0))
  )
  bias = jnp.asarray(rng.normal(size=(b, t, k)), jnp.float32)
  blocks = pallas_kernels.select_blocks(
    q, key, block_size=size, num_blocks=3, implementation="reference"
  )
  scores = attention_mass.scores(q, key, jnp.arange(t), key_bias_BSK=bias)
  return q, key, v, bias, blocks, scores, dropping.measure(scores, v, blocks, size)


def test_the_error_is_that_of_the_two_streams(problem):
  q, key, v, bias, blocks, _, found = problem
  full = pallas_kernels.full_attention(
    q, key, v, key_bias_BTK=bias, max_documents=1, implementation="xla"
  )
  sparse, _ = pallas_kernels.block_sparse_attention(
    q, key, v, blocks, block_size=8, key_bias_BSK=bias, implementation="reference"
  )
  np.testing.assert_allclose(found.error, jnp.linalg.norm(full - sparse, axis=-1), atol=1e-5)


def test_the_bound_holds_and_is_not_far(problem):
  _, _, v, _, blocks, scores, found = problem
  assert (found.error <= found.bound * (1 + 1e-6)).all()
  assert (found.error / found.bound)[:, 24:].max() > 0.8
  kept = attention_mass.attention_sparsity(jax.nn.softmax(scores), blocks, 8)
  np.testing.assert_allclose(found.mass, 1 - kept, atol=1e-6)
  # Without either of its terms it would be no bound, here.
  size = jnp.linalg.norm(v, axis=-1).max()
  assert (found.error > found.bound - found.mass * size).any()
