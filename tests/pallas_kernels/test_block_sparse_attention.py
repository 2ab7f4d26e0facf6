"""Every implementation against reference.py: values, gradients, and the edges."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_attention
from pallas_kernels.block_sparse_attention import xla, xla_gathered

WAYS = ("masked", "gathered")

CASES = {  # B, T, H, K, D, block_size, M
  "one_block": (1, 16, 2, 1, 8, 16, 1),
  "gqa_8_to_1": (1, 64, 8, 1, 8, 16, 2),
  "gqa_4_to_2": (2, 48, 4, 2, 16, 8, 2),
  "more_slots_than_blocks": (2, 32, 2, 2, 8, 8, 6),
  "length_not_a_multiple": (1, 45, 2, 1, 8, 8, 3),
}


def make_problem(b, t, h, k, d, block_size, m, seed=0):
  keys = jax.random.split(jax.random.key(seed), 6)
  shapes = (b, t, h, d), (b, t, k, d), (b, t, k, d), (b, t, h, d), (b, t, h)
  q, k_, v, dout, dlse = (
    jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=False)
  )
  # Empty slots, repeats, blocks of the future and blocks that are not there.
  blocks = jax.random.randint(keys[5], (b, t, k, m), -1, t // block_size + 3)
  return (q, k_, v, blocks), (dout, dlse)


def documents(b, t, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(np.cumsum(rng.random((b, t)) < 0.1, axis=1))


def run(problem, cotangents, *, dtype, block_size, segments=None, attend=None):
  """Outputs and gradients, computed in `dtype` from inputs that bfloat16 can hold."""
  attend = attend or block_sparse_attention

  @jax.jit
  def outputs_and_gradients(problem, cotangents):
    q, k, v, blocks = problem
    q, k, v, dout = (x.astype(jnp.bfloat16).astype(dtype) for x in (q, k, v, cotangents[0]))

    def of(q, k, v):
      return attend(q, k, v, blocks, block_size=block_size, segments_BT=segments)

    (out, lse), vjp = jax.vjp(of, q, k, v)
    # A query that sees nothing has no log-normaliser to push on.
    dlse = jnp.where(jnp.isfinite(lse), cotangents[1], 0.0)
    return out, lse, *vjp((dout, dlse))

  names = ("out", "lse", "dq", "dk", "dv")
  return dict(zip(names, outputs_and_gradients(problem, cotangents), strict=True))


reference = functools.partial(block_sparse_attention, implementation="reference")


def plain(q, k, v, blocks, *, block_size, segments_BT):
  """What one would write without thinking, every product rounded to the input's dtype."""
  (b, t, h, d), num_kv = q.shape, k.shape[2]
  q = q.reshape(b, t, num_kv, h // num_kv, d)
  logits = jnp.einsum("btkgd,bskd->btkgs", q, k).astype(jnp.float32) * d**-0.5
  block_of_key = jnp.arange(t) // block_size
  seen = (blocks[..., None] == block_of_key[None, None, None, None]).any(-2)
  seen &= jnp.tri(t, dtype=bool)[None, :, None]
  if segments_BT is not None:
    seen &= (segments_BT[:, :, None] == segments_BT[:, None])[:, :, None]
  logits = jnp.where(seen[:, :, :, None], logits, -jnp.inf)
  lse = jax.nn.logsumexp(logits, axis=-1)
  weights = jnp.exp(logits - jnp.where(jnp.isneginf(lse), 0.0, lse)[..., None]).astype(v.dtype)
  out = jnp.einsum("btkgs,bskd->btkgd", weights, v)
  return out.reshape(b, t, h, d), lse.reshape(b, t, h)


def assert_no_worse(name, actual, plain, exact, factor=2.0, floor=2e-5):
  """`actual` may be at most `factor` times as wrong as plain low precision."""

  def error(x):
    # Equal infinities are no error; their difference would be NaN.
    return float(jnp.where(x == exact, 0.0, jnp.abs(x.astype(jnp.float32) - exact)).max())

  size = float(jnp.abs(jnp.where(jnp.isfinite(exact), exact, 0.0)).max())
  budget = factor * error(plain) + floor * max(1.0, size)
  assert error(actual) <= budget, f"{name}: error {error(actual):.1e}, budget {budget:.1e}"


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
  """Makes the XLA implementation go one way, in several stripes."""
  if request.param == "gathered":
    monkeypatch.setattr(xla, "MASKED_UP_TO", 0)
    monkeypatch.setattr(xla_gathered, "GATHERED_ELEMENTS", 2**13)
  else:
    monkeypatch.setattr(xla, "MASKED_UP_TO", 2**30)
  return request.param


@pytest.mark.parametrize("with_documents", [False, True], ids=["one_document", "documents"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_reference(case, dtype, with_documents, way):
  problem, cotangents = make_problem(*case)
  segments = documents(*case[:2]) if with_documents else None
  go = functools.partial(run, problem, cotangents, block_size=case[5], segments=segments)
  exact = go(dtype=jnp.float32, attend=reference)
  low = go(dtype=dtype, attend=plain)
  actual = go(dtype=dtype)
  for name in exact:
    assert actual[name].dtype == (jnp.float32 if name == "lse" else dtype)
    assert_no_worse(name, actual[name], low[name], exact[name])


@given(
  t=st.integers(1, 40),
  block_size=st.integers(1, 9),
  num_blocks=st.integers(1, 5),
  heads=st.sampled_from([(1, 1), (2, 1), (6, 2)]),
  seed=st.integers(0, 2**16),
)
@settings(max_examples=10, deadline=None)
def test_any_shape_matches_reference(t, block_size, num_blocks, heads, seed):
  problem, cotangents = make_problem(1, t, *heads, 4, block_size, num_blocks, seed)
  segments = documents(1, t, seed)
  go = functools.partial(
    run, problem, cotangents, block_size=block_size, segments=segments, dtype=jnp.float32
  )
  exact, actual = go(attend=reference), go()
  for name in exact:
    assert_no_worse(name, actual[name], exact[name], exact[name])


def test_reference_is_the_definition():
  """The dense reference itself, one query and one head at a time in numpy."""
  (q, k, v, blocks), _ = make_problem(2, 24, 4, 2, 8, 8, 2)
  segments = np.asarray(documents(2, 24))
  out, lse = block_sparse_attention(
    q, k, v, blocks, block_size=8, segments_BT=jnp.asarray(segments), implementation="reference"
  )
  q, k, v, blocks = (np.asarray(x, np.float64) for x in (q, k, v, blocks))
  for row, position, head in np.ndindex(2, 24, 4):
    seen = [
      s
      for s in range(position + 1)
      if s // 8 in blocks[row, position, head // 2]
      and segments[row, s] == segments[row, position]
    ]
    if not seen:
      assert not np.asarray(out)[row, position, head].any()
      assert np.asarray(lse)[row, position, head] == -np.inf
      continue
    scores = k[row, seen, head // 2] @ q[row, position, head] * 8**-0.5
    weights = np.exp(scores) / np.exp(scores).sum()
    expected = weights @ v[row, seen, head // 2]
    np.testing.assert_allclose(out[row, position, head], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
      lse[row, position, head], np.log(np.exp(scores).sum()), rtol=1e-4
    )


def test_listing_every_block_is_full_attention(way):
  (q, k, v, _), _ = make_problem(2, 64, 4, 2, 16, 16, 1)
  every_block = jnp.broadcast_to(jnp.arange(4), (2, 64, 2, 4))
  out, _ = block_sparse_attention(q, k, v, every_block, block_size=16)
  expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
  np.testing.assert_allclose(out, expected, atol=1e-5)


def test_unlisted_blocks_are_never_read(way):
  (q, k, v, _), _ = make_problem(1, 64, 2, 1, 16, 16, 1)
  own_block = (jnp.arange(64) // 16)[None, :, None, None]
  attend = functools.partial(block_sparse_attention, block_size=16)
  clean, _ = attend(q, k, v, own_block)
  poisoned, _ = attend(q, k.at[:, :16].set(1e9), v.at[:, :16].set(1e9), own_block)
  np.testing.assert_array_equal(clean[:, 16:], poisoned[:, 16:])


def test_an_empty_list_gives_nothing_and_pushes_on_nothing(way):
  (q, k, v, _), (dout, _) = make_problem(1, 32, 2, 1, 8, 8, 2)
  nothing = jnp.full((1, 32, 1, 2), -1)

  def attend(q, k, v):
    return block_sparse_attention(q, k, v, nothing, block_size=8)

  (out, lse), vjp = jax.vjp(attend, q, k, v)
  assert not out.any()
  assert (lse == -jnp.inf).all()
  for gradient in vjp((dout, jnp.zeros_like(lse))):
    np.testing.assert_array_equal(gradient, jnp.zeros_like(gradient))


def test_order_and_repeats_of_a_list_do_not_matter(way):
  (q, k, v, _), _ = make_problem(1, 32, 2, 1, 8, 8, 2)
  attend = functools.partial(block_sparse_attention, q, k, v, block_size=8)
  once, _ = attend(jnp.broadcast_to(jnp.array([0, 3, 1]), (1, 32, 1, 3)))
  again, _ = attend(jnp.broadcast_to(jnp.array([1, 3, 3, 0, 1, 99, -1]), (1, 32, 1, 7)))
  np.testing.assert_allclose(once, again, atol=1e-6)


def test_gathering_takes_memory_for_the_keys_read_only():
  """The largest intermediate at T=4096 stays far below a T x T matrix of scores."""
  t, block_size, m = 4096, 16, 2
  q = jax.ShapeDtypeStruct((1, t, 2, 8), jnp.float32)
  k = jax.ShapeDtypeStruct((1, t, 1, 8), jnp.float32)
  blocks = jax.ShapeDtypeStruct((1, t, 1, m), jnp.int32)

  def loss(q, k, blocks):
    return block_sparse_attention(q, k, k, blocks, block_size=block_size)[0].sum()

  compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(q, k, blocks).compile()
  per_key = 4 * 8 * t * block_size * m
  assert compiled.memory_analysis().temp_size_in_bytes < 8 * per_key < 2 * t * t * 4


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(q=(1, 32, 3, 8)), "do not group"),
    (dict(v=(1, 16, 2, 8)), "k and v must be"),
    (dict(blocks=(1, 16, 2, 2)), "blocks must be"),
    (dict(dtype=jnp.bfloat16), "share a dtype"),
    (dict(block_size=0), "must be at least 1"),
  ],
)
def test_wrong_input_is_refused(change, message):
  q = jnp.ones(change.get("q", (1, 32, 4, 8)), change.get("dtype", jnp.float32))
  k, v = jnp.ones((1, 32, 2, 8)), jnp.ones(change.get("v", (1, 32, 2, 8)))
  blocks = jnp.zeros(change.get("blocks", (1, 32, 2, 2)), jnp.int32)
  # The hook that checks array types sees mismatched shapes first where it is installed.
  with pytest.raises(Exception, match=f"{message}|Type-check"):
    block_sparse_attention(q, k, v, blocks, block_size=change.get("block_size", 8))
