"""Every implementation against reference.py: values, gradients, and the edges."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_attention, choose_block_sparse_attention, devices
from pallas_kernels.block_sparse_attention import (
  api,
  mosaic_gpu,
  triton_gpu,
  xla,
  xla_gathered,
)
from tests.pallas_kernels import problems

WAYS = ("masked", "gathered")

CASES = {  # B, T, H, K, D, block_size, M
  "one_block": (1, 16, 2, 1, 8, 16, 1),
  "gqa_8_to_1": (1, 64, 8, 1, 8, 16, 2),
  "gqa_4_to_2": (2, 48, 4, 2, 16, 8, 2),
  "more_slots_than_blocks": (2, 32, 2, 2, 8, 8, 6),
  "length_not_a_multiple": (1, 45, 2, 1, 8, 8, 3),
}
EXTRAS = {
  "plain": {},
  "documents": dict(documents=True),
  "offset": dict(offset=19),
  "bias": dict(bias=True),
  "everything": dict(documents=True, offset=24, bias=True),
}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
  """Makes the XLA implementation go one way, in several stripes."""
  if request.param == "gathered":
    monkeypatch.setattr(xla, "MASKED_UP_TO", 0)
    monkeypatch.setattr(xla_gathered, "GATHERED_ELEMENTS", 2**13)
  else:
    monkeypatch.setattr(xla, "MASKED_UP_TO", 2**30)
  return request.param


def jitted(**options):
  """One program instead of a hundred small ones; a new one, for it goes the way of its test."""
  return jax.jit(functools.partial(block_sparse_attention, **options))


@functools.cache
def expectation(case, extra):
  """A problem, and what its answer is."""
  problem = problems.make(*CASES[case], **EXTRAS[extra])
  return problem, problems.run(problem, dtype=jnp.float32, attend=problems.reference)


@functools.cache
def careless(case, extra, dtype):
  """What careless arithmetic makes of it."""
  return problems.run(expectation(case, extra)[0], dtype=dtype, attend=problems.plain)


@pytest.mark.parametrize(
  ("case", "extra", "dtype"),
  [
    *((c, "everything", dtype) for c in CASES for dtype in ("float32", "bfloat16")),
    *(("gqa_4_to_2", extra, "float32") for extra in EXTRAS if extra != "everything"),
  ],
)
def test_matches_reference(case, extra, dtype, way):
  problem, exact = expectation(case, extra)
  low = careless(case, extra, dtype)
  actual = problems.run(problem, dtype=dtype)
  assert actual.keys() == exact.keys()
  for name in exact:
    is_exact = name in ("lse", "dkey_bias")
    assert actual[name].dtype == (jnp.float32 if is_exact else dtype)
    problems.assert_no_worse(name, actual[name], low[name], exact[name])


@given(
  t=st.integers(1, 40),
  block_size=st.integers(1, 9),
  num_blocks=st.integers(1, 5),
  heads=st.sampled_from([(1, 1), (2, 1), (6, 2)]),
  offset=st.integers(0, 20),
  seed=st.integers(0, 2**16),
)
@settings(max_examples=6, deadline=None)
def test_any_shape_matches_reference(t, block_size, num_blocks, heads, offset, seed):
  problem = problems.make(
    1, t, *heads, 4, block_size, num_blocks, seed=seed, offset=offset, documents=True
  )
  exact = problems.run(problem, dtype=jnp.float32, attend=problems.reference)
  actual = problems.run(problem, dtype=jnp.float32)
  for name in exact:
    problems.assert_no_worse(name, actual[name], exact[name], exact[name])


def test_reference_is_the_definition():
  """The dense reference itself, one query and one head at a time in numpy."""
  problem = problems.make(2, 24, 4, 2, 8, 8, 2, documents=True, offset=5, bias=True)
  q, k, v, bias = problem.q, problem.k, problem.v, problem.key_bias
  segments = np.asarray(problem.segments)
  attend = jitted(
    block_size=8, query_offset=5, segments_BS=problem.segments, implementation="reference"
  )
  out, lse = attend(q, k, v, problem.blocks, key_bias_BSK=bias)
  q, k, v, bias, blocks = (np.asarray(x, np.float64) for x in (q, k, v, bias, problem.blocks))
  for row, query, head in np.ndindex(2, 24, 4):
    seen = [
      s
      for s in range(query + 5 + 1)
      if s // 8 in blocks[row, query, head // 2]
      and segments[row, s] == segments[row, query + 5]
    ]
    if not seen:
      assert not np.asarray(out)[row, query, head].any()
      assert np.asarray(lse)[row, query, head] == -np.inf
      continue
    scores = k[row, seen, head // 2] @ q[row, query, head] * 8**-0.5
    scores += bias[row, seen, head // 2]
    weights = np.exp(scores) / np.exp(scores).sum()
    expected = weights @ v[row, seen, head // 2]
    np.testing.assert_allclose(out[row, query, head], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lse[row, query, head], np.log(np.exp(scores).sum()), rtol=1e-4)


def test_listing_every_block_is_full_attention(way):
  problem = problems.make(2, 64, 4, 2, 16, 16, 1)
  q, k, v = problem.q, problem.k, problem.v
  every_block = jnp.broadcast_to(jnp.arange(4), (2, 64, 2, 4))
  out, _ = jitted(block_size=16)(q, k, v, every_block)
  expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
  np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("is_traced", [False, True], ids=["known", "traced"])
def test_queries_in_chunks_are_the_queries_at_once(is_traced, way):
  problem = problems.make(1, 48, 2, 1, 8, 8, 3, documents=True)
  attend = functools.partial(block_sparse_attention, block_size=8, segments_BS=problem.segments)
  attend = jax.jit(attend, static_argnames=() if is_traced else "query_offset")
  whole, whole_lse = attend(problem.q, problem.k, problem.v, problem.blocks)
  for start in (0, 20, 32):
    part = slice(start, start + 16)
    offset = jnp.int32(start) if is_traced else start
    out, lse = attend(
      problem.q[:, part], problem.k, problem.v, problem.blocks[:, part], query_offset=offset
    )
    np.testing.assert_allclose(out, whole[:, part], atol=1e-6)
    np.testing.assert_allclose(lse, whole_lse[:, part], atol=1e-6)


def test_unlisted_blocks_are_never_read(way):
  problem = problems.make(1, 64, 2, 1, 16, 16, 1)
  q, k, v = problem.q, problem.k, problem.v
  own_block = (jnp.arange(64) // 16)[None, :, None, None]
  attend = jitted(block_size=16)
  clean, _ = attend(q, k, v, own_block)
  poisoned, _ = attend(q, k.at[:, :16].set(1e9), v.at[:, :16].set(1e9), own_block)
  np.testing.assert_array_equal(clean[:, 16:], poisoned[:, 16:])


def test_an_empty_list_gives_nothing_and_pushes_on_nothing(way):
  problem = problems.make(1, 32, 2, 1, 8, 8, 2)
  nothing = jnp.full((1, 32, 1, 2), -1)

  def attend(q, k, v):
    return block_sparse_attention(q, k, v, nothing, block_size=8)

  (out, lse), vjp = jax.vjp(jax.jit(attend), problem.q, problem.k, problem.v)
  assert not out.any()
  assert (lse == -jnp.inf).all()
  for gradient in vjp((problem.dout, jnp.zeros_like(lse))):
    np.testing.assert_array_equal(gradient, jnp.zeros_like(gradient))


def test_order_and_repeats_of_a_list_do_not_matter(way):
  problem = problems.make(1, 32, 2, 1, 8, 8, 2)
  attend = functools.partial(jitted(block_size=8), problem.q, problem.k, problem.v)
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
    (dict(query_offset=1), "do not lie within 32 keys"),
    (dict(query_offset=-1), "do not lie within 32 keys"),
    (dict(segments=(1, 16)), "segments must be"),
  ],
)
def test_wrong_input_is_refused(change, message):
  q = jnp.ones(change.get("q", (1, 32, 4, 8)), change.get("dtype", jnp.float32))
  k, v = jnp.ones((1, 32, 2, 8)), jnp.ones(change.get("v", (1, 32, 2, 8)))
  blocks = jnp.zeros(change.get("blocks", (1, 32, 2, 2)), jnp.int32)
  segments = jnp.ones(change["segments"], jnp.int32) if "segments" in change else None
  # The hook that checks array types sees mismatched shapes first where it is installed.
  with pytest.raises(Exception, match=f"{message}|Type-check"):
    block_sparse_attention(
      q,
      k,
      v,
      blocks,
      block_size=change.get("block_size", 8),
      query_offset=change.get("query_offset", 0),
      segments_BS=segments,
    )


GPU_KERNELS = ("mosaic_gpu", "triton")
BY_NAME = "runs by name or with strict"


def shapes(*, dtype=jnp.bfloat16, heads=4, kv_heads=2, head_dim=64, length=64):
  def array(*shape, dtype=dtype):
    return jax.ShapeDtypeStruct((1, length, *shape), dtype)

  k = array(kv_heads, head_dim)
  return array(heads, head_dim), k, k, array(kv_heads, 3, dtype=jnp.int32)


@pytest.fixture
def ours(monkeypatch):
  """A machine on which both kernels run, as far as one can tell without trying."""
  monkeypatch.setattr(devices, "why_not_hopper", lambda: None)
  monkeypatch.setattr(triton_gpu, "why_not_here", lambda: None)
  # Whether the extra is installed does not matter here.
  found = triton_gpu.importlib.util.find_spec("jax")
  monkeypatch.setattr(triton_gpu.importlib.util, "find_spec", lambda name: found)


@pytest.mark.parametrize("implementation", [None, "auto"])
@pytest.mark.parametrize(
  ("changes", "block_size", "said"),
  [
    *(({}, size, "mosaic_gpu (the first choice)") for size in (16, 32, 64, 128)),
    (dict(head_dim=128), 16, "mosaic_gpu (the first choice)"),
    (
      dict(dtype=jnp.float32),
      16,
      f"xla (mosaic_gpu takes bfloat16, not float32; triton {BY_NAME})",
    ),
    (
      dict(head_dim=32),
      16,
      f"xla (mosaic_gpu takes head sizes (64, 128), not 32; triton {BY_NAME})",
    ),
    (
      dict(heads=33, kv_heads=1),
      16,
      "xla (mosaic_gpu takes up to 32 query heads per key head, not 33; triton takes up to 32 "
      "query heads per key head, not 33)",
    ),
  ],
)
def test_a_hopper_takes_its_kernels_where_they_can_run(
  changes, block_size, said, implementation, ours
):
  choice = choose_block_sparse_attention(
    *shapes(**changes), block_size=block_size, implementation=implementation
  )
  assert str(choice) == f"block_sparse_attention: {said}"


def test_triton_is_taken_by_name_alone(ours, monkeypatch):
  monkeypatch.setattr(devices, "why_not_hopper", lambda: "needs another GPU")
  choose = functools.partial(choose_block_sparse_attention, *shapes(), block_size=16)
  assert str(choose()) == (
    f"block_sparse_attention: xla (mosaic_gpu needs another GPU; triton {BY_NAME})"
  )
  assert choose(implementation="triton").backend == "triton"


def test_kernels_are_taken_where_the_automatic_ones_have_them(ours, monkeypatch):
  monkeypatch.setattr(api, "AUTOMATIC", (*GPU_KERNELS, "xla"))
  choose = functools.partial(choose_block_sparse_attention, block_size=16)
  assert choose(*shapes()).backend == "mosaic_gpu"
  assert choose(*shapes(dtype=jnp.float32)) == (
    "block_sparse_attention",
    "triton",
    "mosaic_gpu takes bfloat16, not float32",
  )
  reason = (
    "mosaic_gpu takes head sizes (64, 128), not 96; triton takes head sizes (32, 64, 128)"
  )
  choice = choose(*shapes(head_dim=96))
  assert choice.backend == "xla"
  assert choice.reason.startswith(reason)


def test_strict_is_a_kernel_or_an_error(ours):
  choose = functools.partial(choose_block_sparse_attention, block_size=16)
  assert choose(*shapes(), implementation="strict").backend == "mosaic_gpu"
  choice = choose(*shapes(dtype=jnp.float32), implementation="strict")
  assert choice.backend == "triton"
  assert choice.reason == "strict; mosaic_gpu takes bfloat16, not float32"
  with pytest.raises(
    ValueError, match=r"mosaic_gpu takes blocks .* 8; triton takes .* 8; 'xla'"
  ):
    choose_block_sparse_attention(*shapes(), block_size=8, implementation="strict")


def test_where_there_is_no_gpu_kernels_are_refused_and_the_rest_runs():
  if jax.devices()[0].platform == "gpu":
    pytest.skip("this machine has a GPU")
  mosaic, triton = "mosaic_gpu needs a Hopper GPU, this is cpu", "triton needs an NVIDIA GPU"
  choose = functools.partial(choose_block_sparse_attention, block_size=8)
  # The device is named even where the shapes would not do either.
  for arrays in (shapes(), shapes(dtype=jnp.float32)):
    assert choose(*arrays).backend == "xla"
    assert choose(*arrays).reason == f"{mosaic}; {triton}, this is cpu"
  problem = problems.make(1, 32, 2, 1, 8, 8, 2)
  inputs = problem.q, problem.k, problem.v, problem.blocks
  run = functools.partial(block_sparse_attention, *inputs, block_size=8)
  for implementation, why in (("mosaic_gpu", mosaic), ("triton", triton), ("strict", mosaic)):
    with pytest.raises(ValueError, match=f"implementation='{implementation}' .*{why}"):
      run(implementation=implementation)
  for implementation in ("auto", "xla", "reference"):
    out, _ = run(implementation=implementation)
    np.testing.assert_allclose(out, run()[0], atol=1e-5)


@pytest.mark.parametrize("name", GPU_KERNELS)
def test_a_name_runs_what_it_names(name, ours, monkeypatch):
  seen = []

  def run(problem, known_offset, block_size, scale):
    seen.append((known_offset, block_size, scale))
    return xla.block_sparse_attention(problem, known_offset, block_size, scale)

  monkeypatch.setitem(api._IMPLEMENTATIONS, name, run)
  q = jnp.zeros((1, 32, 4, 64), jnp.bfloat16)
  k, blocks = q[:, :, :2], jnp.zeros((1, 32, 2, 1), jnp.int32)
  block_sparse_attention(q, k, k, blocks, block_size=16, implementation=name)
  assert seen == [(0, 16, 64**-0.5)]


def test_each_name_has_its_own_implementation():
  assert api._IMPLEMENTATIONS["mosaic_gpu"] is mosaic_gpu.block_sparse_attention
  assert api._IMPLEMENTATIONS["triton"] is triton_gpu.block_sparse_attention
