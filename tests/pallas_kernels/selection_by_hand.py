"""The definition of block selection in plain numpy, and problems to put to both."""

import jax
import numpy as np

import pallas_kernels

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
