"""Windows made one key each, and attention to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from sparsejax.attention import compression
from tests import small

B, T, H, K, D = 2, 40, 4, 2, 8


@pytest.mark.parametrize(("size", "stride"), [(8, 4), (8, 8), (12, 4), (48, 8), (40, 8)])
def test_windows_are_complete_runs_of_tokens(size, stride):
  x = jnp.arange(B * T * K).reshape(B, T, K)
  starts = range(0, T - size + 1, stride)
  actual = compression.windows(x, size, stride)
  assert actual.shape == (B, len(starts), size, K)
  for i, start in enumerate(starts):
    np.testing.assert_array_equal(actual[:, i], x[:, start : start + size])


def make_problem(size=8, stride=4):
  keys = jax.random.split(jax.random.key(0), 3)
  w = (T - size) // stride + 1
  q = jax.random.normal(keys[0], (B, T, H, D))
  k, v = (jax.random.normal(key, (B, w, K, D)) for key in keys[1:])
  return q, k, v, small.make_batch(rows=B, length=T).segments


@pytest.mark.parametrize("rows", [T, 7, 1])
def test_stripes_change_neither_values_nor_gradients(rows, monkeypatch):
  q, k, v, segments = make_problem()

  def run():
    def total(q, k, v):
      out = compression.attend(q, k, v, segments, size=8, stride=4)
      return (out**2).sum(), out

    return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v)

  whole = run()
  monkeypatch.setattr(compression, "STRIPE_ELEMENTS", B * H * k.shape[1] * rows)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(run()), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_query_without_windows_gets_nothing_and_asks_for_nothing():
  q, k, v, segments = make_problem()

  def run(q, k, v):
    return compression.attend(q, k, v, jnp.ones_like(segments), size=8, stride=4)

  out, vjp = jax.vjp(run, q, k, v)
  np.testing.assert_array_equal(out[:, :7], jnp.zeros_like(out[:, :7]))
  assert (jnp.abs(out[:, 7:]).max(-1) > 0).all()
  dq, dk, dv = vjp(jnp.ones_like(out).at[:, 7:].set(0.0))
  assert not dq.any()
  assert not dk.any()
  assert not dv.any()


def test_a_row_shorter_than_a_window_has_none():
  q, k, v, segments = (x[:, :5] for x in make_problem())
  out = compression.attend(q, k[:, :0], v[:, :0], segments, size=8, stride=4)
  np.testing.assert_array_equal(out, jnp.zeros_like(q))


def test_long_rows_never_hold_all_scores():
  t, size, stride, heads = 65536, 32, 16, 8
  shape = jax.ShapeDtypeStruct
  q = shape((1, t, heads, 8), jnp.float32)
  k = shape((1, (t - size) // stride + 1, 1, 8), jnp.float32)

  def loss(q, k):
    return compression.attend(q, k, k, None, size=size, stride=stride).sum()

  compiled = jax.jit(jax.grad(loss, (0, 1))).lower(q, k).compile()
  # One array of all scores would take 8 GiB.
  assert compiled.memory_analysis().temp_size_in_bytes < heads * t * t // stride * 4 / 4


def test_there_is_no_kernel_and_strict_says_so():
  assert str(compression.choose("auto")) == "compressed_attention: xla (it has no GPU kernel)"
  with pytest.raises(pallas_kernels.CannotRunError, match="'strict' cannot run: it has no GPU"):
    compression.choose("strict")
