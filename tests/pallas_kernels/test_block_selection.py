"""Block selection against a transcription of its definition in plain numpy."""

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.block_selection import xla

# One program instead of a hundred small ones.
select_blocks = jax.jit(
  pallas_kernels.select_blocks,
  static_argnames=("block_size", "num_blocks", "rule", "implementation"),
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


def expected_lists(q, k, block_size, num_blocks, segments=None):
  """Lists by one query, one head and one block at a time."""
  q, k = np.float64(q), np.float64(k)
  (b, t, h, d), num_kv = q.shape, k.shape[2]
  group = h // num_kv
  segments = np.ones((b, t), int) if segments is None else segments
  lists = np.full((b, t, num_kv, num_blocks), -1)
  for row in range(b):
    for position in range(t):
      own = position // block_size
      for head in range(num_kv):
        scores = {}
        for block in range((position + 1) // block_size):
          last = min((block + 1) * block_size, t) - 1
          if segments[row, last] == segments[row, position]:
            members = [
              s
              for s in range(block * block_size, last + 1)
              if segments[row, s] == segments[row, last]
            ]
            scores[block] = k[row, members, head].mean(0)
        importance = dict.fromkeys(scores, 0.0)
        for q_head in range(head * group, (head + 1) * group):
          exponentials = {
            block: np.exp(q[row, position, q_head] @ mean * d**-0.5)
            for block, mean in scores.items()
          }
          total = sum(exponentials.values())
          for block, value in exponentials.items():
            importance[block] += value / total
        past = sorted(
          (block for block in importance if block < own), key=lambda n: -importance[n]
        )
        chosen = [own, *past][:num_blocks]
        lists[row, position, head, : len(chosen)] = chosen
  return lists


def as_sets(lists):
  return [set(entry[entry >= 0]) for entry in np.asarray(lists).reshape(-1, lists.shape[-1])]


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
    segments_BT=None if segments is None else jnp.asarray(segments),
    implementation=implementation,
  )
  assert lists.shape == (b, t, k, m)
  assert as_sets(lists) == as_sets(expected_lists(q, keys, block_size, m, segments))


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
    q, keys, block_size=block_size, num_blocks=num_blocks, segments_BT=jnp.asarray(segments)
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


def test_stripes_do_not_change_the_lists(monkeypatch):
  q, keys = make_problem(2, 50, 4, 2, 8)
  whole = select_blocks(q, keys, block_size=8, num_blocks=3)
  monkeypatch.setattr(xla, "SCORE_ELEMENTS", 2 * 4 * 7 * 16)
  in_stripes = pallas_kernels.select_blocks(q, keys, block_size=8, num_blocks=3)
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


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(num_kv=3), "do not group"),
    (dict(num_blocks=0), "must be at least 1"),
    (dict(key_length=8), "keys must be"),
    (dict(segments=(1, 3)), "segments must be"),
  ],
)
def test_wrong_input_is_refused(change, message):
  q = jnp.ones((1, 16, 4, 4))
  keys = jnp.ones((1, change.get("key_length", 16), change.get("num_kv", 2), 4))
  segments = jnp.ones(change["segments"], jnp.int32) if "segments" in change else None
  # The hook that checks array types sees mismatched shapes first where it is installed.
  with pytest.raises(Exception, match=f"{message}|Type-check"):
    select_blocks(
      q, keys, block_size=4, num_blocks=change.get("num_blocks", 2), segments_BT=segments
    )


def test_unknown_rule_is_refused():
  q, keys = make_problem(1, 16, 2, 1, 4)
  with pytest.raises(Exception, match=r"no selection rule|Type-check"):
    select_blocks(q, keys, block_size=4, num_blocks=2, rule="best")
