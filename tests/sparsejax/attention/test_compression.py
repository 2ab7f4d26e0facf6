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


def make_problem(size=8, stride=4, length=T):
  keys = jax.random.split(jax.random.key(0), 3)
  w = (length - size) // stride + 1
  q = jax.random.normal(keys[0], (B, length, H, D))
  k, v = (jax.random.normal(key, (B, w, K, D)) for key in keys[1:])
  return q, k, v, small.make_batch(rows=B, length=length).segments


def by_definition(q, k, v, segments, size, stride):
  """Every query against every window, in one masked softmax."""
  t, last = q.shape[1], np.arange(k.shape[1]) * stride + size - 1
  seen = last[None] <= np.arange(t)[:, None]
  seen = seen[None] & (segments[:, last][:, None] == segments[:, :, None])
  seen = seen[:, :, None]
  k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
  scores = jnp.where(seen, jnp.einsum("bthd,bwhd->bthw", q, k) / np.sqrt(D), -1e30)
  weights = jnp.where(seen, jnp.exp(scores - scores.max(-1, keepdims=True)), 0.0)
  weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
  return jnp.einsum("bthw,bwhd->bthd", weights, v)


@pytest.mark.parametrize(
  ("size", "stride", "length"), [(8, 4, 40), (8, 8, 47), (12, 4, 33), (4, 1, 17), (16, 8, 16)]
)
@pytest.mark.parametrize("documents", [True, False], ids=["documents", "one"])
def test_values_and_gradients_are_those_of_a_masked_softmax(size, stride, length, documents):
  q, k, v, segments = make_problem(size, stride, length)
  assert len(np.unique(segments)) > 1
  if not documents:
    segments = jnp.ones_like(segments)
  dout = jax.random.normal(jax.random.key(1), q.shape)

  def run(q, k, v):
    given = segments if documents else None
    return compression.attend(q, k, v, given, size=size, stride=stride, max_documents=8)

  def definition(q, k, v):
    return by_definition(q, k, v, segments, size, stride)

  @jax.jit
  def outputs_and_gradients(dout, *inputs):
    both = [jax.vjp(attend, *inputs) for attend in (run, definition)]
    return [(out, *vjp(dout)) for out, vjp in both]

  for a, b in zip(*outputs_and_gradients(dout, q, k, v), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_query_without_windows_gets_nothing_and_asks_for_nothing():
  q, k, v, _ = make_problem()

  def run(q, k, v):
    return compression.attend(q, k, v, None, size=8, stride=4)

  out, vjp = jax.vjp(jax.jit(run), q, k, v)
  np.testing.assert_array_equal(out[:, :7], jnp.zeros_like(out[:, :7]))
  assert (jnp.abs(out[:, 7:]).max(-1) > 0).all()
  dq, dk, dv = vjp(jnp.ones_like(out).at[:, 7:].set(0.0))
  assert not dq.any()
  assert not dk.any()
  assert not dv.any()


def test_a_row_shorter_than_a_window_has_none():
  q, k, v, segments = (x[:, :5] for x in make_problem())
  out = compression.attend(q, k[:, :0], v[:, :0], segments, size=8, stride=4, max_documents=4)
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


def test_it_runs_on_what_full_attention_runs_on():
  q, k = (jax.ShapeDtypeStruct((1, T, n, D), jnp.bfloat16) for n in (H, K))
  sizes = dict(size=8, stride=4, has_documents=True, max_documents=4)
  named = compression.choose(q, k, **sizes, implementation="xla")
  assert str(named) == "compressed_attention: xla (asked for)"
  if jax.devices()[0].platform == "gpu":
    return
  why = "cudnn needs an NVIDIA GPU, this is cpu"
  chosen = compression.choose(q, k, **sizes, implementation="auto")
  assert str(chosen) == f"compressed_attention: xla ({why})"
  with pytest.raises(
    pallas_kernels.CannotRunError, match=f"compressed_attention: .*'strict' cannot run: {why}"
  ):
    compression.choose(q, k, **sizes, implementation="strict")


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [True, False], ids=["documents", "one"])
def test_on_a_gpu_cudnn_attends_to_windows(documents):
  """Values and gradients in bfloat16 against the same in float32 without kernels."""
  size, stride, length = 32, 16, 1001
  keys = jax.random.split(jax.random.key(0), 4)
  w = (length - size) // stride + 1
  shapes = [(2, length, 8, 64), (2, w, 2, 64), (2, w, 2, 64), (2, length, 8, 64)]
  q, k, v, dout = (
    jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
  )
  segments = None
  if documents:
    segments = 1 + (jnp.arange(length)[None] >= jnp.array([[333], [512]]))

  def run(implementation, dtype):
    def attend(q, k, v):
      return compression.attend(
        q,
        k,
        v,
        segments,
        size=size,
        stride=stride,
        max_documents=4,
        implementation=implementation,
      )

    out, vjp = jax.vjp(jax.jit(attend), *(x.astype(dtype) for x in (q, k, v)))
    return [x.astype(jnp.float32) for x in (out, *vjp(dout.astype(dtype)))]

  for a, b in zip(run("cudnn", jnp.bfloat16), run("xla", jnp.float32), strict=True):
    assert jnp.linalg.norm(a - b) / jnp.linalg.norm(b) < 1e-2
