"""Lists of single tokens are those that the token has in its row."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.block_selection import pooling as poolings
from tests.pallas_kernels.selection_by_hand import as_sets, make_problem

LENGTH, SIZE, K = 77, 8, 2
# Around the borders of blocks and windows, and the ends of the row.
POSITIONS = (0, 6, 7, 8, 31, 32, 33, 63, 64, 76)

RULES = {
  "moba": dict(num_blocks=3),
  "half_local": dict(num_blocks=4, rule="half_local"),
  "infllmv2": dict(num_blocks=5, num_initial=1, num_local=2, pooling=poolings.infllm_v2(8)),
  "coarse": dict(
    num_blocks=4,
    num_initial=1,
    num_local=2,
    pooling=poolings.infllm_v2(8),
    normalizer=poolings.infllm_v2(8).coarser(4),
  ),
  "nsa": dict(num_blocks=4, num_initial=1, pooling=poolings.nsa_windows(8, 8, 4)),
  "nosa": dict(
    num_blocks=6, num_initial=1, num_local=2, pooling=poolings.infllm_v2(8), num_by_query=4
  ),
  "dma": dict(
    num_blocks=6, num_initial=1, num_local=2, pooling=poolings.infllm_v2(8), num_by_query=3
  ),
  "everything": dict(num_blocks=10, num_local=10),
}


@pytest.mark.parametrize("name", RULES)
def test_a_token_lists_what_it_lists_in_its_row(name):
  """Rows at different positions, whose later windows hold anything."""
  rules, b = RULES[name], len(POSITIONS)
  q, k = make_problem(1, LENGTH, 2 * K, K, 8, seed=3)
  score = None
  if "num_by_query" in rules:
    score = jax.random.normal(jax.random.key(4), (1, LENGTH, K))
  row = pallas_kernels.select_blocks(
    q, k, block_size=SIZE, key_score_BSK=score, implementation="reference", **rules
  )

  def windows(x, pooling):
    """Of all rows; what is not complete at the row's position is out of all bounds."""
    means = poolings.mean_windows(jnp.repeat(x, b, axis=0), None, pooling)
    last = np.arange(means.shape[1]) * pooling.stride + pooling.size - 1
    is_there = (last[None] <= np.array(POSITIONS)[:, None]).reshape(b, -1, *[1] * (x.ndim - 2))
    return jnp.where(is_there, means, 1e9)

  pooling, more = rules.get("pooling", poolings.whole_blocks(SIZE)), {}
  if "normalizer" in rules:
    more["coarse_keys_BWKD"] = windows(k, rules["normalizer"])
  if score is not None:
    more["window_score_BWK"] = windows(score, pooling)
  position = jnp.array(POSITIONS)
  lists = pallas_kernels.select_blocks_of_token(
    q[0, position],
    windows(k, pooling),
    position,
    num_keys=LENGTH,
    block_size=SIZE,
    **rules,
    **more,
  )
  assert lists.shape == (b, K, rules["num_blocks"])
  assert as_sets(lists[:, None]) == as_sets(row[0, position][:, None])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(num_keys=88), r"88 keys complete 11 windows .*, got keys of 10"),
    (
      dict(normalizer=poolings.Pooling(16, 16, 0, 1)),
      r"80 keys complete 5 windows .*, got coarse keys of 0",
    ),
    (
      dict(num_by_query=1, window_score_BWK=jnp.ones((1, 9, 1))),
      r"80 keys complete 10 windows .*, got scores of 9",
    ),
    (dict(num_by_query=1), "belong together"),
    (dict(num_local=3), "3 forced blocks, 2 that queries choose"),
    (dict(rule="half_local", num_blocks=3), "num_blocks=3 must be even"),
  ],
)
def test_what_does_not_fit_is_refused(options, message):
  q, windows = jnp.ones((1, 2, 8)), jnp.ones((1, 10, 1, 8))
  options = dict(num_keys=80, block_size=8, num_blocks=2) | options
  # Unwrapped, since the hook that checks array types would see mismatched shapes first.
  select = inspect.unwrap(pallas_kernels.select_blocks_of_token)
  with pytest.raises(ValueError, match=message):
    select(q, windows, jnp.zeros(1, jnp.int32), **options)
