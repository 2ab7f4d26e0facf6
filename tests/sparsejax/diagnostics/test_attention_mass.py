import hypothesis
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np

from sparsejax.diagnostics import attention_mass as mass

B, T, H, K, D, SIZE, M = 2, 40, 4, 2, 8, 8, 3


def inputs(seed=0):
  rng = np.random.default_rng(seed)
  q, k, v = (2 * rng.standard_normal((B, T, heads, D)) for heads in (H, K, K))
  segments = np.cumsum(rng.random((B, T)) < 0.05, axis=1)
  blocks = np.full((B, T, K, M), -1)
  for index in np.ndindex(B, T, K):
    own = index[1] // SIZE
    chosen = np.append(rng.permutation(own)[: rng.integers(0, M)], own)
    blocks[index][: len(chosen)] = chosen
  return q, k, v, segments, rng.standard_normal((B, T, K)), blocks


def by_hand(q, k, segments, bias, b, t, h):
  """The probabilities of one query of one head on every key."""
  kv = h // (H // K)
  scores = np.array([q[b, t, h] @ k[b, j, kv] / np.sqrt(D) + bias[b, j, kv] for j in range(T)])
  seen = [j for j in range(t + 1) if segments[b, j] == segments[b, t]]
  weights = np.zeros(T)
  weights[seen] = np.exp(scores[seen] - scores[seen].max())
  return weights / weights.sum()


def of_all(q, k, segments, bias, positions):
  arrays = jnp.asarray(q)[:, positions], jnp.asarray(k), positions
  return mass.probabilities(
    *arrays, segments_BS=jnp.asarray(segments), key_bias_BSK=jnp.asarray(bias)
  )


def test_sampled_queries_are_spread_and_end_with_the_last():
  np.testing.assert_array_equal(mass.sample_positions(40, 4), [9, 19, 29, 39])
  np.testing.assert_array_equal(mass.sample_positions(3, 64), [0, 1, 2])


def test_masses_are_those_of_the_definitions():
  q, k, _, segments, bias, blocks = inputs()
  positions = mass.sample_positions(T, 7)
  p = of_all(q, k, segments, bias, positions)
  kept = mass.attention_sparsity(p, jnp.asarray(blocks)[:, positions], SIZE)
  bits = mass.entropy(p)
  first = np.array([[np.flatnonzero(s == s[t])[0] for t in positions] for s in segments])
  sink = mass.sink_mass(p, jnp.asarray(first), 2)
  for b, n, h in np.ndindex(*p.shape[:3]):
    t = int(positions[n])
    expected = by_hand(q, k, segments, bias, b, t, h)
    np.testing.assert_allclose(p[b, n, h], expected, atol=1e-5)
    listed = set(blocks[b, t, h // (H // K)].tolist())
    there = [j for j in range(T) if j // SIZE in listed]
    np.testing.assert_allclose(kept[b, n, h], expected[there].sum(), atol=1e-5)
    positive = expected[expected > 0]
    np.testing.assert_allclose(bits[b, n, h], -(positive * np.log2(positive)).sum(), atol=1e-4)
    begin = first[b, n]
    np.testing.assert_allclose(sink[b, n, h], expected[begin : begin + 2].sum(), atol=1e-5)


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(seed=st.integers(0, 10_000))
def test_what_is_dropped_bounds_the_distance_of_the_streams(seed):
  """Theorem 1 of SSA: |full - sparse| <= delta (the largest dropped |v| + |sparse|)."""
  q, k, v, segments, bias, blocks = inputs(seed)
  positions = jnp.arange(T)
  p = np.asarray(of_all(q, k, segments, bias, positions), np.float64)
  kept = np.asarray(mass.attention_sparsity(jnp.asarray(p), jnp.asarray(blocks), SIZE))
  for b, t, h in [(0, 5, 0), (1, 20, 3), (0, 39, 1), (1, 39, 2)]:
    values, listed = v[b, :, h // (H // K)], blocks[b, t, h // (H // K)]
    is_listed = np.isin(np.arange(T) // SIZE, listed)
    full, sparse = p[b, t, h] @ values, (p[b, t, h] * is_listed) @ values
    sparse = sparse / p[b, t, h][is_listed].sum()
    is_dropped = ~is_listed & (p[b, t, h] > 0)
    largest = np.linalg.norm(values[is_dropped], axis=-1).max(initial=0.0)
    delta = 1 - kept[b, t, h]
    bound = delta * (largest + np.linalg.norm(sparse))
    assert np.linalg.norm(full - sparse) <= bound + 1e-5
