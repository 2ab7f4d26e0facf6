"""The chunked loss against the whole one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import losses

B, T, E, V = 2, 20, 8, 33


def make_problem(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 5)
  hidden = jax.random.normal(keys[0], (B, T, E)).astype(dtype)
  table = jax.random.normal(keys[1], (V, E))
  targets = jax.random.randint(keys[2], (B, T), 0, V)
  cotangents = tuple(jax.random.normal(key, (B, T)) for key in keys[3:])
  return hidden, table, targets, cotangents


def whole(hidden, table, targets):
  logits = jnp.einsum("bte,ve->btv", hidden, table)
  nll = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
  return nll, jax.nn.logsumexp(logits, axis=-1)


@pytest.mark.parametrize("chunk_length", [1, 7, 20, 100])
def test_chunks_equal_the_whole(chunk_length):
  """Values, and gradients of both losses at once, for chunks that fit and that do not."""
  hidden, table, targets, cotangents = make_problem()

  def chunked(hidden, table):
    predictions = losses.next_token(hidden, table, targets, chunk_length=chunk_length)
    return predictions.nll, predictions.log_normalizer

  actual, vjp = jax.vjp(chunked, hidden, table)
  expected, whole_vjp = jax.vjp(lambda h, t: whole(h, t, targets), hidden, table)
  pairs = zip((*actual, *vjp(cotangents)), (*expected, *whole_vjp(cotangents)), strict=True)
  for a, e in pairs:
    np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)


def test_hits_are_the_largest_logits():
  hidden, table, targets, _ = make_problem()
  hits = losses.next_token(hidden, table, targets, chunk_length=6).is_hit
  logits = np.einsum("bte,ve->btv", hidden, table)
  np.testing.assert_array_equal(hits, logits.argmax(-1) == np.asarray(targets))
  assert hits.any()


def test_bfloat16_is_no_worse_than_twice_plain():
  hidden, table, targets, cotangents = make_problem(jnp.bfloat16)

  def gradient(run, hidden, table):
    _, vjp = jax.vjp(run, hidden, table)
    return vjp(cotangents[0])[1]

  exact = gradient(lambda h, t: whole(h, t, targets)[0], hidden.astype(jnp.float32), table)
  plain = gradient(lambda h, t: whole(h, t.astype(h.dtype), targets)[0].astype(jnp.float32),
                   hidden, table)  # fmt: skip
  actual = gradient(
    lambda h, t: losses.next_token(h, t, targets, chunk_length=8).nll, hidden, table
  )
  assert jnp.abs(actual - exact).max() <= 2 * jnp.abs(plain - exact).max() + 1e-5


def test_logits_never_exist_as_a_whole():
  b, t, e, v = 4, 512, 16, 8192
  hidden = jax.ShapeDtypeStruct((b, t, e), jnp.float32)
  table = jax.ShapeDtypeStruct((v, e), jnp.float32)
  targets = jax.ShapeDtypeStruct((b, t), jnp.int32)

  def loss(hidden, table, targets):
    return losses.next_token(hidden, table, targets, chunk_length=32).nll.sum()

  compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, table, targets).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < b * t * v * 4 / 2
