"""NOSA against a transcription of its paper and code, and its theorem of locality."""

from hypothesis import example, given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import small
from tests.sparsejax.attention import by_hand, lists

OPTIONS = {  # of the config; of the transcription; blocks forced or chosen by queries; head
  "paper": ({}, {}, 4, "ed_dma"),
  "released": (
    # One more block is forced, and as many as before come from the query's scores.
    dict(infllmv2__local_window="released", infllmv2__first_window="released"),
    dict(local=3, first=-1),
    4,
    "ed_dma",
  ),
  "released_local_window": (
    dict(infllmv2__local_window="released", nosa__num_query_aware=2),
    dict(local=3),
    5,
    "ed_dma",
  ),
  "dma_head": (dict(nosa__eviction_head="dma"), {}, 4, "dma"),
  "two_by_query": (dict(nosa__num_query_aware=2), {}, 5, "ed_dma"),
  "coarse": (dict(infllmv2__normalizer="coarse"), dict(coarse=True), 4, "ed_dma"),
}


@pytest.mark.parametrize(
  ("changes", "differences", "num_by_query", "kind"), OPTIONS.values(), ids=OPTIONS
)
def test_lists_and_outputs_are_those_of_the_transcription(
  changes, differences, num_by_query, kind
):
  q, k, v, _ = arrays = lists.make_arrays()
  params = lists.make_head()
  score = by_hand.head_scores(v[0], **params["head"], kind=kind)
  out, blocks = lists.run(lists.make("nosa", **changes), arrays, params=params)
  expected = by_hand.lists(
    q[0], k[0], **lists.BY_HAND | differences, key_score=score, num_by_query=num_by_query
  )
  assert lists.as_sets(blocks[0]) == expected
  expected_out = by_hand.attention(q[0], k[0], v[0], expected, lists.BLOCK, score)
  np.testing.assert_allclose(out[0], expected_out, atol=2e-5)


def test_where_queries_choose_all_the_rest_lists_are_those_of_infllm_v2():
  arrays = lists.make_arrays()
  _, blocks = lists.run(
    lists.make("nosa", nosa__num_query_aware=3), arrays, params=lists.make_head()
  )
  _, expected = lists.run(lists.make("infllmv2"), arrays)
  assert lists.as_sets(blocks[0]) == lists.as_sets(expected[0])


def misses(blocks_TKM, segments_T):
  """Per query after the first of a document: new blocks in its lists, and their lengths."""
  sets = lists.as_sets(blocks_TKM)
  for t in range(1, len(sets)):
    if segments_T[t] == segments_T[t - 1]:
      for before, now in zip(sets[t - 1], sets[t], strict=True):
        yield t, len(now - before), len(now)


@given(
  seed=st.integers(0, 2**16),
  local_window=st.sampled_from(["paper", "released"]),
  first_window=st.sampled_from(["paper", "released"]),
  num_query_aware=st.integers(0, 2),
  num_documents=st.integers(1, 3),
)
@example(1, "paper", "paper", 1, 1)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_locality(seed, local_window, first_window, num_query_aware, num_documents):
  """gamma >= k_e / k, less 1 / k at the first query of a block; stated as new blocks."""
  module = lists.make(
    "nosa",
    infllmv2__local_window=local_window,
    infllmv2__first_window=first_window,
    nosa__num_query_aware=num_query_aware,
  )
  q, k, v, tokens = lists.make_arrays(seed)
  segments = small.make_batch(rows=2, length=lists.T, seed=seed, num_documents=num_documents)
  segments = segments.segments[:1]
  params = lists.make_head(seed)
  _, blocks = lists.run(module, (q, k, v, tokens.replace(segments_BT=segments)), params=params)
  # The block that the released window adds takes the place of one that a query chooses.
  k_q = max(0, num_query_aware - (local_window == "released"))
  k_all = module.options.num_blocks
  for t, new, length in misses(blocks[0], np.asarray(segments[0])):
    opened = int(t % lists.BLOCK == 0)
    assert new <= k_q + opened
    if length == k_all:
      gamma = 1 - new / length
      assert gamma >= (k_all - k_q - opened) / k_all - 1e-9


def test_the_bound_is_met_and_other_methods_break_it():
  arrays = lists.make_arrays(size=6.0)
  worst = {}
  for name, params in (("nosa", lists.make_head()), ("infllmv2", {})):
    _, blocks = lists.run(lists.make(name), arrays, params=params)
    found = misses(blocks[0], np.ones(lists.T))
    worst[name] = max(new for t, new, _ in found if t % lists.BLOCK)
  assert worst["nosa"] == 1 < worst["infllmv2"]


def test_both_streams_carry_the_bias():
  """At once as each alone, in values and in the gradient of the head."""
  arrays, params = lists.make_arrays(length=112), lists.make_head()
  module = lists.make("nosa")

  def alone(params):
    streams = "full", "sparse"
    return [module.apply({"params": params}, *arrays, x).out_BTHD for x in streams]

  def at_once(params):
    return list(module.apply({"params": params}, *arrays, method="both"))

  dout = [jax.random.normal(jax.random.key(i), arrays[0].shape) for i in range(2)]
  (outs, vjp), (wanted, wanted_vjp) = (jax.vjp(jax.jit(f), params) for f in (at_once, alone))
  for actual, expected in zip(outs, wanted, strict=True):
    np.testing.assert_array_equal(actual, expected)
  for i in range(2):
    only = [x * (i == j) for j, x in enumerate(dout)]
    for actual, expected in zip(
      *map(jax.tree.leaves, (vjp(only), wanted_vjp(only))), strict=True
    ):
      assert jnp.abs(expected).max() > 1e-2
      np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
