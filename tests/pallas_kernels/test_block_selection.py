"""Block selection against a transcription of its definition in plain numpy."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.block_selection import api, by_key, plan, xla
from pallas_kernels.block_selection import pooling as poolings
from pallas_kernels.block_selection.problem import Problem, Rules

# One program instead of a hundred small ones.
select_blocks = jax.jit(
  pallas_kernels.select_blocks,
  static_argnames=(
    "block_size",
    "num_blocks",
    "rule",
    "num_initial",
    "num_local",
    "pooling",
    "num_by_query",
    "normalizer",
    "implementation",
  ),
)

IMPLEMENTATIONS = ("reference", "xla")

CASES = {  # B, T, H, K, D, block_size, M
  "one_block": (1, 16, 2, 1, 8, 16, 1),
  "gqa_4_to_2": (2, 64, 4, 2, 8, 8, 3),
  "length_not_a_multiple": (1, 45, 4, 1, 8, 8, 2),
  "more_slots_than_blocks": (1, 32, 2, 2, 8, 8, 6),
  "blocks_of_one": (1, 12, 2, 1, 4, 1, 4),
}


def make_problem(b, t, h, k, d, seed=0):
  keys = jax.random.split(jax.random.key(seed), 2)
  return jax.random.normal(keys[0], (b, t, h, d)), jax.random.normal(keys[1], (b, t, k, d))


def documents(b, t, seed=0):
  """Runs of equal segments of random length, different in every row."""
  rng = np.random.default_rng(seed)
  return np.cumsum(rng.random((b, t)) < 0.15, axis=1) + 1


def expected_lists(
  q,
  k,
  block_size,
  num_blocks,
  segments=None,
  *,
  offset=0,
  num_initial=0,
  num_local=1,
  pooling=None,
  key_score=None,
  num_by_query=None,
  window_keys=None,
  normalizer=None,
):
  """Lists by one query, one head and one block at a time."""
  q, k = np.float64(q), np.float64(k)
  (b, t, h, d), (s, num_kv) = q.shape, k.shape[1:3]
  group = h // num_kv
  segments = np.ones((b, s), int) if segments is None else segments
  size, stride, first, count = (
    (block_size, block_size, 0, 1)
    if pooling is None
    else (pooling.size, pooling.stride, pooling.first, pooling.count)
  )

  def window_key(row, j, keys, head):
    if window_keys is not None:
      return np.float64(window_keys[row, j, head])
    return k[row, keys, head].mean(0)

  lists = np.full((b, t, num_kv, num_blocks), -1)
  for row in range(b):
    for query in range(t):
      position = query + offset
      document = segments[row, position]
      own = position // block_size
      visible = [
        n for n in range(own) if segments[row, (n + 1) * block_size - 1] == document
      ] + [own]
      # Complete windows of the document, and the keys that they average.
      windows, coarse = (
        {
          j: [x for x in range(j * step, j * step + n) if segments[row, x] == document]
          for j in range(s)
          if j * step + n - 1 <= position and segments[row, j * step + n - 1] == document
        }
        for n, step in (
          (size, stride),
          (normalizer.size, normalizer.stride) if normalizer else (s + 1, 1),
        )
      )
      of_block = {
        n: [
          j
          for j in range(
            n * block_size // stride + first, n * block_size // stride + first + count
          )
          if j in windows
        ]
        for n in visible
      }
      forced = {*visible[:num_initial], *(n for n in visible if n > own - num_local)}
      for head in range(num_kv):
        sums = dict.fromkeys(windows, 0.0)
        for q_head in range(head * group, (head + 1) * group):
          exponentials, normalizers = (
            {
              j: np.exp(q[row, query, q_head] @ window_key(row, j, keys, head) * d**-0.5)
              for j, keys in group.items()
            }
            for group in (windows, coarse)
          )
          total = sum((normalizers or exponentials).values())
          for j, value in exponentials.items():
            sums[j] += value / total
        by_query = {n: max((sums[j] for j in of_block[n]), default=0.0) for n in visible}
        if pooling is not None and pooling.weights is not None:
          by_query = {
            n: sum(
              weight * sums.get(n * block_size // stride + first + i, 0.0)
              for i, weight in enumerate(pooling.weights)
            )
            for n in visible
          }
        ranked = sorted(visible, key=lambda n: (n not in forced, -by_query[n], n))
        chosen = ranked[: num_blocks if num_by_query is None else num_by_query]
        if key_score is not None:
          by_key = {
            n: max(
              (key_score[row, windows[j], head].mean() for j in of_block[n]), default=-np.inf
            )
            for n in visible
          }
          rest = [n for n in visible if n not in chosen]
          rest = sorted(rest, key=lambda n: (-by_key[n], n))
          chosen = chosen + rest[: num_blocks - len(chosen)]
        lists[row, query, head, : len(chosen)] = chosen
  return lists


def flat(lists):
  return np.asarray(lists).reshape(-1, lists.shape[-1])


def as_sets(lists):
  return [set(entry[entry >= 0]) for entry in flat(lists)]


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
@pytest.mark.parametrize("name", ["nsa", "nsa_whole_blocks"])
def test_keys_of_windows_may_be_given(name, implementation, with_documents):
  block_size, options = OPTIONS[name]
  options = options | dict(num_blocks=3)
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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["forced", "nosa"])
def test_queries_in_chunks_choose_as_at_once(name, implementation):
  block_size, options = OPTIONS[name]
  q, keys = make_problem(2, 60, 4, 2, 8)
  segments = jnp.asarray(documents(2, 60) // 3)
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


def test_a_coarse_normalizer_weighs_heads_anew():
  """Else it would not show that it is there: it is the same for all blocks of a head."""
  q, keys = make_problem(1, 64, 4, 1, 8)
  run = functools.partial(select_blocks, 3 * q, keys, block_size=4, num_blocks=3)
  plain, coarse = (as_sets(run(normalizer=x)) for x in (None, poolings.Pooling(16, 16, 0, 1)))
  assert plain[:15] == coarse[:15]  # no coarse window is complete
  assert plain != coarse


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
