"""Full attention: its definition, its XLA path, its choice, and cuDNN's packed documents."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import choose_full_attention, full_attention
from pallas_kernels.full_attention import cudnn, xla


def make_segments(rows=2, length=64, num_documents=3, seed=0):
  """A few documents in every row, and padding at the end of the last."""
  rng = np.random.default_rng(seed)
  borders = np.sort(rng.integers(1, length, size=(rows, num_documents - 1)), axis=1)
  segments = 1 + (np.arange(length)[None, :, None] >= borders[:, None, :]).sum(-1)
  segments[-1, -5:] = 0
  return jnp.asarray(segments)


def make_problem(b=2, t=64, h=4, k=2, d=8, dtype=jnp.float32, seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  shapes = (b, t, h, d), (b, t, k, d), (b, t, k, d)
  return [
    jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)
  ]


def make_bias(b=2, t=64, k=2, seed=5):
  return 2.0 * jax.random.normal(jax.random.key(seed), (b, t, k))


def expected(q, k, v, segments=None, window=None, bias=None):
  return full_attention(
    q,
    k,
    v,
    segments_BT=segments,
    max_documents=8,
    window=window,
    key_bias_BTK=bias,
    implementation="reference",
  )


@pytest.mark.parametrize("elements", [2**26, 2 * 4 * 64 * 24, 1], ids=["whole", "24", "one"])
def test_stripes_do_not_change_the_result(elements, monkeypatch):
  monkeypatch.setattr(xla, "STRIPE_ELEMENTS", elements)
  q, k, v = make_problem()
  segments = make_segments()

  def total(q, k, v, run):
    return (run(q, k, v) ** 2).sum(), run(q, k, v)

  actual, wanted = (
    jax.jit(jax.grad(lambda q, k, v, run=run: total(q, k, v, run), (0, 1, 2), has_aux=True))(
      q, k, v
    )
    for run in (
      lambda q, k, v: full_attention(q, k, v, segments_BT=segments, max_documents=4),
      lambda q, k, v: expected(q, k, v, segments),
    )
  )
  for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, w, atol=1e-5)


@pytest.mark.parametrize("least", [128, 24, 1], ids=["whole", "24", "one"])
@pytest.mark.parametrize("window", [1, 7, 63, 64, 100])
def test_a_window_is_its_definition(window, least, monkeypatch):
  """Values and gradients, with stripes longer and shorter than the window."""
  monkeypatch.setattr(xla, "LEAST_STRIPE", least)
  monkeypatch.setattr(xla, "STRIPE_ELEMENTS", 2 * 4 * 2 * least * max(window, least))
  q, k, v = make_problem()
  segments = make_segments()

  def run(attend):
    def total(q, k, v):
      out = attend(q, k, v)
      return (out**2).sum(), out

    return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v)

  actual = run(
    lambda q, k, v: full_attention(
      q, k, v, segments_BT=segments, max_documents=4, window=window
    )
  )
  wanted = run(lambda q, k, v: expected(q, k, v, segments, window))
  for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, w, atol=1e-5)


def test_a_window_takes_no_memory_of_the_whole_row():
  t = 65536
  q = jax.ShapeDtypeStruct((1, t, 2, 8), jnp.float32)
  k = jax.ShapeDtypeStruct((1, t, 1, 8), jnp.float32)

  def loss(q, k):
    return full_attention(q, k, k, window=256).sum()

  compiled = jax.jit(jax.grad(loss, (0, 1))).lower(q, k).compile()
  # Scores of one query in 64 against all keys would take as much.
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * t * t * 4 / 64


def test_without_segments_it_is_causal_attention():
  q, k, v = make_problem()
  actual = full_attention(q, k, v)
  np.testing.assert_allclose(actual, expected(q, k, v), atol=1e-6)


def test_long_rows_never_hold_all_scores():
  t = 16384
  q = jax.ShapeDtypeStruct((1, t, 8, 8), jnp.float32)
  k = jax.ShapeDtypeStruct((1, t, 1, 8), jnp.float32)
  segments = jax.ShapeDtypeStruct((1, t), jnp.int32)
  bias = jax.ShapeDtypeStruct((1, t, 1), jnp.float32)

  def loss(q, k, segments, bias):
    options = dict(segments_BT=segments, max_documents=4, key_bias_BTK=bias)
    return full_attention(q, k, k, **options).sum()

  compiled = jax.jit(jax.grad(loss, (0, 1, 3))).lower(q, k, segments, bias).compile()
  # One array of all scores would take 8 GiB.
  assert compiled.memory_analysis().temp_size_in_bytes < 8 * t * t * 4 / 4


@pytest.mark.parametrize("elements", [2**26, 2 * 4 * 64 * 24], ids=["whole", "24"])
def test_biases_of_keys_and_their_gradients_match_the_definition(elements, monkeypatch):
  monkeypatch.setattr(xla, "STRIPE_ELEMENTS", elements)
  arrays, segments = (*make_problem(), make_bias()), make_segments()
  dout = jax.random.normal(jax.random.key(7), arrays[0].shape)

  def run(q, k, v, bias):
    return full_attention(q, k, v, segments_BT=segments, max_documents=4, key_bias_BTK=bias)

  def outputs(function):
    out, vjp = jax.vjp(jax.jit(function), *arrays)
    return out, *vjp(dout)

  wanted = outputs(lambda q, k, v, bias: expected(q, k, v, segments, bias=bias))
  assert jnp.abs(wanted[-1]).max() > 0.1  # the bias matters
  for a, w in zip(outputs(run), wanted, strict=True):
    np.testing.assert_allclose(a, w, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("d", [64, 128])
def test_further_channels_add_the_bias_in_full(d, dtype):
  """What cuDNN multiplies, added up in float32: as exact as a bias in float32."""
  q, k, v = make_problem(d=d, dtype=dtype)
  bias, scale = make_bias(), d**-0.5

  def scores(q, k):
    q, k = (x.astype(jnp.float32) for x in (q, k))
    return scale * jnp.einsum("bthd,bshd->bhts", q[:, :, ::2], k, precision="highest")

  wide = jax.jit(lambda *x: cudnn.fold(*x, scale))(q, k, v, bias)
  assert [x.shape[-1] for x in wide] == [d + 8] * 3
  assert [x.dtype for x in wide] == [dtype] * 3
  added = scores(*wide[:2]) - scores(q, k)
  wanted = bias.transpose(0, 2, 1)[:, :, None]
  np.testing.assert_allclose(added, jnp.broadcast_to(wanted, added.shape), atol=1e-5)
  np.testing.assert_array_equal(wide[2][..., d:], 0)
  np.testing.assert_array_equal(wide[2][..., :d], v)


def test_the_gradient_of_a_folded_bias_is_that_of_the_scores():
  q, k, v = make_problem(t=16)
  dscores = jax.random.normal(jax.random.key(3), (2, 2, 16, 16))

  def total(bias):
    wide_q, wide_k, _ = cudnn.fold(q, k, v, bias, 0.25)
    return (0.25 * jnp.einsum("bthd,bshd->bhts", wide_q[:, :, ::2], wide_k) * dscores).sum()

  gradient = jax.grad(total)(make_bias(t=16))
  np.testing.assert_allclose(gradient, dscores.sum(2).transpose(0, 2, 1), rtol=1e-4, atol=1e-5)


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
  actual = cudnn.document_offsets(jnp.asarray([segments]), max_documents)
  np.testing.assert_array_equal(actual[0][0], lengths)
  np.testing.assert_array_equal(actual[1][0], offsets)
  assert bool(actual[2][0]) == has_room


class FakeDevice:
  """What `cudnn.why_not` looks at."""

  platform = "gpu"
  device_kind = "NVIDIA Test"

  def __init__(self, compute_capability):
    self.compute_capability = compute_capability


def shapes(*, head_dim=64, dtype=jnp.bfloat16, documents=False, bias=False):
  q, k = (jax.ShapeDtypeStruct((2, 64, heads, head_dim), dtype) for heads in (4, 2))
  segments = jax.ShapeDtypeStruct((2, 64), jnp.int32) if documents else None
  bias = jax.ShapeDtypeStruct((2, 64, 2), jnp.float32) if bias else None
  options = dict(max_documents=4 if documents else None, key_bias_BTK=bias)
  return (q, k, k), dict(segments_BT=segments, **options)


@pytest.mark.parametrize(
  ("capability", "problem", "said"),
  [
    ("9.0", dict(documents=True), "cudnn (the first choice)"),
    ("9.0", dict(head_dim=256), "cudnn (the first choice)"),
    ("9.0", dict(dtype=jnp.float16), "cudnn (the first choice)"),
    ("8.0", dict(head_dim=128), "cudnn (the first choice)"),
    ("9.0", dict(head_dim=248, bias=True), "cudnn (the first choice)"),
    (
      "9.0",
      dict(head_dim=256, bias=True),
      "xla (cudnn takes head sizes, with biases of keys, up to 248 in steps of 8, not 256)",
    ),
    ("9.0", dict(dtype=jnp.float32), "xla (cudnn takes bfloat16 or float16, not float32)"),
    ("9.0", dict(head_dim=12), "xla (cudnn takes head sizes up to 256 in steps of 8, not 12)"),
    (
      "8.0",
      dict(head_dim=256),
      "xla (cudnn takes head sizes up to 128 in steps of 8, not 256)",
    ),
    (
      "8.6",
      dict(documents=True),
      "xla (cudnn separates packed documents from compute capability 9.0 on, NVIDIA Test has "
      "8.6)",
    ),
    ("7.5", {}, "xla (cudnn needs compute capability 8.0, NVIDIA Test has 7.5)"),
  ],
)
def test_gpus_take_cudnn_where_it_can_run(capability, problem, said, monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda: [FakeDevice(capability)])
  arrays, options = shapes(**problem)
  assert str(choose_full_attention(*arrays, **options)) == f"full_attention: {said}"


def test_one_document_a_row_needs_no_separation(monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda: [FakeDevice("8.0")])
  arrays, options = shapes(documents=True)
  assert choose_full_attention(*arrays, **options).backend == "xla"
  assert choose_full_attention(*arrays, **options | dict(max_documents=1)).backend == "cudnn"


def test_a_window_has_a_name_of_its_own(monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda: [FakeDevice("9.0")])
  arrays, options = shapes(documents=True)
  said = str(choose_full_attention(*arrays, **options, window=8))
  assert said == "sliding_window_attention: cudnn (the first choice)"


def test_where_there_is_no_gpu_strict_and_cudnn_are_refused():
  if jax.devices()[0].platform == "gpu":
    pytest.skip("this machine has a GPU")
  arrays, _ = shapes()
  why = "cudnn needs an NVIDIA GPU, this is cpu"
  assert choose_full_attention(*arrays) == ("full_attention", "xla", why)
  assert choose_full_attention(*arrays, implementation="xla").reason == "asked for"
  for implementation in ("cudnn", "strict"):
    with pytest.raises(ValueError, match=f"='{implementation}' cannot run: {why}; 'xla' runs"):
      choose_full_attention(*arrays, implementation=implementation)
    with pytest.raises(ValueError, match=f"='{implementation}' cannot run: {why}"):
      full_attention(*make_problem(), implementation=implementation)
  # Unwrapped, since the hook that checks types would see the unknown name first.
  with pytest.raises(KeyError, match="no implementation 'flash' of full_attention"):
    inspect.unwrap(choose_full_attention)(*make_problem(), implementation="flash")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(q=(1, 32, 3, 8)), "3 query heads do not group over 2"),
    (dict(v=(1, 16, 2, 8)), "k and v must be"),
    (dict(dtype=jnp.bfloat16), "share a dtype"),
    (dict(bias=(1, 32, 4)), r"biases of keys must be \(1, 32, 2\), got \(1, 32, 4\)"),
    (dict(segments=(1, 16)), "segments must be"),
    (dict(segments=(1, 32), max_documents=None), "max_documents=None must be at least 1"),
    (dict(segments=(1, 32), max_documents=0), "max_documents=0 must be at least 1"),
    (dict(window=0), "window=0 must be at least 1, the query's own key"),
  ],
)
def test_wrong_input_is_refused(change, message):
  q = jnp.ones(change.get("q", (1, 32, 4, 8)), change.get("dtype", jnp.float32))
  k, v = jnp.ones((1, 32, 2, 8)), jnp.ones(change.get("v", (1, 32, 2, 8)))
  segments = jnp.ones(change["segments"], jnp.int32) if "segments" in change else None
  bias = jnp.ones(change["bias"]) if "bias" in change else None
  max_documents = change.get("max_documents", 4)
  # Unwrapped, since the hook that checks array types would see mismatched shapes first.
  choose = inspect.unwrap(choose_full_attention)
  with pytest.raises(ValueError, match=message):
    choose(
      q,
      k,
      v,
      segments_BT=segments,
      max_documents=max_documents,
      window=change.get("window"),
      key_bias_BTK=bias,
    )


@pytest.mark.parametrize("window", [None, 1, 5])
def test_reference_is_the_definition(window):
  """One query and one head at a time in numpy."""
  q, k, v = make_problem(t=24)
  segments, bias = make_segments(length=24), make_bias(t=24)
  out = expected(q, k, v, segments, window, bias)
  q, k, v, bias = (np.asarray(x, np.float64) for x in (q, k, v, bias))
  for row, query, head in np.ndindex(2, 24, 4):
    first = 0 if window is None else max(0, query + 1 - window)
    seen = [s for s in range(first, query + 1) if segments[row, s] == segments[row, query]]
    scores = k[row, seen, head // 2] @ q[row, query, head] * 8**-0.5
    scores += bias[row, seen, head // 2]
    weights = np.exp(scores) / np.exp(scores).sum()
    wanted = weights @ v[row, seen, head // 2]
    np.testing.assert_allclose(out[row, query, head], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("window", [None, 1, 100, 128, 511])
@pytest.mark.parametrize("max_documents", [1, 3, 8])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_cudnn_keeps_documents_apart(head_dim, max_documents, window, has_bias):
  """Values and gradients of the packed form against masked attention in float32."""
  q, k, v = make_problem(b=3, t=512, h=8, k=2, d=head_dim, dtype=jnp.bfloat16)
  segments = make_segments(rows=3, length=512, num_documents=max(1, max_documents - 1))
  if max_documents == 1:
    segments = jnp.ones((3, 512), jnp.int32)
  dout = jax.random.normal(jax.random.key(9), q.shape)
  inputs = q, k, v, make_bias(b=3, t=512) if has_bias else None

  def run(q, k, v, bias):
    return full_attention(
      q,
      k,
      v,
      segments_BT=segments,
      max_documents=max_documents,
      window=window,
      key_bias_BTK=bias,
      implementation="cudnn",
    )

  out, vjp = jax.vjp(jax.jit(run), *inputs)
  exact_inputs = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
  wanted, exact_vjp = jax.vjp(
    lambda q, k, v, bias: expected(q, k, v, segments, window, bias), *exact_inputs
  )
  pairs = zip((out, *vjp(dout.astype(out.dtype))), (wanted, *exact_vjp(dout)), strict=True)
  for actual, exact in pairs:
    if exact is None:  # there is no bias
      continue
    # A query that reads one key alone pushes on nothing but its value.
    size = jnp.linalg.norm(dout if window == 1 else exact)
    assert jnp.linalg.norm(actual.astype(jnp.float32) - exact) < 1e-2 * size


@pytest.mark.parametrize("documents", [True, False], ids=["documents", "one"])
def test_rows_of_odd_length_are_made_even_for_cudnn(documents, monkeypatch):
  """What JAX hands to cuDNN has an even number of positions; here XLA runs in its place."""

  def attend(q, k, v, segments, max_documents, window, scale):
    assert q.shape[1] == k.shape[1] == v.shape[1] == 38
    assert scale == q.shape[-1] ** -0.5
    return xla.full_attention(q, k, v, segments, max_documents, window, None)

  monkeypatch.setattr(cudnn, "_attend", attend)
  q, k, v = make_problem(t=37)
  segments = make_segments(length=37) if documents else None
  out = cudnn.full_attention(q, k, v, segments, 8, 9, None)
  np.testing.assert_allclose(out, expected(q, k, v, segments, 9), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("documents", [True, False], ids=["documents", "one"])
def test_cudnn_takes_rows_of_odd_length(documents, has_bias):
  q, k, v = make_problem(t=333, h=4, d=64, dtype=jnp.bfloat16)
  segments = make_segments(length=333) if documents else None
  bias = make_bias(t=333) if has_bias else None

  def run(q, k, v):
    options = dict(segments_BT=segments, max_documents=4, key_bias_BTK=bias)
    return full_attention(q, k, v, **options, implementation="cudnn")

  out, vjp = jax.vjp(jax.jit(run), q, k, v)
  exact = [x.astype(jnp.float32) for x in (q, k, v)]
  wanted, exact_vjp = jax.vjp(lambda q, k, v: expected(q, k, v, segments, bias=bias), *exact)
  dout = jax.random.normal(jax.random.key(9), out.shape, out.dtype)
  pairs = zip((out, *vjp(dout)), (wanted, *exact_vjp(dout.astype(jnp.float32))), strict=True)
  for actual, exact in pairs:
    error = jnp.linalg.norm(actual.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert error < 1e-2


@pytest.mark.gpu
def test_cudnn_refuses_more_documents_than_it_was_told_of():
  q, k, v = make_problem(b=1, t=128, h=4, k=2, d=64, dtype=jnp.bfloat16)
  segments = 1 + jnp.arange(128)[None] // 16
  out = full_attention(q, k, v, segments_BT=segments, max_documents=4, implementation="cudnn")
  assert jnp.isnan(out).all()


@pytest.mark.gpu
def test_a_hopper_takes_cudnn():
  for dtype, backend in ((jnp.bfloat16, "cudnn"), (jnp.float32, "xla")):
    arrays, options = shapes(dtype=dtype, documents=True)
    assert choose_full_attention(*arrays, **options).backend == backend
