"""The kernel that makes lists of single tokens; all of its numbers are exact in float32."""

import functools

import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_block_top
from pallas_kernels.block_selection import mosaic_gpu_token, xla_token
from pallas_kernels.block_selection import pooling as poolings
from pallas_kernels.block_selection.problem import check_rules, make_rules

INFLLM = dict(num_blocks=64, num_initial=1, num_local=16, pooling=poolings.infllm_v2(64))
# Keys that there is room for, query heads of a key head, block size, rules.
CASES = {
  "infllmv2": (65_728, 16, 64, INFLLM),
  "nosa": (65_728, 16, 64, INFLLM | dict(num_by_query=33)),
  "dma": (16_384, 16, 64, INFLLM | dict(num_by_query=17)),
  "nsa": (5_000, 3, 64, dict(num_blocks=16, pooling=poolings.nsa_windows(64, 32, 16))),
  "moba": (8_192, 1, 16, dict(num_blocks=600)),
  "half_local": (3_000, 2, 16, dict(num_blocks=40, rule="half_local")),
  "half_local_of_2": (300, 2, 16, dict(num_blocks=2, rule="half_local")),
  "no_rest_by_key": (3_000, 2, 64, INFLLM | dict(num_blocks=32, num_by_query=32)),
  "many_blocks": (2**20, 2, 64, dict(num_blocks=64, num_initial=1)),
  "everything": (500, 2, 64, INFLLM | dict(num_by_query=40)),
}
NUM_ROWS, NUM_HEADS = 9, 2


def make(name):
  """Probabilities, scores and positions, and what lists take besides."""
  length, g, size, given = CASES[name]
  given = (
    dict(rule="exact", num_initial=0, num_local=1, pooling=None, num_by_query=None) | given
  )
  rules = make_rules(block_size=size, scale=1.0, **given)
  has_scores = given["num_by_query"] is not None
  check_rules(rules, given["num_by_query"], has_key_scores=has_scores)
  rng, num_windows = np.random.default_rng(0), rules.pooling.num_windows(length)
  position = rng.integers(0, length, NUM_ROWS)
  position[:3] = 0, size * rules.num_blocks + 1, length - 1
  position[3:6] = size - 1, 2 * size, 3 * size - 1
  position = np.minimum(position, length - 1)
  # A row that is full is given tokens all the same.
  position[6] = length + size
  windows = scores = None
  if rules.ranks_by_query:
    # A few different numbers, so that many are equal.
    windows = rng.integers(0, 32, (NUM_ROWS, NUM_HEADS, g, num_windows)) / 1024
    last = np.arange(num_windows) * rules.pooling.stride + rules.pooling.size - 1
    windows = np.where(last <= position[:, None, None, None], windows, 0).astype(np.float32)
  if has_scores:
    scores = rng.integers(-2000, 2000, (NUM_ROWS, NUM_HEADS, num_windows + 3)) / 256
    scores = np.where(rng.random(scores.shape) < 0.3, -np.inf, scores).astype(np.float32)
  num_blocks = -(-length // size)
  return (windows, scores, jnp.asarray(position, jnp.int32)), (rules, num_blocks, NUM_HEADS)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_it_lists_what_xla_does(name):
  arrays, sizes = make(name)
  found, expected = (
    np.asarray(jax.jit(lambda *arrays, lists=lists: lists(*arrays, *sizes))(*arrays))
    for lists in (mosaic_gpu_token.lists, xla_token.lists)
  )
  rules = sizes[0]
  forced = rules.num_initial + rules.num_local
  np.testing.assert_array_equal(found[..., :forced], expected[..., :forced])
  for begin, end in ((forced, rules.num_by_query), (rules.num_by_query, rules.num_blocks)):
    part, right = (x[..., begin:end] for x in (found, expected))
    np.testing.assert_array_equal(np.sort(part, axis=-1), np.sort(right, axis=-1))
    if rules.rule == "exact":
      steps = np.diff(np.where(part < 0, 2**30, part), axis=-1)
      assert (steps >= 0).all()


@pytest.mark.parametrize("name", CASES)
def test_what_is_promised_is_lowered_for_cuda(name):
  arrays, sizes = make(name)
  rules, num_blocks, _ = sizes
  shape = NUM_ROWS, NUM_HEADS, CASES[name][1], rules.pooling.num_windows(CASES[name][0])
  assert mosaic_gpu_token.why_not(shape, num_blocks) is None
  lowered = export.export(
    jax.jit(lambda *arrays: mosaic_gpu_token.lists(*arrays, *sizes)),
    platforms=["cuda"],
    disabled_checks=[export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
  )(*arrays)
  assert lowered.mlir_module().count("custom_call @mosaic_gpu_v2") == 1
  assert lowered.out_avals[0].shape == (NUM_ROWS, NUM_HEADS, rules.num_blocks)


def test_limits_are_told_and_lowered():
  why_not = mosaic_gpu_token.why_not
  assert "1 to 50,000 windows of a row, not 50,001" in why_not((1, 1, 1, 50_001), 9)
  assert "1 to 50,000 windows of a row, not 0" in why_not((1, 1, 1, 0), 9)
  assert "at most 16,384 blocks of a row, not 16,385" in why_not((1, 1, 1, 9), 16_385)
  assert "fewer than 2**31" in why_not((2**10, 2, 2**10, 1024), 9)
  shape = 1, 1, 1, 50_000
  assert why_not(shape, mosaic_block_top.MOST_KEYS) is None
  rules = make_rules(
    block_size=64,
    num_blocks=64,
    num_by_query=None,
    pooling=poolings.Pooling(16, 16, 0, 4),
    rule="exact",
    scale=1.0,
    num_initial=0,
    num_local=1,
  )
  run = functools.partial(
    mosaic_gpu_token.lists, rules=rules, num_blocks=mosaic_block_top.MOST_KEYS, num_heads=1
  )
  export.export(
    jax.jit(run),
    platforms=["cuda"],
    disabled_checks=[export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
  )(jnp.zeros(shape), None, jnp.zeros(1, jnp.int32))
