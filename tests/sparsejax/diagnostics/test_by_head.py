"""Numbers of every head: known models exactly, and any other against plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import model
from sparsejax.diagnostics import by_head, divergence, seen
from tests import small

ROWS, LENGTH = 2, 60


@functools.cache
def prepare(**changes):
  transformer = small.make_model(max_documents=1, **changes)
  ids = np.random.default_rng(0).integers(320, size=(ROWS, LENGTH))
  return transformer, small.make_params(transformer, scale=4.0), jnp.asarray(ids, jnp.int32)


def with_projections(params, **factors):
  """The same parameters, some projections multiplied."""

  def scaled(path, x):
    names = [getattr(key, "key", "") for key in path]
    return x * next((f for name, f in factors.items() if name in names), 1.0)

  return jax.tree_util.tree_map_with_path(scaled, params)


def take(transformer, params, ids, num_queries=16):
  measure = by_head.make(transformer, num_sink_keys=2, chunk_length=24, num_queries=num_queries)
  return measure(params, ids)


def kept_keys(position, num_blocks=3, size=8):
  """Keys that a query reads of full lists."""
  return min(position + 1, (num_blocks - 1) * size + position % size + 1)


def test_uniform_attention_gives_what_counting_gives():
  transformer, params, ids = prepare(attention__method="moba")
  found = take(transformer, with_projections(params, q_proj=0.0, v_proj=0.0), ids).heads
  seen_T = np.arange(1, LENGTH + 1)
  late = np.arange(24, LENGTH)
  expected = dict(
    entropy=np.log2(seen_T).mean(),
    sink=(np.minimum(2, seen_T) / seen_T).mean(),
    attn_sparsity=np.mean([kept_keys(t) / (t + 1) for t in late]),
    # Values are 0: where they are not those that the layer has, something is lost.
    error=0.0,
    bound=0.0,
  )
  for name, value in expected.items():
    for stream in by_head.STREAMS:
      np.testing.assert_allclose(found[f"{stream}/{name}"], value, rtol=1e-5, err_msg=name)


def test_one_hot_attention_loses_nothing():
  """Where all tokens are the same, rotated queries fit the key at their own place best."""
  transformer, params, ids = prepare(attention__method="moba")
  # Two query heads to a key head: every query is a multiple of its own key.
  params = with_projections(params)
  attention = params["layers"]["self_attn"]
  attention["q_proj"]["kernel"] = 1e4 * jnp.repeat(attention["k_proj"]["kernel"], 2, axis=2)
  found = take(transformer, params, jnp.full_like(ids, 7)).heads
  expected = dict(entropy=0.0, sink=2 / LENGTH, attn_sparsity=1.0, error=0.0, bound=0.0)
  for name, value in expected.items():
    np.testing.assert_allclose(found[f"full/{name}"], value, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("method", "stream"), [("moba", "sparse"), ("nosa", "full")])
def test_numbers_are_those_of_plain_loops(method, stream):
  rules = dict(infllmv2__num_initial=1, nosa__num_query_aware=1)
  transformer, params, ids = prepare(attention__method=method, **rules)
  if method == "nosa":
    # Scores of keys begin at 0, where no bias is told from none.
    params = with_projections(params)
    params["layers"]["self_attn"]["sparse"]["head"]["scale"] += 1.5
  heads, kl = take(transformer, params, ids)
  positions = jnp.broadcast_to(jnp.arange(LENGTH), ids.shape)
  run = functools.partial(
    transformer.apply, {"params": params}, ids, positions, jnp.ones_like(ids)
  )
  _, shown = run(stream=stream, mutable=["intermediates"])
  names = ["queries", "keys", "values", "blocks", *(["key_bias"] if method == "nosa" else [])]
  q, k, v, blocks, *bias = (
    np.asarray(seen.by_place(shown, name)[0][1], np.float64) for name in names
  )
  group = q.shape[2] // k.shape[2]
  for row, head in np.ndindex(ROWS, q.shape[2]):
    kv, of_query = (
      head // group,
      {name: [] for name in ("entropy", "sink", *by_head.OF_DROPPED)},
    )
    shared = []
    for t in range(LENGTH):
      scores = k[row, : t + 1, kv] @ q[row, t, head] * q.shape[-1] ** -0.5
      scores += bias[0][row, : t + 1, kv] if bias else 0.0
      p = np.exp(scores - scores.max())
      p /= p.sum()
      of_query["entropy"].append(-(p * np.log2(p)).sum())
      of_query["sink"].append(p[:2].sum())
      listed = set(blocks[row, t, kv].astype(int)) - {-1}
      if t and len(listed) == 3:
        before = set(blocks[row, t - 1, kv].astype(int))
        shared.append(len(listed & before) / 3)
      if t < 24:
        continue
      is_kept = np.array([key // 8 in listed for key in range(t + 1)])
      of_query["attn_sparsity"].append(p[is_kept].sum())
      values = v[row, : t + 1, kv]
      sparse = p[is_kept] @ values[is_kept] / p[is_kept].sum()
      error = np.linalg.norm(p @ values - sparse)
      largest = np.linalg.norm(values[~is_kept], axis=-1).max()
      bound = p[~is_kept].sum() * (largest + np.linalg.norm(sparse))
      of_query["error"].append(error)
      of_query["bound"].append(bound)
      of_query["error_to_bound"].append(error / bound)
    for name, values in of_query.items():
      expected = np.max(values) if name == "error_to_bound" else np.mean(values)
      actual = heads[f"{stream}/{name}"][1, row, head]
      np.testing.assert_allclose(actual, expected, rtol=1e-3, err_msg=name)
    if head % group == 0:
      np.testing.assert_allclose(heads[f"{stream}/gamma"][1, row, kv], np.mean(shared), 1e-5)
      np.testing.assert_allclose(heads[f"{stream}/gamma_min"][1, row, kv], np.min(shared), 1e-5)
  hidden = [run(stream=name).hidden_BTE for name in ("full", "sparse")]
  expected = divergence.from_full(*hidden, model.unembedding(params), chunk_length=60)
  np.testing.assert_allclose(kl, expected.mean(-1), rtol=1e-4)
  assert (kl > 1e-4).all()


def test_chunks_of_queries_change_nothing():
  transformer, params, ids = prepare(attention__method="moba")
  in_sixteens, in_one = (take(transformer, params, ids, n) for n in (16, 128))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4), in_sixteens, in_one)


def test_rows_that_are_read_whole_have_no_number_of_what_is_dropped():
  transformer, params, ids = prepare(attention__method="moba", attention__num_blocks=8)
  heads, kl = take(transformer, params, ids)
  for name in by_head.OF_DROPPED:
    assert np.isnan(heads[f"full/{name}"]).all()
  assert np.isfinite(heads["full/entropy"]).all()
  np.testing.assert_allclose(kl, 0.0, atol=1e-5)


def test_layers_without_lists_have_no_number_of_lists():
  transformer, params, ids = prepare(attention__layer_methods=("sliding_window", "moba"))
  heads, _ = take(transformer, params, ids)
  for name in (*by_head.OF_DROPPED, *by_head.OF_KEY_HEADS):
    assert np.isnan(heads[f"sparse/{name}"][0]).all()
    assert np.isfinite(heads[f"sparse/{name}"][1]).all()
  assert np.isfinite(heads["sparse/entropy"]).all()
  assert by_head.places_with_lists(transformer, params, ids) == {1}
