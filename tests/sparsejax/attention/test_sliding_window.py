"""Sliding-window attention as a method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.attention import method, sliding_window
from tests import small

B, T, H, K, D = 2, 64, 4, 2, 8


def make(mask="both", window=12):
  options = small.make_model(
    attention__document_mask=mask, attention__method="sliding_window", attention__window=window
  ).options
  keys = jax.random.split(jax.random.key(3), 3)
  q = jax.random.normal(keys[0], (B, T, H, D))
  k, v = (jax.random.normal(key, (B, T, K, D)) for key in keys[1:])
  segments = small.make_batch(rows=B, length=T).segments
  return sliding_window.SlidingWindow(options), q, k, v, segments


def expected(q, k, v, segments, window):
  """One query at a time."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros(q.shape)
  for b, t, h in np.ndindex(q.shape[:3]):
    seen = [s for s in range(T) if 0 <= t - s < window and segments[b, s] == segments[b, t]]
    weights = np.exp(k[b, seen, h // 2] @ q[b, t, h] / np.sqrt(D))
    out[b, t, h] = weights @ v[b, seen, h // 2] / weights.sum()
  return out


@pytest.mark.parametrize("stream", method.STREAMS)
@pytest.mark.parametrize("mask", ["both", "full", "none"])
def test_it_reads_the_last_keys_of_the_document(mask, stream):
  """Run full, it reads all of them; each stream stops at documents where it is told to."""
  module, q, k, v, segments = make(mask)
  tokens = method.Tokens(segments, None, jnp.asarray(True))
  out, align, _ = module.apply({}, q, k, v, tokens, stream)
  stops = dict(both=True, full=stream == "full", none=False)[mask]
  documents = np.asarray(segments) if stops else np.ones((B, T))
  wanted = expected(q, k, v, documents, T if stream == "full" else 12)
  np.testing.assert_allclose(out, wanted, atol=1e-5)
  assert align == 0


def test_it_can_be_the_sparse_side_of_ssa():
  """SSA's two streams are then every key, and the window."""
  batch, coins = small.make_batch(), (True, False)
  alone = small.make_model(attention__method="sliding_window")
  both = small.make_model(attention__sparse_method="sliding_window")
  params = small.make_params(both, scale=4.0)

  for coin, stream in zip(coins, ("full", "sparse"), strict=True):
    trained = small.run(both, params, batch, "train", coin)
    own = small.run(alone, params, batch, stream)
    np.testing.assert_array_equal(trained.hidden_BTE, own.hidden_BTE)
    assert (trained.align_L > 0).all()
