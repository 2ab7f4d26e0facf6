"""DMA and ED-DMA: lists that keys make alone, and the bias that goes with them."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.sparsejax.attention import by_hand, lists

OPTIONS = {
  "paper": ({}, {}, 3),
  "released": (
    dict(infllmv2__local_window="released", infllmv2__first_window="released"),
    dict(local=3, first=-1),
    4,
  ),
}


@pytest.mark.parametrize(("changes", "differences", "forced"), OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["dma", "ed_dma"])
def test_lists_and_outputs_are_those_of_the_transcription(kind, changes, differences, forced):
  q, k, v, _ = arrays = lists.make_arrays()
  params = lists.make_head()
  score = by_hand.head_scores(v[0], **params["head"], kind=kind)
  out, blocks = lists.run(lists.make(kind, **changes), arrays, params=params)
  expected = by_hand.lists(
    q[0], k[0], **lists.BY_HAND | differences, key_score=score, num_by_query=forced
  )
  assert lists.as_sets(blocks[0]) == expected
  expected_out = by_hand.attention(q[0], k[0], v[0], expected, lists.BLOCK, score)
  np.testing.assert_allclose(out[0], expected_out, atol=2e-5)


@pytest.mark.parametrize("kind", ["dma", "ed_dma"])
def test_the_full_stream_has_the_same_bias(kind):
  q, k, v, _ = arrays = lists.make_arrays(length=64)
  params = lists.make_head()
  score = by_hand.head_scores(v[0], **params["head"], kind=kind)
  out, _ = lists.run(lists.make(kind), arrays, "full", params)
  everything = by_hand.everything(64, lists.K, lists.BLOCK)
  expected = by_hand.attention(q[0], k[0], v[0], everything, lists.BLOCK, score)
  np.testing.assert_allclose(out[0], expected, atol=2e-5)


def test_the_exponential_changes_which_blocks_are_best():
  """A mean of exponentials follows single keys; else `dma` would be a bias of its own only."""
  arrays, params = lists.make_arrays(), lists.make_head()
  dma, ed_dma = (lists.run(lists.make(x), arrays, params=params)[1] for x in ("dma", "ed_dma"))
  assert lists.as_sets(dma[0]) != lists.as_sets(ed_dma[0])


def test_queries_choose_nothing():
  q, k, v, tokens = lists.make_arrays()
  module, params = lists.make("ed_dma"), lists.make_head()
  _, blocks = lists.run(module, (q, k, v, tokens), params=params)
  _, other = lists.run(module, (jnp.zeros_like(q), 0 * k, v, tokens), params=params)
  np.testing.assert_array_equal(blocks, other)


def test_it_is_nosa_without_query_aware_blocks():
  arrays, params = lists.make_arrays(), lists.make_head()
  out, blocks = lists.run(lists.make("ed_dma"), arrays, params=params)
  nosa = lists.make("nosa", nosa__num_query_aware=0)
  nosa_out, nosa_blocks = lists.run(nosa, arrays, params=params)
  np.testing.assert_array_equal(blocks, nosa_blocks)
  np.testing.assert_array_equal(out, nosa_out)
