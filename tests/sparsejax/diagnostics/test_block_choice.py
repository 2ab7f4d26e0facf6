import jax.numpy as jnp
import numpy as np

from sparsejax.diagnostics import block_choice

B, T, K, M, SIZE = 2, 30, 2, 5, 4


def random_lists(seed=0):
  rng = np.random.default_rng(seed)
  lists = np.full((B, T, K, M), -1)
  for b, t, k in np.ndindex(B, T, K):
    own = t // SIZE
    chosen = rng.permutation(own + 1)[: rng.integers(0, M + 1)]
    lists[b, t, k, : len(chosen)] = chosen
    rng.shuffle(lists[b, t, k])
  return lists


def sets(lists):
  return {index: set(lists[index].tolist()) - {-1} for index in np.ndindex(*lists.shape[:3])}


def test_overlap_with_the_query_before():
  lists = random_lists()
  of, actual = sets(lists), block_choice.overlap(jnp.asarray(lists))
  assert actual.shape == (B, T - 1, K)
  for b, t, k in np.ndindex(B, T - 1, K):
    now, before = of[b, t + 1, k], of[b, t, k]
    expected = len(now & before) / len(now) if now else 1.0
    np.testing.assert_allclose(actual[b, t, k], expected, rtol=1e-6)


def test_share_that_is_forced():
  lists = random_lists(1)
  sizes = dict(block_size=SIZE, num_initial=1, num_local=2)
  # A document begins at position 14, in block 3.
  first = np.where(np.arange(T) >= 14, 14, 0)[None].repeat(B, 0)
  lists = np.where(lists >= first[..., None, None] // SIZE, lists, -1)
  of = sets(lists)
  actual = block_choice.forced_share(jnp.asarray(lists), jnp.asarray(first), **sizes)
  for b, t, k in np.ndindex(B, T, K):
    own = t // SIZE
    forced = of[b, t, k] & {first[b, t] // SIZE, own, own - 1}
    expected = len(forced) / len(of[b, t, k]) if of[b, t, k] else 0.0
    np.testing.assert_allclose(actual[b, t, k], expected, rtol=1e-6)


def test_union_of_a_tile_of_queries():
  lists = random_lists(2)
  of, actual = sets(lists), block_choice.union_size(jnp.asarray(lists), 4)
  assert actual.shape == (B, T // 4, K)
  for b, x, k in np.ndindex(*actual.shape):
    assert actual[b, x, k] == len(set().union(*(of[b, 4 * x + i, k] for i in range(4))))
