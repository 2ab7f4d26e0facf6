"""Selection and attention as the papers and released code describe them, in plain numpy.

One row, one document, one query and one head at a time, in float64. Nothing here is shared
with what it judges.
"""

import numpy as np


def windows(x, size, stride):
  """Means of complete windows of rows."""
  starts = range(0, len(x) - size + 1, stride)
  return np.array([x[i : i + size].mean(0) for i in starts]).reshape(-1, *x.shape[1:])


def lists(
  q,
  k,
  *,
  block,
  num_blocks,
  size,
  stride,
  count,
  first,
  initial,
  local,
  coarse=False,
  key_score=None,
  num_by_query=None,
):
  """The set of blocks of every query and key head, [T][K].

  `q` [T, H, D], `k` [T, K, D], `key_score` [T, K]; `local` counts the query's own block, and
  `first` is the first window of a block relative to the first that begins in it.
  """
  q, k = np.float64(q), np.float64(k)
  t, h, d = q.shape
  num_kv = k.shape[1]
  means = windows(k, size, stride)
  coarse_means = windows(k, 4 * size, 4 * stride)
  chosen = []
  for position in range(t):
    own = position // block
    visible = [j for j in range(len(means)) if position >= j * stride + size - 1]
    coarse_visible = [
      j for j in range(len(coarse_means)) if position >= 4 * j * stride + 4 * size - 1
    ]
    forced = {b for b in range(own + 1) if b < initial or b > own - local}
    of_block = {
      b: [
        j
        for j in range(b * block // stride + first, b * block // stride + first + count)
        if j in visible
      ]
      for b in range(own + 1)
    }
    of_query = []
    for head in range(num_kv):
      shared = np.zeros(len(means))
      for q_head in range(head * h // num_kv, (head + 1) * h // num_kv):
        scores = means[visible, head] @ q[position, q_head] / np.sqrt(d)
        over = scores
        if coarse and coarse_visible:
          over = coarse_means[coarse_visible, head] @ q[position, q_head] / np.sqrt(d)
        shared[visible] += np.exp(scores) / np.exp(over).sum()
      score = [
        np.inf if b in forced else max((shared[j] for j in of_block[b]), default=0.0)
        for b in range(own + 1)
      ]
      best = sorted(range(own + 1), key=lambda b: (-score[b], b))
      listed = best[: num_blocks if num_by_query is None else num_by_query]
      if key_score is not None:
        pooled = windows(np.float64(key_score), size, stride)[:, head]
        score = [
          np.inf if b in listed else max((pooled[j] for j in of_block[b]), default=-np.inf)
          for b in range(own + 1)
        ]
        listed = sorted(range(own + 1), key=lambda b: (-score[b], b))[:num_blocks]
      of_query.append(set(listed))
    chosen.append(of_query)
  return chosen


def attention(q, k, v, chosen, block, bias=None):
  """Softmax attention to the listed keys; the bias is added to the scaled scores."""
  q, k, v = np.float64(q), np.float64(k), np.float64(v)
  t, h, d = q.shape
  group = h // k.shape[1]
  out = np.zeros((t, h, d))
  for position in range(t):
    for q_head in range(h):
      head = q_head // group
      keys = [s for s in range(position + 1) if s // block in chosen[position][head]]
      scores = k[keys, head] @ q[position, q_head] / np.sqrt(d)
      if bias is not None:
        scores = scores + np.float64(bias)[keys, head]
      weights = np.exp(scores - scores.max())
      out[position, q_head] = weights / weights.sum() @ v[keys, head]
  return out


def everything(t, num_kv, block):
  """Lists of all blocks, for full attention."""
  return [[set(range(t // block + 1))] * num_kv] * t


def head_scores(v, kernel, scale, kind):
  """The eviction head's scores [T, K] of values [T, K, D]."""
  v, kernel, scale = np.float64(v), np.float64(kernel), np.float64(scale)
  x = v.reshape(len(v), -1) @ kernel.reshape(-1, kernel.shape[-1])
  score = scale * np.log1p(np.exp(x))
  return np.exp(score) if kind == "dma" else score
