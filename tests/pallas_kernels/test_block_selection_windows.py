"""Windows of keys that speak for blocks: which, with what weight, and what they are made of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.block_selection import plan
from pallas_kernels.block_selection import pooling as poolings
from pallas_kernels.block_selection.problem import Problem, Rules
from tests.pallas_kernels.selection_by_hand import (
  IMPLEMENTATIONS,
  as_sets,
  documents,
  expected_lists,
  make_problem,
  select_blocks,
)


def test_windows_weigh_as_many_strides_as_they_share_with_the_block():
  """NSA's equation 9, counting from 1 as the paper does: sum over m < l'/d and n < l/d of
  window l'/d j - m - n."""
  for block_size, size, stride in (
    (64, 32, 16),
    (16, 32, 16),
    (8, 12, 4),
    (8, 8, 8),
    (4, 4, 1),
  ):
    pooling = poolings.nsa_windows(block_size, size, stride)
    per_block = block_size // stride
    counted = {}
    for m in range(per_block):
      for n in range(size // stride):
        counted[per_block * 1 - m - n] = counted.get(per_block * 1 - m - n, 0) + 1
    weights = pooling.weights or (1,)
    # Window i of the paper is window i - 1 here, and its first block is block 0.
    ours = {pooling.first + i + 1: weight for i, weight in enumerate(weights)}
    assert (ours if pooling.weights else {1: 1}) == counted
    assert pooling.count == len(weights)


@pytest.mark.parametrize("with_documents", [False, True], ids=["one_document", "documents"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  "options",
  [
    dict(num_initial=1, pooling=poolings.nsa_windows(8, 4, 2)),
    dict(pooling=poolings.nsa_windows(8, 8, 8)),
  ],
  ids=["nsa", "nsa_whole_blocks"],
)
def test_keys_of_windows_may_be_given(options, implementation, with_documents):
  block_size, options = 8, options | dict(num_blocks=3)
  b, t, h, k, d = 2, 77, 4, 2, 8
  q, keys = make_problem(b, t, h, k, d, seed=3)
  segments = documents(b, t, seed=5) // 7 if with_documents else None
  shape = b, options["pooling"].num_windows(t), k, d
  window_keys = jax.random.normal(jax.random.key(8), shape)
  lists = select_blocks(
    q,
    keys,
    block_size=block_size,
    segments_BS=None if segments is None else jnp.asarray(segments),
    window_keys_BWKD=window_keys,
    implementation=implementation,
    **options,
  )
  arguments = dict(segments=segments, **options)
  expected = expected_lists(q, keys, block_size, window_keys=window_keys, **arguments)
  assert as_sets(lists) == as_sets(expected)
  assert as_sets(lists) != as_sets(expected_lists(q, keys, block_size, **arguments))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      dict(window_keys_BWKD=jnp.ones((1, 3, 1, 4))),
      r"must be \(1, 4, 1, 4\), got \(1, 3, 1, 4",
    ),
    (
      dict(pooling=poolings.Pooling(8, 8, 0, 2, (1,))),
      "1 weights for 2 windows of a block",
    ),
    (
      dict(
        pooling=poolings.nsa_windows(8, 8, 4),
        key_score_BSK=jnp.ones((1, 32, 1)),
        num_by_query=1,
      ),
      "scores of keys go with the largest of mean windows alone",
    ),
    (
      dict(window_keys_BWKD=jnp.ones((1, 4, 1, 4)), normalizer=poolings.Pooling(16, 16, 0, 1)),
      "given keys of windows are normalised over these windows alone",
    ),
  ],
)
def test_windows_that_do_not_fit_are_refused(options, message):
  q, keys = make_problem(1, 32, 2, 1, 4)
  with pytest.raises(ValueError, match=message):
    pallas_kernels.select_blocks(q, keys, block_size=8, num_blocks=2, **options)


def test_windows_have_whole_strides():
  with pytest.raises(
    ValueError, match="stride=4 does not divide windows of 10 and blocks of 8"
  ):
    poolings.nsa_windows(8, 10, 4)


@pytest.mark.parametrize("pooling", [poolings.whole_blocks(4), poolings.infllm_v2(8)])
def test_the_windows_that_a_query_sees_are_counted_exactly(pooling):
  segments = documents(3, 50)
  problem = Problem(
    jnp.zeros((3, 43, 1, 4)),
    jnp.zeros((3, 50, 1, 4)),
    jnp.int32(7),
    jnp.asarray(segments),
    None,
  )
  rules = Rules(
    block_size=8,
    num_blocks=2,
    num_by_query=2,
    num_initial=0,
    num_local=1,
    pooling=pooling,
    rule="exact",
    scale=1.0,
  )
  bounds = jax.tree.map(np.asarray, plan.bounds(problem, rules))
  for row in range(3):
    for query in range(43):
      seen = [
        j
        for j in range(50)
        if (last := j * pooling.stride + pooling.size - 1) <= query + 7
        and segments[row, last] == segments[row, query + 7]
      ]
      begin, end = bounds.first_window[row, query], bounds.end_window[row, query]
      assert list(range(begin, end)) == seen


def test_a_coarse_normalizer_weighs_heads_anew():
  """Else it would not show that it is there: it is the same for all blocks of a head."""
  q, keys = make_problem(1, 64, 4, 1, 8)
  run = functools.partial(select_blocks, 3 * q, keys, block_size=4, num_blocks=3)
  plain, coarse = (as_sets(run(normalizer=x)) for x in (None, poolings.Pooling(16, 16, 0, 1)))
  assert plain[:15] == coarse[:15]  # no coarse window is complete
  assert plain != coarse
