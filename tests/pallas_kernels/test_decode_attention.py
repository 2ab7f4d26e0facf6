"""Attention of one query per row to pages: definition, XLA's path, Hopper kernel, choice.

Where there is no GPU, the kernel runs in Pallas' interpreter, each warp a thread, and every
shape that is promised is lowered for CUDA; see `test_mosaic_gpu`.
"""

import functools
import inspect

import jax
from jax import export
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import choose_decode_attention, decode_attention, devices
from pallas_kernels.decode_attention import (
  mosaic_gpu,
  mosaic_gpu_list,
  mosaic_gpu_shape,
  xla,
)
from pallas_kernels.decode_attention.problem import Problem
from tests.pallas_kernels import problems


def make(b, k, g, d, p, x, m, *, bias=False, seed=0, dtype=jnp.float32) -> dict:
  """Arguments of values that bfloat16 can hold; lists and ranges of every kind.

  Lists hold empty slots and pages that are not there, between those that are, and share pages
  with each other; ranges are whole, cut at either end, empty, inverted, or run over a page.
  """
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32).astype(jnp.bfloat16).astype(dtype)

  order = np.stack([rng.permutation(p) for _ in range(b * k)]).reshape(b, k, p)
  pages = np.pad(order, [(0, 0), (0, 0), (0, max(0, m - p))], constant_values=-1)[..., :m]
  other = rng.choice([-1, -7, p, p + 3], size=(b, k, m))
  pages = np.where(rng.random((b, k, m)) < 0.25, other, pages)
  begin = rng.choice([0, 0, 0, 1, x // 2, x - 1, -3], size=(b, k, m))
  end = rng.choice([x, x, x, x - 1, x // 2 + 1, 1, 0, x + 5], size=(b, k, m))
  return dict(
    q_BHD=draw(b, k * g, d),
    k_PXD=draw(p, x, d),
    v_PXD=draw(p, x, d),
    pages_BKM=jnp.asarray(pages, jnp.int32),
    begin_BKM=jnp.asarray(begin, jnp.int32),
    end_BKM=jnp.asarray(end, jnp.int32),
    key_bias_PX=jnp.asarray(rng.normal(size=(p, x)), jnp.float32) if bias else None,
  )


def keys_read(arguments, row, key_head) -> list[tuple[int, int]]:
  """Page and number of every key."""
  p, x, _ = arguments["k_PXD"].shape
  lists = (
    np.asarray(arguments[n][row, key_head]) for n in ("pages_BKM", "begin_BKM", "end_BKM")
  )
  return [
    (page, i)
    for page, begin, end in zip(*lists, strict=True)
    if 0 <= page < p
    for i in range(x)
    if begin <= i < end
  ]


def by_hand(arguments):
  """One query at a time, in float64."""
  q, k, v = (np.asarray(arguments[n], np.float64) for n in ("q_BHD", "k_PXD", "v_PXD"))
  (b, h, d), num_kv = q.shape, arguments["pages_BKM"].shape[1]
  bias = arguments["key_bias_PX"]
  out, lse = np.zeros((b, h, d)), np.full((b, h), -np.inf)
  for row in range(b):
    for head in range(h):
      keys = keys_read(arguments, row, head // (h // num_kv))
      if not keys:
        continue
      places = tuple(np.array(keys).T)
      scores = k[places] @ q[row, head] * d**-0.5
      if bias is not None:
        scores += np.asarray(bias, np.float64)[places]
      weights = np.exp(scores - scores.max())
      out[row, head] = weights @ v[places] / weights.sum()
      lse[row, head] = scores.max() + np.log(weights.sum())
  return out, lse


@functools.partial(jax.jit, static_argnames="implementation")
def attend(arguments, implementation=None):
  return decode_attention(**arguments, implementation=implementation)


def in_dtype(arguments, dtype):
  arrays = {name: arguments[name].astype(dtype) for name in ("q_BHD", "k_PXD", "v_PXD")}
  return arguments | arrays


SHAPES = {  # B, K, G, D, P, X, M, and extras
  "one_head": ((3, 2, 1, 16, 9, 8, 7), {}),
  "three_heads": ((2, 2, 3, 16, 9, 8, 12), dict(bias=True)),
  "sixteen_heads": ((3, 1, 16, 64, 12, 16, 5), {}),
  "thirty_two_heads": ((2, 2, 32, 16, 7, 16, 4), dict(bias=True)),
  "nobody_reads_much": ((4, 3, 2, 8, 5, 4, 1), {}),
}


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", SHAPES)
def test_it_is_its_definition(name, implementation):
  case, extras = SHAPES[name]
  arguments = make(*case, **extras)
  out, lse = by_hand(arguments)
  actual = attend(arguments, implementation)
  np.testing.assert_allclose(actual[0], out, atol=2e-6)
  np.testing.assert_allclose(actual[1], lse, atol=2e-6)


def poisoned(arguments):
  """With NaN wherever no row reads."""
  (p, x, _), (b, k, _) = arguments["k_PXD"].shape, arguments["pages_BKM"].shape
  is_read = np.zeros((p, x), bool)
  for row in range(b):
    for head in range(k):
      for place in keys_read(arguments, row, head):
        is_read[place] = True
  return poisoned_but(arguments, is_read)


def poisoned_but(arguments, is_read):
  poison = {
    name: jnp.where(is_read[..., None], arguments[name], jnp.nan) for name in ("k_PXD", "v_PXD")
  }
  if arguments["key_bias_PX"] is not None:
    poison["key_bias_PX"] = jnp.where(is_read, arguments["key_bias_PX"], jnp.nan)
  return arguments | poison


def plain(arguments):
  """What one would write without thinking, every product rounded to the input's dtype."""
  q, k, v = (arguments[n] for n in ("q_BHD", "k_PXD", "v_PXD"))
  (b, h, d), (p, x, _), num_kv = q.shape, k.shape, arguments["pages_BKM"].shape[1]
  seen = np.zeros((b, num_kv, p, x), bool)
  for row in range(b):
    for head in range(num_kv):
      for place in keys_read(arguments, row, head):
        seen[row, head, *place] = True
  logits = jnp.einsum("bkgd,pxd->bkgpx", q.reshape(b, num_kv, -1, d), k).astype(jnp.float32)
  logits *= d**-0.5
  if arguments["key_bias_PX"] is not None:
    logits += arguments["key_bias_PX"][None, None, None]
  logits = jnp.where(seen[:, :, None], logits, -jnp.inf)
  lse = jax.nn.logsumexp(logits, axis=(-2, -1))
  weights = jnp.exp(logits - jnp.where(jnp.isneginf(lse), 0.0, lse)[..., None, None])
  out = jnp.einsum("bkgpx,pxd->bkgd", weights.astype(v.dtype), v)
  return out.reshape(b, h, d), lse.reshape(b, h)


def assert_matches_reference(arguments, actual):
  """Of arguments in float32, and results in bfloat16."""
  exact, low = attend(arguments, "reference"), plain(in_dtype(arguments, jnp.bfloat16))
  assert [x.dtype for x in actual] == [jnp.bfloat16, jnp.float32]
  for name, *values in zip(("out", "lse"), actual, low, exact, strict=True):
    problems.assert_no_worse(name, *values)


@pytest.mark.parametrize("name", ["three_heads", "sixteen_heads"])
def test_xla_is_as_exact_as_bfloat16_allows(name):
  case, extras = SHAPES[name]
  arguments = make(*case, **extras)
  actual = attend(in_dtype(arguments, jnp.bfloat16), "xla")
  assert_matches_reference(arguments, actual)
  # Scores are never rounded to bfloat16.
  np.testing.assert_allclose(actual[1], attend(arguments, "reference")[1], atol=1e-5)


@pytest.mark.parametrize("slots", [1, 3, 5])
def test_stripes_do_not_change_the_result(slots, monkeypatch):
  case, extras = SHAPES["three_heads"]
  b, k, _, d, _, x, _ = case
  arguments = make(*case, **extras)
  monkeypatch.setattr(xla, "STRIPE_ELEMENTS", slots * b * k * x * d)
  actual = decode_attention(**arguments, implementation="xla")
  for a, w in zip(actual, attend(arguments, "reference"), strict=True):
    np.testing.assert_allclose(a, w, atol=2e-6)


def shapes(b, k, g, d, p, x, m, *, dtype=jnp.bfloat16, bias=False) -> dict:
  page, lists = (jax.ShapeDtypeStruct((p, x, d), dtype), ((b, k, m), jnp.int32))
  return dict(
    q_BHD=jax.ShapeDtypeStruct((b, k * g, d), dtype),
    k_PXD=page,
    v_PXD=page,
    pages_BKM=jax.ShapeDtypeStruct(*lists),
    begin_BKM=jax.ShapeDtypeStruct(*lists),
    end_BKM=jax.ShapeDtypeStruct(*lists),
    key_bias_PX=jax.ShapeDtypeStruct((p, x), jnp.float32) if bias else None,
  )


def test_long_contexts_never_gather_all_keys():
  """96k keys in each of 64 rows: 6 GiB of keys and values, which lie in pages already."""
  compiled = attend.lower(shapes(64, 2, 16, 64, 4, 64, 1536, bias=True), "xla").compile()
  # A stripe's keys and values in bfloat16, the same in float32 on the CPU, and their scores.
  budget = 2 * xla.STRIPE_ELEMENTS * (2 + 4 + 4)
  assert compiled.memory_analysis().temp_size_in_bytes < budget


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_what_is_not_read_may_be_anything(implementation):
  arguments = make(2, 2, 3, 16, 9, 8, 7, bias=True)
  clean = attend(arguments, implementation)
  for row in range(2):
    for head in range(2):
      is_read = np.zeros((9, 8), bool)
      is_read[tuple(np.array(keys_read(arguments, row, head)).T)] = True
      own = row, slice(3 * head, 3 * head + 3)
      actual = attend(poisoned_but(arguments, is_read), implementation)
      for a, w in zip(actual, clean, strict=True):
        np.testing.assert_array_equal(a[own], w[own])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
  "change",
  [dict(pages_BKM=-1), dict(pages_BKM=9), dict(end_BKM=0), dict(begin_BKM=8)],
  ids=lambda change: "_".join(map(str, *change.items())),
)
def test_a_row_that_reads_nothing_gets_zero(change, implementation):
  arguments = make(2, 2, 3, 16, 9, 8, 7, bias=True)
  for name, value in change.items():
    arguments[name] = arguments[name].at[1, 0].set(value)
  out, lse = attend(arguments, implementation)
  np.testing.assert_array_equal(out[1, :3], 0.0)
  np.testing.assert_array_equal(lse[1, :3], -jnp.inf)
  assert jnp.isfinite(lse[1, 3:]).all()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_queries_may_have_a_dtype_of_their_own(implementation):
  arguments = make(2, 2, 3, 16, 9, 8, 7)
  cache = in_dtype(arguments, jnp.bfloat16) | {"q_BHD": arguments["q_BHD"]}
  out, _ = attend(cache, implementation)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, attend(arguments)[0], atol=2e-2)


def test_the_scale_is_a_factor_on_the_scores():
  arguments = make(2, 2, 3, 16, 9, 8, 7)
  wanted = decode_attention(**arguments, implementation="reference")
  doubled = arguments | {"q_BHD": 2.0 * arguments["q_BHD"]}
  for implementation in ("reference", "xla"):
    actual = decode_attention(**doubled, scale=0.125, implementation=implementation)
    for a, w in zip(actual, wanted, strict=True):
      np.testing.assert_allclose(a, w, atol=2e-6)


def test_the_choice_says_what_runs_and_why(monkeypatch):
  arguments = shapes(2, 2, 3, 64, 9, 16, 7)
  choose = functools.partial(choose_decode_attention, **arguments)
  assert choose(implementation="reference").reason == "asked for"
  with pytest.raises(KeyError, match="no implementation 'flash' of decode_attention"):
    inspect.unwrap(choose_decode_attention)(**arguments, implementation="flash")
  if jax.devices()[0].platform == "cpu":
    assert choose().reason == "mosaic_gpu needs a Hopper GPU, this is cpu"
    with pytest.raises(ValueError, match="'strict' cannot run: mosaic_gpu needs a Hopper GPU"):
      choose(implementation="strict")
  monkeypatch.setattr(devices, "why_not_hopper", lambda: None)
  assert choose()[1:] == ("mosaic_gpu", "the first choice")
  assert choose(implementation="strict").backend == "mosaic_gpu"
  assert choose(implementation="mosaic_gpu").backend == "mosaic_gpu"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(dtype=jnp.float32), "takes bfloat16, not float32 and float32"),
    (dict(d=96), r"takes head sizes \(64, 128\), not 96"),
    (dict(x=24), "takes pages of a multiple of 16 keys, not 24"),
    (dict(g=33), "takes up to 32 query heads per key head, not 33"),
  ],
)
def test_what_the_kernel_cannot_take_is_said(change, message, monkeypatch):
  monkeypatch.setattr(devices, "why_not_hopper", lambda: None)
  sizes = dict(b=2, k=2, g=3, d=64, p=9, x=16, m=7) | change
  with pytest.raises(ValueError, match=f"{message}; 'xla' runs anywhere"):
    choose_decode_attention(**shapes(**sizes), implementation="mosaic_gpu")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(v_PXD=((9, 16, 32),)), r"k and v must be \(9, 16, 64\), got .*32\)"),
    (dict(k_PXD=((9, 16, 32),)), r"k and v must be \(9, 16, 64\), got \(9, 16, 32\)"),
    (dict(v_PXD=((9, 16, 64), jnp.float32)), "both .* got bfloat16 and float32"),
    (
      dict(k_PXD=((9, 16, 64), jnp.float16), v_PXD=((9, 16, 64), jnp.float16)),
      "bfloat16 or float32, got float16",
    ),
    (dict(pages_BKM=((3, 2, 7), jnp.int32)), r"pages must be \(2,\) \+ \(K, M\), got \(3, 2"),
    (dict(end_BKM=((2, 2, 6), jnp.int32)), r"one shape, got \(2, 2, 7\), .* \(2, 2, 6\)"),
    (dict(begin_BKM=((2, 2, 7), jnp.int16)), "must be int32, got int32, int16 and int32"),
    (
      dict.fromkeys(("pages_BKM", "begin_BKM", "end_BKM"), ((2, 2, 0), jnp.int32)),
      r"no axis may be empty: .* pages \(2, 2, 0\)",
    ),
    (dict(q_BHD=((2, 5, 64),)), "5 query heads do not group over 2 key heads"),
    (dict(key_bias_PX=((9, 8), jnp.float32)), r"biases of keys must be \(9, 16\), got \(9, 8"),
  ],
)
def test_wrong_input_is_refused(change, message):
  arguments = shapes(2, 2, 3, 64, 9, 16, 7, bias=True)
  for name, (shape, *dtype) in change.items():
    arguments[name] = jax.ShapeDtypeStruct(shape, *dtype or (jnp.bfloat16,))
  # Unwrapped, since the hook that checks array types would see mismatched shapes first.
  with pytest.raises(ValueError, match=message):
    inspect.unwrap(choose_decode_attention)(**arguments)


@functools.partial(jax.jit, static_argnames="interpret")
def attend_in_kernel(arguments, interpret=None):
  scale = arguments["q_BHD"].shape[-1] ** -0.5
  return mosaic_gpu.decode_attention(Problem(**arguments), scale, interpret)


def with_growing_scores(arguments):
  """By hundreds along the lists: the maximum has to follow, more than once."""
  growth = jnp.linspace(1.0, 100.0, len(arguments["k_PXD"]))[:, None, None]
  keys = (growth * arguments["k_PXD"]).astype(jnp.bfloat16).astype(jnp.float32)
  return arguments | {"k_PXD": keys, "pages_BKM": jnp.sort(arguments["pages_BKM"])}


@pytest.fixture
def interpret():
  yield plgpu.InterpretGPUParams(detect_races=True)
  gpu_callbacks.reset_gpu_interpret_mode_state()


INTERPRETED = {  # B, K, G, D, P, X, M, multiprocessors, and extras
  "rings_go_round": ((1, 2, 16, 64, 40, 16, 36), 1, {}),
  "blocks_share_a_row": ((1, 2, 3, 64, 6, 48, 5), 2, dict(bias=True)),
  "two_units": ((1, 1, 32, 128, 8, 32, 6), 1, dict(bias=True)),
}


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_the_kernel_is_right_and_has_no_races(name, interpret, monkeypatch):
  case, multiprocessors, extras = INTERPRETED[name]
  monkeypatch.setattr(devices, "num_multiprocessors", lambda: multiprocessors)
  # Lists are looked at more than once.
  monkeypatch.setattr(mosaic_gpu_list, "LANES", 4)
  arguments = make(*case, **extras)
  if name == "rings_go_round":
    arguments = with_growing_scores(arguments)
    # One of the two rows reads nothing.
    arguments["pages_BKM"] = arguments["pages_BKM"].at[0, 1].set(-1)
  low = poisoned(in_dtype(arguments, jnp.bfloat16))
  actual = attend_in_kernel(low, interpret)
  assert not gpu_callbacks.get_races().races_found
  assert_matches_reference(arguments, actual)


PROMISED = [  # heads, head size, page size, bias
  *((heads, 64, 16, False) for heads in (1, 3, 16, 17, 32)),
  *((16, 64, size, True) for size in (16, 48, 128)),
  *((16, 128, size, True) for size in range(16, 144, 16)),
  (16, 128, 64, False),
  (32, 128, 64, True),
]


@pytest.mark.parametrize(("g", "d", "x", "bias"), PROMISED)
def test_what_is_promised_is_lowered_for_cuda(g, d, x, bias):
  lowered = export.export(
    attend_in_kernel,
    platforms=["cuda"],
    disabled_checks=[export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
  )(shapes(3, 2, g, d, 9, x, 7, bias=bias))
  assert lowered.mlir_module().count("custom_call @mosaic_gpu_v2") == 1


@pytest.mark.parametrize(
  ("num_rows", "num_pieces", "takers", "splits"),
  [
    (2, 6144, 4, 128),  # a long context of one row: a wave of thread blocks, 12 pieces a warp
    (128, 6144, 4, 2),
    (2, 16, 4, 4),  # no more than there are pieces
    (1024, 64, 4, 1),
    (140, 4096, 4, 3),  # two waves, of which the second is not half empty
  ],
)
def test_thread_blocks_are_as_many_as_finish_soonest(num_rows, num_pieces, takers, splits):
  assert mosaic_gpu_shape.num_splits(num_rows, num_pieces, takers, 132) == splits


ON_GPU = {  # B, K, G, D, P, X, M, and extras
  "ssa": ((32, 2, 16, 64, 200, 16, 16), {}),
  "nosa": ((4, 2, 16, 128, 90, 64, 64), dict(bias=True)),
  "long": ((1, 2, 16, 64, 600, 64, 600), dict(bias=True)),
  "few_slots": ((1, 1, 16, 128, 9, 16, 1), {}),
  "many_rows": ((150, 2, 4, 64, 50, 32, 6), {}),
  **{
    f"{g}_heads_of_{d}": ((3, 2, g, d, 40, 16, 33), dict(bias=True))
    for g in (1, 2, 3, 4, 8, 16, 17, 32)
    for d in (64, 128)
  },
  **{
    f"pages_of_{size}_at_{d}": ((3, 2, 16, d, 12, size, 10), {})
    for size in range(16, 144, 16)
    for d in (64, 128)
  },
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu_the_kernel_matches_the_reference(name):
  case, extras = ON_GPU[name]
  arguments = make(*case, **extras)
  low = in_dtype(arguments, jnp.bfloat16)
  actual = attend_in_kernel(low)
  assert_matches_reference(arguments, actual)
  # No sum depends on who came first, and what is not read reaches nothing.
  for again in (low, poisoned(low)):
    for a, w in zip(attend_in_kernel(again), actual, strict=True):
      np.testing.assert_array_equal(a, w)


@pytest.mark.gpu
def test_on_a_gpu_scores_may_grow_along_a_list():
  arguments = with_growing_scores(make(2, 2, 16, 64, 300, 16, 300))
  actual = attend_in_kernel(in_dtype(arguments, jnp.bfloat16))
  assert_matches_reference(arguments, actual)
