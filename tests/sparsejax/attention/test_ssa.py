"""SSA's coin, its alignment loss, and Theorem 1 of the paper."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from sparsejax.attention import method, moba, ssa
from tests import small

B, T, H, K, D = 2, 64, 4, 2, 8


def make_options(**changes):
  return dataclasses.replace(small.make_model().options.ssa, **changes)


def make_streams(seed=0, size=1.0):
  keys = jax.random.split(jax.random.key(seed), 3)
  full_, sparse = (size * jax.random.normal(key, (B, T, H, D)) for key in keys[:2])
  gate = jax.nn.sigmoid(jax.random.normal(keys[2], (B, T, H)))
  tokens = method.Tokens(jnp.ones((B, T), jnp.int32), gate, jnp.asarray(True))
  return full_, sparse, tokens


def smooth_l1(x):
  return np.where(np.abs(x) < 1, 0.5 * x * x, np.abs(x) - 0.5)


@pytest.mark.parametrize("after_gate", [True, False])
@pytest.mark.parametrize(("loss", "distance"), [("smooth_l1", smooth_l1), ("l2", np.square)])
@pytest.mark.parametrize(
  ("direction", "times"), [("both", 2), ("full_follows_sparse", 1), ("sparse_follows_full", 1)]
)
def test_alignment_is_the_mean_distance(direction, times, loss, distance, after_gate):
  full_, sparse, tokens = make_streams(size=2.0)
  options = make_options(
    align_direction=direction, align_loss=loss, align_after_gate=after_gate
  )
  factor = np.asarray(tokens.gate_BTH)[..., None] if after_gate else 1.0
  difference = factor * (np.asarray(full_) - np.asarray(sparse))
  expected = times * distance(difference).mean()
  actual = ssa.alignment(full_, sparse, tokens, options)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize(
  ("direction", "moves_full", "moves_sparse"),
  [
    ("both", True, True),
    ("full_follows_sparse", True, False),
    ("sparse_follows_full", False, True),
  ],
)
def test_each_term_moves_one_stream(direction, moves_full, moves_sparse):
  """The other one is held by a stop-gradient."""
  full_, sparse, tokens = make_streams()
  loss = functools.partial(
    ssa.alignment, tokens=tokens, options=make_options(align_direction=direction)
  )
  dfull, dsparse = jax.grad(loss, argnums=(0, 1))(full_, sparse)
  assert bool(dfull.any()) == moves_full
  assert bool(dsparse.any()) == moves_sparse


def test_both_streams_are_pulled_equally_hard():
  full_, sparse, tokens = make_streams()
  loss = functools.partial(ssa.alignment, tokens=tokens, options=make_options())
  dfull, dsparse = jax.grad(loss, argnums=(0, 1))(full_, sparse)
  np.testing.assert_allclose(dfull, -dsparse, rtol=1e-6)


def test_the_gate_learns_only_from_gated_outputs():
  full_, sparse, tokens = make_streams()
  for after_gate in (True, False):
    options = make_options(align_after_gate=after_gate)
    gradient = jax.grad(
      lambda gate, options=options: ssa.alignment(
        full_, sparse, tokens.replace(gate_BTH=gate), options
      )
    )(tokens.gate_BTH)
    assert bool(gradient.any()) == after_gate


class Doubling(method.SparseMethod):
  """Streams that are not attention: twice the queries when full, once when sparse."""

  def __call__(self, q_BTHD, k_BTKD, v_BTKD, tokens, stream):
    factor = dict(full=2.0, sparse=1.0)[stream]
    return method.Attended(factor * q_BTHD, jnp.float32(0))


@pytest.mark.parametrize("use_full", [True, False])
def test_any_method_with_two_streams_will_do(use_full):
  q, _, tokens = make_streams()
  options = small.make_model().options
  module = ssa.Ssa(options, Doubling(options))
  tokens = tokens.replace(use_full=jnp.asarray(use_full))
  out, align, _ = module.apply({}, q, q, q, tokens, "train")
  np.testing.assert_allclose(out, (2.0 if use_full else 1.0) * q)
  np.testing.assert_allclose(align, ssa.alignment(2.0 * q, q, tokens, options.ssa))


def make_moba(mask):
  options = small.make_model(attention__document_mask=mask).options
  keys = jax.random.split(jax.random.key(3), 3)
  q = jax.random.normal(keys[0], (B, T, H, D))
  k, v = (jax.random.normal(key, (B, T, K, D)) for key in keys[1:])
  segments = small.make_batch(rows=B, length=T).segments
  tokens = method.Tokens(segments, None, jnp.asarray(True))
  return moba.Moba(options), (q, k, v, tokens)


@pytest.mark.parametrize("mask", ["both", "full", "none"])
def test_both_streams_at_once_are_each_of_them_alone(mask):
  """To the last bit, and so are the gradients of either."""
  module, (q, k, v, tokens) = make_moba(mask)

  def alone(stream):
    return jax.vjp(lambda *x: module.apply({}, *x, tokens, stream).out_BTHD, q, k, v)

  for i, stream in enumerate(("full", "sparse")):
    out, vjp = alone(stream)
    at_once, vjp_at_once = jax.vjp(
      lambda *x, i=i: module.apply({}, *x, tokens, method="both")[i], q, k, v
    )
    np.testing.assert_array_equal(at_once, out)
    for actual, wanted in zip(vjp_at_once(q), vjp(q), strict=True):
      np.testing.assert_array_equal(actual, wanted)


def test_lists_can_be_looked_at_in_training():
  module, arrays = make_moba("both")
  _, seen = module.apply({}, *arrays, method="both", mutable=["intermediates"])
  (blocks,) = seen["intermediates"]["blocks"]
  assert blocks.shape == (B, T, K, 3)


def test_padding_counts_as_no_difference():
  full_, sparse, tokens = make_streams()
  padded = tokens.replace(segments_BT=tokens.segments_BT.at[:, T // 2 :].set(0))
  half = ssa.alignment(full_, sparse, padded, make_options())
  first = jnp.arange(T)[None, :, None, None] < T // 2
  expected = ssa.alignment(jnp.where(first, full_, sparse), sparse, tokens, make_options())
  np.testing.assert_allclose(half, expected, rtol=1e-6)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_the_coin_falls_as_often_as_asked(ratio):
  options = make_options(full_ratio=ratio)
  toss = jax.jit(jax.vmap(lambda step: ssa.toss(jax.random.key(7), step, 3, options)))
  tossed = np.asarray(toss(jnp.arange(4000)))
  # Four standard errors of 4000 tosses.
  assert abs(tossed.mean() - ratio) <= 4 * np.sqrt(ratio * (1 - ratio) / 4000)
  # One toss for all layers.
  assert (tossed == tossed[:, :1]).all()


def test_a_toss_per_layer_differs_between_layers():
  options = make_options(coin="layer")
  toss = jax.vmap(lambda step: ssa.toss(jax.random.key(7), step, 3, options))
  tossed = np.asarray(toss(jnp.arange(400)))
  assert 0.4 < (tossed[:, 0] == tossed[:, 1]).mean() < 0.6


def test_the_coin_is_a_function_of_key_and_step():
  options = make_options()

  def toss(key, step):
    return bool(ssa.toss(jax.random.key(key), jnp.int32(step), 1, options)[0])

  first = [toss(3, step) for step in range(40)]
  assert first == [toss(3, step) for step in range(40)]
  assert first != [toss(4, step) for step in range(40)]


def test_theorem_1():
  """The exact identity behind the bound, and the bound, for what our code computes.

  h_full - h_sparse = sum over dropped keys of a_full v - delta h_sparse, where delta is the
  full attention on dropped keys (arXiv:2511.20102, appendix B).
  """
  keys = jax.random.split(jax.random.key(0), 3)
  q = 2.0 * jax.random.normal(keys[0], (B, T, H, D))
  k, v = (jax.random.normal(key, (B, T, K, D)) for key in keys[1:])
  segments = small.make_batch(rows=B, length=T).segments
  h_full = pallas_kernels.full_attention(q, k, v, segments_BT=segments, max_documents=4)
  blocks = pallas_kernels.select_blocks(q, k, block_size=8, num_blocks=3, segments_BS=segments)
  h_sparse, _ = pallas_kernels.block_sparse_attention(
    q, k, v, blocks, block_size=8, segments_BS=segments
  )

  # Full attention weights and dropped keys, written out in float64.
  q, k, v, seg = (np.asarray(x, np.float64) for x in (q, k, v, segments))
  k, v = np.repeat(k, H // K, axis=2), np.repeat(v, H // K, axis=2)
  scores = np.einsum("bthd,bshd->bhts", q, k) * D**-0.5
  seen = np.tri(T, dtype=bool) & (seg[:, None, :, None] == seg[:, None, None, :])
  weights = np.where(seen, np.exp(scores), 0.0)
  weights /= weights.sum(-1, keepdims=True)
  listed = (np.asarray(blocks)[..., None] == np.arange(T)[None] // 8).any(-2)
  listed = np.repeat(listed, H // K, axis=2).transpose(0, 2, 1, 3)
  dropped = np.where(listed, 0.0, weights)
  delta = dropped.sum(-1).transpose(0, 2, 1)[..., None]
  assert delta.max() > 0.1  # else there is nothing to show

  gap = np.asarray(h_full, np.float64) - np.asarray(h_sparse, np.float64)
  from_dropped = np.einsum("bhts,bshd->bthd", dropped, v)
  np.testing.assert_allclose(gap, from_dropped - delta * h_sparse, atol=2e-6)

  norms = np.linalg.norm(v, axis=-1).transpose(0, 2, 1)[:, :, None]
  is_dropped = seen & ~listed
  largest = np.where(is_dropped, norms, 0.0).max(-1).transpose(0, 2, 1)
  bound = delta[..., 0] * (largest + np.linalg.norm(h_sparse, axis=-1))
  assert (np.linalg.norm(gap, axis=-1) <= bound + 1e-6).all()
