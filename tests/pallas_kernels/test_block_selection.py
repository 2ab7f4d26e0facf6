"""Block selection against a transcription of its definition in plain numpy."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.block_selection import api, by_key, xla
from pallas_kernels.block_selection import pooling as poolings
from tests.pallas_kernels.selection_by_hand import (
  IMPLEMENTATIONS,
  as_sets,
  documents,
  expected_lists,
  flat,
  make_problem,
  select_blocks,
)

CASES = {  # B, T, H, K, D, block_size, M
  "one_block": (1, 16, 2, 1, 8, 16, 1),
  "gqa_4_to_2": (2, 64, 4, 2, 8, 8, 3),
  "length_not_a_multiple": (1, 45, 4, 1, 8, 8, 2),
  "more_slots_than_blocks": (1, 32, 2, 2, 8, 8, 6),
  "blocks_of_one": (1, 12, 2, 1, 4, 1, 4),
}


@pytest.mark.parametrize("with_documents", [False, True], ids=["one_document", "documents"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_the_definition(case, implementation, with_documents):
  b, t, h, k, d, block_size, m = case
  q, keys = make_problem(b, t, h, k, d)
  segments = documents(b, t) if with_documents else None
  lists = select_blocks(
    q,
    keys,
    block_size=block_size,
    num_blocks=m,
    segments_BS=None if segments is None else jnp.asarray(segments),
    implementation=implementation,
  )
  assert lists.shape == (b, t, k, m)
  assert as_sets(lists) == as_sets(expected_lists(q, keys, block_size, m, segments))


OPTIONS = {
  "forced": (8, dict(num_blocks=5, num_initial=2, num_local=2)),
  "windows": (8, dict(num_blocks=4, num_local=2, pooling=poolings.infllm_v2(8))),
  "windows_as_printed": (8, dict(num_blocks=4, pooling=poolings.Pooling(4, 2, 0, 5))),
  "windows_of_several_blocks": (4, dict(num_blocks=4, pooling=poolings.Pooling(12, 2, -1, 3))),
  "nsa": (8, dict(num_blocks=4, num_initial=1, pooling=poolings.nsa_windows(8, 4, 2))),
  "nsa_long_windows": (4, dict(num_blocks=4, pooling=poolings.nsa_windows(4, 12, 2))),
  "nsa_whole_blocks": (8, dict(num_blocks=4, pooling=poolings.nsa_windows(8, 8, 8))),
  "coarse_normalizer": (
    8,
    dict(num_blocks=4, pooling=poolings.infllm_v2(8), normalizer=poolings.Pooling(16, 8, 0, 1)),
  ),
  "nothing_by_query": (8, dict(num_blocks=4, num_by_query=2, num_initial=1)),
  "key_scores": (8, dict(num_blocks=5, num_by_query=2)),
  "nosa": (
    8,
    dict(
      num_blocks=6,
      num_by_query=4,
      num_initial=1,
      num_local=2,
      pooling=poolings.infllm_v2(8),
    ),
  ),
}


@pytest.mark.parametrize("with_documents", [False, True], ids=["one_document", "documents"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS)
def test_every_option_matches_the_definition(case, implementation, with_documents):
  block_size, options = case
  b, t, h, k, d = 2, 77, 4, 2, 8
  q, keys = make_problem(b, t, h, k, d, seed=3)
  segments = documents(b, t, seed=5) // 2 if with_documents else None
  key_score = None
  if "num_by_query" in options:
    key_score = np.random.default_rng(0).standard_normal((b, t, k)).astype(np.float32)
  lists = select_blocks(
    q,
    keys,
    block_size=block_size,
    segments_BS=None if segments is None else jnp.asarray(segments),
    key_score_BSK=None if key_score is None else jnp.asarray(key_score),
    implementation=implementation,
    **options,
  )
  expected = expected_lists(
    q, keys, block_size, segments=segments, key_score=key_score, **options
  )
  assert as_sets(lists) == as_sets(expected)
  assert all(len(x) == (y >= 0).sum() for x, y in zip(as_sets(lists), flat(lists), strict=True))


@pytest.mark.parametrize("with_documents", [False, True], ids=["one_document", "documents"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["forced", "nosa", "nothing_by_query"])
def test_queries_in_chunks_choose_as_at_once(name, implementation, with_documents):
  block_size, options = OPTIONS[name]
  q, keys = make_problem(2, 60, 4, 2, 8)
  segments = jnp.asarray(documents(2, 60) // 3) if with_documents else None
  if "num_by_query" in options:
    options = options | dict(key_score_BSK=jax.random.normal(jax.random.key(9), (2, 60, 2)))
  run = functools.partial(
    select_blocks,
    k_BSKD=keys,
    block_size=block_size,
    segments_BS=segments,
    implementation=implementation,
    **options,
  )
  whole = run(q)
  parts = [run(q[:, i : i + 15], query_offset=jnp.int32(i)) for i in range(0, 60, 15)]
  np.testing.assert_array_equal(whole, jnp.concatenate(parts, axis=1))


def test_many_blocks_are_ranked_by_key_in_parts(monkeypatch):
  q, keys = make_problem(1, 64, 2, 1, 4)
  score = jax.random.normal(jax.random.key(1), (1, 64, 1))
  run = functools.partial(
    pallas_kernels.select_blocks, q, keys, block_size=4, num_blocks=5, num_by_query=2
  )
  whole = run(key_score_BSK=score)
  monkeypatch.setattr(by_key, "_BLOCKS_AT_ONCE", 5)
  np.testing.assert_array_equal(whole, run(key_score_BSK=score))


def test_what_keys_choose_is_local():
  """Consecutive lists share all that keys choose: NOSA's theorem, gamma >= k_e / k."""
  m, by_query = 6, 2
  q, keys = make_problem(1, 96, 4, 1, 8)
  score = jax.random.normal(jax.random.key(1), (1, 96, 1))
  lists = as_sets(
    select_blocks(
      q, keys, block_size=4, num_blocks=m, num_by_query=by_query, key_score_BSK=score
    )
  )
  for position in range(m * 4, 95):
    if (position + 1) % 4:
      assert len(lists[position] & lists[position + 1]) >= m - by_query


@given(
  t=st.integers(1, 40),
  block_size=st.integers(1, 9),
  num_blocks=st.integers(1, 6),
  group=st.sampled_from([1, 3]),
  seed=st.integers(0, 2**16),
)
@settings(max_examples=12, deadline=None)
def test_any_shape_matches_the_definition(t, block_size, num_blocks, group, seed):
  q, keys = make_problem(1, t, group, 1, 4, seed)
  segments = documents(1, t, seed)
  lists = select_blocks(
    q, keys, block_size=block_size, num_blocks=num_blocks, segments_BS=jnp.asarray(segments)
  )
  expected = expected_lists(q, keys, block_size, num_blocks, segments)
  assert as_sets(lists) == as_sets(expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lists_hold_their_laws(implementation):
  """Own block in, no future, no duplicate, as many as there are."""
  q, keys = make_problem(2, 64, 4, 2, 8)
  lists = np.asarray(
    select_blocks(q, keys, block_size=8, num_blocks=3, implementation=implementation)
  )
  own = np.arange(64) // 8
  for position in range(64):
    for entry in lists[:, position].reshape(-1, 3):
      listed = entry[entry >= 0]
      assert own[position] in listed
      assert listed.max() <= own[position]
      assert len(set(listed)) == len(listed) == min(3, own[position] + 1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_scores_go_to_the_lower_block(implementation):
  q, keys = jnp.ones((1, 64, 2, 4)), jnp.ones((1, 64, 1, 4))
  lists = select_blocks(q, keys, block_size=8, num_blocks=3, implementation=implementation)
  assert as_sets(lists)[-1] == {7, 0, 1}


def test_half_local_takes_half_from_the_current_run():
  """SSA's released kernel, by its closed form: see the design of block 16 x 16."""
  m, block_size, t = 4, 2, 64
  q, keys = make_problem(1, t, 2, 1, 4)
  exact = select_blocks(q, keys, block_size=block_size, num_blocks=32)
  lists = select_blocks(q, keys, block_size=block_size, num_blocks=m, rule="half_local")
  for position in range(t):
    own = position // block_size
    # Every visible block, best first, own one in front.
    ranked = [n for n in np.asarray(exact)[0, position, 0] if n >= 0]
    run_start = own // m * m
    if run_start == 0:
      expected = set(range(own + 1))
    else:
      near = [n for n in ranked if n >= run_start][: m // 2]
      far = [n for n in ranked if n < run_start][: m // 2]
      expected = {*near, *far}
    assert as_sets(lists)[position] == expected


def test_half_local_needs_an_even_number():
  q, keys = make_problem(1, 16, 2, 1, 4)
  with pytest.raises(ValueError, match="must be even"):
    select_blocks(q, keys, block_size=4, num_blocks=3, rule="half_local")


def test_where_queries_choose_nothing_they_are_not_asked(monkeypatch):
  monkeypatch.setitem(api._IMPLEMENTATIONS, "xla", None)
  q, keys = make_problem(1, 32, 2, 1, 4)
  score = jax.random.normal(jax.random.key(1), (1, 32, 1))
  lists = pallas_kernels.select_blocks(
    q, keys, block_size=4, num_blocks=3, num_by_query=1, key_score_BSK=score
  )
  assert len(as_sets(lists)[-1]) == 3


@pytest.mark.parametrize("normalizer", [None, poolings.Pooling(16, 8, 0, 1)])
def test_stripes_do_not_change_the_lists(normalizer, monkeypatch):
  q, keys = make_problem(2, 50, 4, 2, 8)
  options = dict(block_size=8, num_blocks=3, normalizer=normalizer)
  whole = select_blocks(q, keys, **options)
  monkeypatch.setattr(xla, "SCORE_ELEMENTS", 2 * 4 * 7 * 16)
  in_stripes = pallas_kernels.select_blocks(q, keys, **options)
  np.testing.assert_array_equal(whole, in_stripes)


def test_a_block_that_no_probability_reaches_is_still_a_block():
  """Softmax underflows to 0; the block must rank last, not become invisible."""
  q = jnp.full((1, 32, 1, 4), 50.0)
  keys = jnp.zeros((1, 32, 1, 4)).at[:, :8].set(50.0).at[:, 8:16].set(-50.0)
  lists = select_blocks(q, keys, block_size=8, num_blocks=4)
  assert as_sets(lists)[-1] == {0, 1, 2, 3}


def test_lists_carry_no_gradient():
  q, keys = make_problem(1, 32, 2, 1, 4)

  def total(q):
    return select_blocks(q, keys, block_size=8, num_blocks=2).astype(jnp.float32).sum()

  np.testing.assert_array_equal(jax.grad(total)(q), jnp.zeros_like(q))
