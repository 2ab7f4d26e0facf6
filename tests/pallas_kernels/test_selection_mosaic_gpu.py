"""The Hopper kernel of block selection: interpreted, lowered, and on a GPU.

Where there is no GPU, it runs in Pallas' interpreter of GPU kernels, which finds races,
missing waits and deadlocks; the choice itself, warp-level instructions that the interpreter
does not know, is done there by other means. Every shape that is promised is lowered.
"""

import functools
import re

import jax
from jax import export
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_selection import mosaic_gpu, mosaic_gpu_sizes, plan, xla
from pallas_kernels.block_selection import pooling as poolings
from pallas_kernels.block_selection.problem import Problem, Rules


def make(
  b,
  t,
  h,
  k,
  d,
  block_size,
  m,
  *,
  offset=0,
  ahead=0,
  segments=None,
  given=False,
  seed=0,
  **rules,
):
  s = offset + t + ahead
  keys = jax.random.split(jax.random.key(seed), 2)
  q = jax.random.normal(keys[0], (b, t, h, d)).astype(jnp.bfloat16)
  k = jax.random.normal(keys[1], (b, s, k, d)).astype(jnp.bfloat16)
  if segments is not None:
    rng = np.random.default_rng(seed)
    segments = jnp.asarray(np.cumsum(rng.random((b, s)) < segments, axis=1))
  options = dict(
    block_size=block_size,
    num_blocks=m,
    num_by_query=m,
    num_initial=0,
    num_local=1,
    pooling=poolings.whole_blocks(block_size),
    rule="exact",
    scale=d**-0.5,
  )
  rules = Rules(**options | rules)
  window_keys = None
  if given:
    shape = b, rules.pooling.num_windows(s), *k.shape[2:]
    window_keys = jax.random.normal(jax.random.key(seed + 1), shape)
  return Problem(q, k, jnp.int32(offset), segments, None, window_keys), rules


def later(*case, **extras):
  """A problem that is made when it is asked for."""
  return functools.partial(make, *case, **extras)


def select(choose, problem, rules):
  @jax.jit
  def run(problem):
    bounds = plan.bounds(problem, rules)
    chosen = choose(problem, rules, bounds, plan.spans(bounds, rules))
    return jnp.sort(plan.assemble(chosen, bounds, rules), axis=-1)

  return run(problem)


INTERPRETED = {  # the problem, and how the kernel is laid out
  "several_tiles": (later(1, 77, 16, 2, 64, 8, 4), {}),
  "an_odd_head": (later(1, 40, 3, 1, 64, 8, 3, segments=0.1), {}),
  "segments_of_windows": (
    later(1, 40, 2, 1, 64, 4, 5, num_initial=1, num_local=2, segments=0.005, offset=600),
    dict(segment=64, stages=1, pairs=1),
  ),
  "heads_in_rounds": (
    later(1, 40, 5, 1, 64, 8, 4, pooling=poolings.infllm_v2(8), num_local=2, offset=400),
    dict(segment=128, stages=2, pairs=1),
  ),
  "half_local": (later(1, 40, 2, 1, 128, 8, 4, rule="half_local", offset=30), {}),
  "keys_behind_a_chunk": (later(1, 32, 2, 1, 64, 8, 4, offset=40, ahead=200), {}),
  "keys_of_windows": (later(1, 40, 2, 1, 64, 8, 4, num_initial=1, given=True), {}),
  "weighted_windows": (
    later(1, 40, 2, 1, 64, 8, 3, pooling=poolings.nsa_windows(8, 6, 2), offset=300),
    dict(segment=64, stages=1, pairs=1),
  ),
}


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_it_chooses_as_xla_does_without_races(name, monkeypatch):
  make_problem, layout = INTERPRETED[name]
  problem, rules = make_problem()
  if layout:
    monkeypatch.setattr(mosaic_gpu, "config", lambda *_: mosaic_gpu_sizes.Config(**layout))
  interpret = plgpu.InterpretGPUParams(detect_races=True)
  try:
    lists = select(functools.partial(mosaic_gpu.choose, interpret=interpret), problem, rules)
    assert not gpu_callbacks.get_races().races_found
  finally:
    gpu_callbacks.reset_gpu_interpret_mode_state()
  np.testing.assert_array_equal(lists, select(xla.choose, problem, rules))


PROMISED = [  # heads per key head, D, block_size, M, rules
  (16, 64, 16, 16, {}),
  (32, 64, 32, 32, {}),
  (1, 64, 16, 8, dict(rule="half_local")),
  (16, 64, 16, 16, dict(rule="half_local")),
  (32, 64, 16, 64, {}),
  (32, 128, 64, 64, dict(rule="half_local")),
  (3, 128, 64, 16, {}),
  (32, 128, 128, 4, {}),
  (16, 128, 64, 64, dict(pooling=poolings.infllm_v2(64), num_initial=1, num_local=16)),
  (16, 64, 64, 16, dict(pooling=poolings.nsa_windows(64, 32, 16), num_initial=1, num_local=2)),
]


@pytest.mark.parametrize(
  ("heads", "d", "block_size", "m", "rules"),
  PROMISED,
)
def test_what_is_promised_is_lowered_for_cuda(heads, d, block_size, m, rules):
  small, rules = make(1, 8, heads, 1, d, block_size, m, **rules)
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  q, k = shape((2, 1001, 2 * heads, d)), shape((2, 1064, 2, d))
  segments = jax.ShapeDtypeStruct((2, 1064), jnp.int32)
  assert mosaic_gpu.why_not(small, rules) is None

  def run(q, k, segments, offset):
    return select(mosaic_gpu.choose, Problem(q, k, offset, segments, None), rules)

  lowered = export.export(
    jax.jit(run),
    platforms=["cuda"],
    disabled_checks=[export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
  )(q, k, segments, jax.ShapeDtypeStruct((), jnp.int32))
  assert lowered.mlir_module().count("custom_call @mosaic_gpu_v2") == 1


@pytest.mark.parametrize(
  ("case", "rules", "message"),
  [
    ((1, 16, 2, 1, 96, 8, 2), {}, r"head sizes \(64, 128\), not 96"),
    ((1, 16, 33, 1, 64, 8, 2), {}, "up to 32 query heads per key head, not 33"),
    ((1, 16, 2, 1, 64, 8, 2), dict(pooling=poolings.Pooling(2, 1, 0, 9)), "up to 8 windows"),
    ((1, 16, 2, 1, 64, 8, 2), dict(pooling=poolings.Pooling(4, 4, 0, 1)), "reach the end"),
    ((1, 16, 16, 1, 64, 8, 512), {}, "no room in shared memory for num_blocks=512"),
  ],
)
def test_what_it_cannot_take_is_said(case, rules, message):
  assert re.search(message, mosaic_gpu.why_not(*make(*case, **rules)))


def test_float32_is_refused():
  problem, rules = make(1, 16, 2, 1, 64, 8, 2)
  problem = problem._replace(q_BTHD=problem.q_BTHD.astype(jnp.float32))
  assert "not float32 and bfloat16" in mosaic_gpu.why_not(problem, rules)


ON_GPU = {
  "ssa": later(2, 2048, 32, 2, 64, 16, 16),
  "many_segments": later(1, 16384, 16, 1, 64, 16, 16),
  "nosa": later(
    1,
    4096,
    32,
    2,
    128,
    64,
    33,
    pooling=poolings.infllm_v2(64),
    num_initial=1,
    num_local=17,
  ),
  "nsa": later(
    2,
    2048,
    16,
    1,
    64,
    64,
    16,
    pooling=poolings.nsa_windows(64, 32, 16),
    num_initial=1,
    num_local=2,
  ),
  "documents": later(2, 1001, 12, 2, 64, 16, 8, segments=0.01, offset=55),
  "two_rounds": later(1, 1000, 32, 1, 128, 32, 8),
  "half_local": later(1, 1024, 8, 2, 64, 16, 16, rule="half_local"),
  "half_local_of_16": later(1, 2048, 32, 2, 64, 16, 16, rule="half_local"),
  "half_local_of_32": later(1, 2048, 32, 1, 128, 64, 16, rule="half_local"),
  "many_blocks_of_32": later(1, 4096, 32, 1, 64, 32, 64),
}


@pytest.mark.parametrize("d", mosaic_gpu.HEAD_DIMS)
@pytest.mark.parametrize("heads", [1, 3, 16, 32])
@pytest.mark.parametrize("num_slots", [32, 64, 128])
@pytest.mark.parametrize("num_spans", [1, 2])
def test_it_fits_in_shared_memory(d, heads, num_slots, num_spans):
  config = mosaic_gpu.config(d, heads, num_slots, num_spans)
  assert 64 <= config.segment <= 512
  pairs = -(-heads // 2)
  sizes = [
    2 * config.pairs * 64 * d,
    2 * 4 * config.stages * 64 * d,
    4 * 32 * (8 + config.segment),
    4 * 64 * num_slots,
    4 * 4 * 2 * min(config.pairs, 3) * 64,
    4 * 64 * pairs,
    4 * 4 * 64,
  ]
  # Less than is left beside barriers, and beside counts and ranges of spans.
  assert sum(sizes) <= (221 - 2 * num_spans) * 1024 - 8


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu_it_chooses_as_xla_does(name):
  """But for scores so close that rounding decides."""
  problem, rules = ON_GPU[name]()
  lists = np.asarray(select(mosaic_gpu.choose, problem, rules))
  expected = np.asarray(select(xla.choose, problem, rules))
  np.testing.assert_array_equal((lists >= 0).sum(-1), (expected >= 0).sum(-1))
  differs = (lists != expected).any(-1)
  assert differs.mean() < 0.01
  keys = poolings.mean_windows(problem.k_BSKD, problem.segments_BS, rules.pooling)
  bounds = plan.bounds(problem, rules)
  num_blocks = -(-problem.k_BSKD.shape[1] // rules.block_size)
  scores = np.asarray(
    xla.scores(problem.q_BTHD, keys.astype(jnp.bfloat16), bounds, rules, num_blocks)
  )
  for place in np.argwhere(differs):
    only = [set(x[tuple(place)]) for x in (lists, expected)]
    row = scores[tuple(place)]
    swapped = [sorted(row[list(a - b)]) for a, b in (only, only[::-1])]
    np.testing.assert_allclose(*swapped, rtol=1e-3, atol=1e-6)


@pytest.mark.gpu
def test_on_a_gpu_equal_scores_go_to_the_lower_block():
  ones = jnp.ones((1, 512, 16, 64), jnp.bfloat16)
  _, rules = make(1, 8, 16, 1, 64, 16, 5)
  problem = Problem(ones, ones[:, :, :1], jnp.int32(0), None, None)
  lists = select(mosaic_gpu.choose, problem, rules)
  np.testing.assert_array_equal(lists[0, -1, 0], [0, 1, 2, 3, 31])
