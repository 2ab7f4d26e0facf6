"""Full attention: its XLA path, its choice of backend, and cuDNN's packed documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import errors
from sparsejax.attention import full
from tests import small


def make_problem(b=2, t=64, h=4, k=2, d=8, dtype=jnp.float32, seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  shapes = (b, t, h, d), (b, t, k, d), (b, t, k, d)
  return [
    jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)
  ]


def expected(q, k, v, segments=None):
  mask = jnp.tri(q.shape[1], dtype=bool)[None, None]
  if segments is not None:
    mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
  return jax.nn.dot_product_attention(q, k, v, mask=mask)


@pytest.mark.parametrize("elements", [2**26, 2 * 4 * 64 * 24, 1], ids=["whole", "24", "one"])
def test_stripes_do_not_change_the_result(elements, monkeypatch):
  monkeypatch.setattr(full, "_STRIPE_ELEMENTS", elements)
  q, k, v = make_problem()
  segments = small.make_batch().segments

  def total(q, k, v, run):
    return (run(q, k, v) ** 2).sum(), run(q, k, v)

  actual, wanted = (
    jax.jit(jax.grad(lambda q, k, v, run=run: total(q, k, v, run), (0, 1, 2), has_aux=True))(
      q, k, v
    )
    for run in (
      lambda q, k, v: full.full_attention(q, k, v, segments, max_documents=4),
      lambda q, k, v: expected(q, k, v, segments),
    )
  )
  for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, w, atol=1e-5)


def test_without_segments_it_is_causal_attention():
  q, k, v = make_problem()
  actual = full.full_attention(q, k, v, None, max_documents=1)
  np.testing.assert_allclose(actual, expected(q, k, v), atol=1e-6)


def test_long_rows_never_hold_all_scores():
  t = 8192
  q = jax.ShapeDtypeStruct((1, t, 8, 8), jnp.float32)
  k = jax.ShapeDtypeStruct((1, t, 1, 8), jnp.float32)
  segments = jax.ShapeDtypeStruct((1, t), jnp.int32)

  def loss(q, k, segments):
    return full.full_attention(q, k, k, segments, max_documents=4).sum()

  compiled = jax.jit(jax.grad(loss)).lower(q, k, segments).compile()
  # One array of all scores would take 2 GiB.
  assert compiled.memory_analysis().temp_size_in_bytes < 8 * t * t * 4 / 2


@pytest.mark.parametrize(
  ("segments", "max_documents", "lengths", "offsets", "has_room"),
  [
    ([1, 1, 2, 2, 2, 3], 4, [2, 3, 1, -1], [0, 2, 5, -1, -1], True),
    ([1, 1, 1, 1, 1, 1], 2, [6, -1], [0, -1, -1], True),
    ([4, 4, 5, 5, 0, 0], 3, [2, 2, 2], [0, 2, 4, -1], True),
    ([1, 2, 3, 4, 5, 6], 6, [1] * 6, [0, 1, 2, 3, 4, 5, -1], True),
    ([1, 2, 3, 3, 3, 3], 2, [1, 1], [0, 1, 2], False),
  ],
)
def test_document_offsets(segments, max_documents, lengths, offsets, has_room):
  actual = full.document_offsets(jnp.asarray([segments]), max_documents)
  np.testing.assert_array_equal(actual[0][0], lengths)
  np.testing.assert_array_equal(actual[1][0], offsets)
  assert bool(actual[2][0]) == has_room


def test_the_cpu_takes_xla_and_says_why():
  if jax.devices()[0].platform == "gpu":
    pytest.skip("this machine has a GPU")
  backend, why = full.choose("auto", jnp.bfloat16, 64, has_documents=True)
  assert backend == "xla"
  assert "needs an NVIDIA GPU" in why
  with pytest.raises(errors.ConfigError, match="full_implementation='cudnn' cannot run"):
    full.full_attention(*make_problem(), None, max_documents=1, implementation="cudnn")


@pytest.mark.gpu
@pytest.mark.parametrize("max_documents", [1, 3, 8])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_cudnn_keeps_documents_apart(head_dim, max_documents):
  """Values and gradients of the packed form against masked attention in float32."""
  q, k, v = make_problem(b=3, t=512, h=8, k=2, d=head_dim, dtype=jnp.bfloat16)
  batch = small.make_batch(rows=3, length=512, num_documents=max(1, max_documents - 1))
  segments = jnp.ones((3, 512), jnp.int32) if max_documents == 1 else batch.segments
  dout = jax.random.normal(jax.random.key(9), q.shape)

  def run(q, k, v):
    return full.full_attention(
      q, k, v, segments, max_documents=max_documents, implementation="cudnn"
    )

  out, vjp = jax.vjp(jax.jit(run), q, k, v)
  exact_inputs = [x.astype(jnp.float32) for x in (q, k, v)]
  wanted, exact_vjp = jax.vjp(lambda *x: expected(*x, segments), *exact_inputs)
  pairs = zip((out, *vjp(dout.astype(out.dtype))), (wanted, *exact_vjp(dout)), strict=True)
  for actual, exact in pairs:
    error = jnp.linalg.norm(actual.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert error < 1e-2


@pytest.mark.gpu
def test_cudnn_refuses_more_documents_than_it_was_told_of():
  q, k, v = make_problem(b=1, t=128, h=4, k=2, d=64, dtype=jnp.bfloat16)
  segments = 1 + jnp.arange(128)[None] // 16
  out = full.full_attention(q, k, v, segments, max_documents=4, implementation="cudnn")
  assert jnp.isnan(out).all()


@pytest.mark.gpu
def test_a_hopper_takes_cudnn():
  assert full.choose("auto", jnp.bfloat16, 64, has_documents=True)[0] == "cudnn"
  assert full.choose("auto", jnp.float32, 64, has_documents=True)[0] == "xla"
