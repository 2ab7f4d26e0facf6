"""Attention of a chunk: its definition, its XLA path, and how cuDNN's two softmaxes are one."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import choose_chunk_attention, chunk_attention, full_attention
from pallas_kernels.chunk_attention import cudnn, xla
from pallas_kernels.full_attention import cudnn as whole_rows
from pallas_kernels.full_attention import reference as definition

T, S = 12, 40
# The first chunk, one within, and the last.
OFFSETS = (0, 9, S - T)


def make_problem(b=2, t=T, s=S, h=4, k=2, d=8, dtype=jnp.float32, seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  shapes = (b, t, h, d), (b, s, k, d), (b, s, k, d)
  qkv = [
    2.0 * jax.random.normal(key, shape).astype(dtype)
    for key, shape in zip(keys[:3], shapes, strict=True)
  ]
  return qkv, 2.0 * jax.random.normal(keys[3], (b, s, k))


def expected(qkv, offset, **options):
  return chunk_attention(*qkv, offset, implementation="reference", **options)


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("window", [None, 1, 7])
def test_reference_is_a_part_of_attention_of_whole_rows(window, has_bias):
  (_, k, v), bias = make_problem()
  q = jax.random.normal(jax.random.key(9), (2, S, 4, 8))
  bias = bias if has_bias else None
  whole = full_attention(q, k, v, window=window, key_bias_BTK=bias, implementation="reference")
  for offset in OFFSETS:
    part = slice(offset, offset + T)
    actual = expected((q[:, part], k, v), offset, window=window, key_bias_BSK=bias)
    np.testing.assert_allclose(actual, whole[:, part], atol=1e-6)


@pytest.mark.parametrize("elements", [2**26, 2 * 4 * 5 * 7, 1], ids=["whole", "5x7", "1x1"])
@pytest.mark.parametrize("window", [None, 1, 7])
def test_tiles_do_not_change_the_result(window, elements, monkeypatch):
  """Tiles that overlap at the end, and that see nothing; what is not seen is not read."""
  monkeypatch.setattr(xla, "TILE_ELEMENTS", elements)
  monkeypatch.setattr(xla, "MOST_QUERIES", 5)
  qkv, bias = make_problem()
  run = jax.jit(
    lambda qkv, bias, offset: chunk_attention(*qkv, offset, window=window, key_bias_BSK=bias)
  )
  for offset in OFFSETS:
    q, k, v = qkv
    wanted = expected(qkv, offset, window=window, key_bias_BSK=bias)
    hidden = (jnp.arange(S) >= offset + T)[None, :, None, None]
    k, v = (jnp.where(hidden, 1e9, x) for x in (k, v))
    np.testing.assert_allclose(run((q, k, v), bias, jnp.int32(offset)), wanted, atol=1e-5)


def attend_as_cudnn(q, k, v, scale, lengths=None):
  """What two calls of cuDNN's are asked for, in numbers of one dtype."""
  (b, t, h, d), s = q.shape, k.shape[1]
  q = q.reshape(b, t, k.shape[2], -1, d)
  logits = scale * jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32)
  if lengths is None:
    seen = jnp.tri(t, s, dtype=bool)[None]
  else:
    seen = jnp.broadcast_to((jnp.arange(s)[None] < lengths[:, None])[:, None], (b, t, s))
  logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
  lse = jax.nn.logsumexp(logits, axis=-1)
  out = jnp.einsum("bkgts,bskd->btkgd", jnp.exp(logits - lse[..., None]), v)
  return out.reshape(b, t, h, d).astype(v.dtype), lse.reshape(b, h, t).transpose(0, 2, 1)


def causal_as_cudnn(q, k, v, segments, max_documents, window, bias):
  return definition.full_attention(q, k, v, segments, max_documents, window, bias)


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("window", [None, 1, 7, S])
def test_what_cudnn_gives_is_put_together(window, has_bias, monkeypatch):
  """With a stand-in for each of its calls: masks, offsets, biases, and one softmax of two."""
  monkeypatch.setattr(cudnn, "_attend", attend_as_cudnn)
  monkeypatch.setattr(whole_rows, "full_attention", causal_as_cudnn)
  monkeypatch.setattr(whole_rows, "why_not", lambda *args, **options: None)
  qkv, bias = make_problem()
  bias = bias if has_bias else None
  options = dict(window=window, implementation="cudnn")
  run = jax.jit(lambda qkv, bias, at: chunk_attention(*qkv, at, key_bias_BSK=bias, **options))
  for offset in OFFSETS:
    wanted = expected(qkv, offset, window=window, key_bias_BSK=bias)
    np.testing.assert_allclose(run(qkv, bias, jnp.int32(offset)), wanted, atol=1e-5)
  whole, whole_bias = make_problem(t=S)
  whole_bias = whole_bias if has_bias else None
  np.testing.assert_allclose(
    run(whole, whole_bias, jnp.int32(0)),
    expected(whole, 0, window=window, key_bias_BSK=whole_bias),
    atol=1e-5,
  )


def test_nothing_is_merged_where_nothing_lies_before():
  """Whatever comes out of attention to no keys at all."""
  own, lse = jnp.ones((1, 2, 3, 4)), jnp.zeros((1, 2, 3))
  for number in (jnp.nan, jnp.inf, -jnp.inf):
    nothing = jnp.full_like(own, number), jnp.full_like(lse, number)
    np.testing.assert_array_equal(cudnn.merge(own, lse, *nothing, jnp.bool(False)), own)


def test_long_rows_never_hold_all_scores():
  t, s = 2048, 2**17
  q = jax.ShapeDtypeStruct((1, t, 8, 8), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((1, s, 1, 8), jnp.bfloat16)
  run = jax.jit(lambda q, k, offset: chunk_attention(q, k, k, offset))
  compiled = run.lower(q, k, jax.ShapeDtypeStruct((), jnp.int32)).compile()
  # One array of all scores would take 8 GiB.
  assert compiled.memory_analysis().temp_size_in_bytes < 8 * t * s * 4 / 4


def test_what_runs_is_said(monkeypatch):
  q, k = (jax.ShapeDtypeStruct((1, n, 4, 64), jnp.bfloat16) for n in (T, S))
  if jax.devices()[0].platform != "gpu":
    why = "cudnn needs an NVIDIA GPU, this is cpu"
    assert choose_chunk_attention(q, k, k) == ("chunk_attention", "xla", why)
    with pytest.raises(ValueError, match=f"='strict' cannot run: {why}; 'xla' runs"):
      choose_chunk_attention(q, k, k, implementation="strict")
  monkeypatch.setattr(whole_rows, "why_not", lambda *args, **options: None)
  said = str(choose_chunk_attention(q, k, k, window=3))
  assert said == "sliding_window_chunk_attention: cudnn (the first choice)"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(q=(1, 8, 3, 8)), "3 query heads do not group over 2"),
    (dict(q=(1, 33, 4, 8)), "33 queries do not lie within 32 keys"),
    (dict(v=(1, 16, 2, 8)), "k and v must be"),
    (dict(dtype=jnp.bfloat16), "share a dtype"),
    (dict(bias=(1, 32, 4)), r"biases of keys must be \(1, 32, 2\), got \(1, 32, 4\)"),
    (dict(window=0), "window=0 must be at least 1, the query's own key"),
    (dict(offset=25), "8 queries from query_offset=25 on do not lie within 32 keys"),
    (dict(offset=-1), "8 queries from query_offset=-1 on do not lie within 32 keys"),
  ],
)
def test_wrong_input_is_refused(change, message):
  q = jnp.ones(change.get("q", (1, 8, 4, 8)), change.get("dtype", jnp.float32))
  k, v = jnp.ones((1, 32, 2, 8)), jnp.ones(change.get("v", (1, 32, 2, 8)))
  bias = jnp.ones(change["bias"]) if "bias" in change else None
  # Unwrapped, since the hook that checks array types would see mismatched shapes first.
  attend = inspect.unwrap(chunk_attention)
  if "offset" not in change:
    choose = inspect.unwrap(choose_chunk_attention)
    attend = lambda q, k, v, _, **options: choose(q, k, v, **options)  # noqa: E731
  options = dict(window=change.get("window"), key_bias_BSK=bias)
  with pytest.raises(ValueError, match=message):
    attend(q, k, v, change.get("offset", 0), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("window", [None, 129])
def test_cudnn_on_a_gpu_is_the_definition(window, has_bias):
  """What lies behind the chunk is large, and must not be read."""
  t, s = 256, 1024
  (q, k, v), bias = make_problem(t=t, s=s, h=8, d=64, dtype=jnp.bfloat16)
  q, bias = 0.5 * q, bias if has_bias else None
  options = dict(window=window, key_bias_BSK=bias)
  run = jax.jit(
    lambda q, k, v, offset: chunk_attention(q, k, v, offset, implementation="cudnn", **options)
  )
  for offset in (0, 64, 256, 512, s - t):
    hidden = (jnp.arange(s) >= offset + t)[None, :, None, None]
    wanted = expected((q, k, v), offset, **options)
    k_far, v_far = (jnp.where(hidden, 1e4, x).astype(x.dtype) for x in (k, v))
    actual = run(q, k_far, v_far, jnp.int32(offset))
    np.testing.assert_allclose(
      actual.astype(jnp.float32), wanted.astype(jnp.float32), atol=0.05
    )


@pytest.mark.parametrize(("window", "calls"), [(None, 2), (100, 1)])
def test_calls_of_cudnn_are_lowered_for_cuda(window, calls, monkeypatch):
  """As JAX builds them, on a device of which it is told."""
  internal = "jax._src.cudnn.fused_attention_stablehlo"
  monkeypatch.setattr(f"{internal}.check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(f"{internal}.check_compute_capability", lambda *_: True)
  monkeypatch.setattr(f"{internal}.is_cuda_compute_capability_equal", lambda *_: False)
  monkeypatch.setattr(whole_rows, "why_not", lambda *args, **options: None)
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  q, k = shape((2, 128, 8, 64)), shape((2, 1024, 2, 64))
  bias = jax.ShapeDtypeStruct((2, 1024, 2), jnp.float32)

  def run(q, k, bias, offset):
    options = dict(window=window, key_bias_BSK=bias, implementation="cudnn")
    return chunk_attention(q, k, k, offset, **options)

  traced = jax.jit(run).trace(q, k, bias, jax.ShapeDtypeStruct((), jnp.int32))
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("custom_call @__cudnn$fmhaSoftmax") == calls
  assert text.count("PADDING") == calls - 1  # keys before the chunk, as many as there are
