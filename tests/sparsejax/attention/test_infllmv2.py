"""InfLLM-V2 against a transcription of its paper, and of what its code does otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.attention import ssa
from tests.sparsejax.attention import by_hand, lists

OPTIONS = {  # of the config, and of the transcription
  "paper": ({}, {}),
  "released_local_window": (dict(infllmv2__local_window="released"), dict(local=3)),
  "released_windows": (dict(infllmv2__first_window="released"), dict(first=-1)),
  "released": (
    dict(infllmv2__local_window="released", infllmv2__first_window="released"),
    dict(local=3, first=-1),
  ),
  "coarse_normalizer": (dict(infllmv2__normalizer="coarse"), dict(coarse=True)),
  "two_initial": (dict(infllmv2__num_initial=2), dict(initial=2)),
  "short_windows": (
    dict(infllmv2__window_size=4, infllmv2__num_windows=4),
    dict(size=4, count=4),
  ),
}


@pytest.mark.parametrize(("changes", "differences"), OPTIONS.values(), ids=OPTIONS)
def test_lists_and_outputs_are_those_of_the_transcription(changes, differences):
  q, k, v, _ = arrays = lists.make_arrays()
  out, blocks = lists.run(lists.make("infllmv2", **changes), arrays)
  expected = by_hand.lists(q[0], k[0], **lists.BY_HAND | differences)
  assert lists.as_sets(blocks[0]) == expected
  if differences:
    assert expected != by_hand.lists(q[0], k[0], **lists.BY_HAND)
  expected_out = by_hand.attention(q[0], k[0], v[0], expected, lists.BLOCK)
  np.testing.assert_allclose(out[0], expected_out, atol=1e-5)


def test_the_full_stream_is_full_attention():
  q, k, v, _ = arrays = lists.make_arrays(length=48)
  out, blocks = lists.run(lists.make("infllmv2"), arrays, "full")
  # What the sparse stream would read is shown, and read by nobody.
  np.testing.assert_array_equal(blocks, lists.run(lists.make("infllmv2"), arrays, "sparse")[1])
  everything = by_hand.everything(48, lists.K, lists.BLOCK)
  expected = by_hand.attention(q[0], k[0], v[0], everything, lists.BLOCK)
  np.testing.assert_allclose(out[0], expected, atol=1e-5)


@pytest.mark.parametrize("stream", ["train", "sparse"])
@pytest.mark.parametrize(("dense_length", "is_dense"), [(161, True), (160, False)])
def test_rows_below_the_threshold_run_the_full_stream(dense_length, is_dense, stream):
  arrays = lists.make_arrays()
  module = lists.make("infllmv2", infllmv2__dense_length=dense_length)
  out, blocks = lists.run(module, arrays, stream)
  full, _ = lists.run(module, arrays, "full")
  assert (blocks is None) == is_dense
  assert np.array_equal(out, full) == is_dense


@pytest.mark.parametrize(("dense_length", "is_dense"), [(161, True), (160, False)])
def test_below_the_threshold_two_streams_are_one(dense_length, is_dense):
  *_, tokens = arrays = lists.make_arrays()
  module = lists.make("infllmv2", infllmv2__dense_length=dense_length)
  full, sparse = jax.jit(lambda *x: module.apply({}, *x, method="both"))(*arrays)
  align = ssa.alignment(full, sparse, tokens, module.options.ssa)
  assert (align == 0.0) == is_dense


def test_a_row_within_the_budget_is_listed_whole():
  """And nothing is scored: the queries do not matter."""
  module = lists.make("infllmv2")
  for length in (16, 96):
    q, k, v, tokens = lists.make_arrays(length=length)
    for any_q in (q, jnp.full_like(q, jnp.nan)):
      _, blocks = lists.run(module, (any_q, k, v, tokens))
      sets = lists.as_sets(blocks[0])
      assert all(
        s == set(range(t // lists.BLOCK + 1)) for t, heads in enumerate(sets) for s in heads
      )
