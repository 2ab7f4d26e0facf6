"""The numbers of a whole model, against loops over what its layers showed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import scoring, sharding
from sparsejax.diagnostics import look, rows, seen
from tests import small

SETTINGS = look.Settings(num_queries=8, num_sink_keys=2, tile=4, chunk_length=24)
LISTS = {"attn_sparsity", "overlap_mean", "overlap_min", "forced_share", "union"}
MASS = {"entropy", "sink"}
MODEL = {"kl", "loss_full", "loss_sparse", "gap"}


@functools.cache
def take(length=128, **changes):
  transformer = small.make_model(**changes)
  params = small.make_params(transformer, scale=4.0)
  batch = small.make_batch(length=length, num_documents=2)
  return transformer, params, batch, look.make(transformer, SETTINGS)(params, batch)


@pytest.mark.parametrize("method", ["ssa", "nsa", "sliding_window"])
def test_every_method_has_the_numbers_that_it_can_have(method):
  *_, found = take(attention__method=method)
  of_stream = MASS if method == "sliding_window" else MASS | LISTS
  expected = {f"{stream}/{name}" for stream in look.STREAMS for name in of_stream}
  assert set(found.layers) == expected | ({"align"} if method == "ssa" else set())
  assert set(found.model) == MODEL
  for values in found.layers.values():
    assert values.shape == (2,)
    assert np.isfinite(values).all()


@pytest.mark.parametrize(
  ("method", "stream"), [("moba", "sparse"), ("nosa", "full"), ("nosa", "sparse")]
)
def test_numbers_of_a_layer_are_those_of_plain_loops(method, stream):
  rules = dict(infllmv2__num_initial=1, nosa__num_query_aware=1)
  transformer, params, batch, found = take(attention__method=method, **rules)
  options = transformer.options
  _, shown = transformer.apply(
    {"params": params},
    batch.inputs,
    batch.positions,
    batch.segments,
    stream=stream,
    mutable=["intermediates"],
  )
  q, k, blocks, *bias = (
    np.asarray(seen.by_place(shown, name)[0][1], np.float64)
    for name in ("queries", "keys", "blocks", *(["key_bias"] if method == "nosa" else []))
  )
  (b, t, h, d), num_kv, size = q.shape, k.shape[2], options.block_size
  segments = np.asarray(batch.segments)
  kept, entropies, sinks, overlaps, forced = [], [], [], [], []
  for row, query, head in np.ndindex(b, t, h):
    if segments[row, query] == 0:
      continue
    keys = np.flatnonzero(segments[row, : query + 1] == segments[row, query])
    kv = head // (h // num_kv)
    listed = set(blocks[row, query, kv].astype(int)) - {-1}
    if query in np.arange(1, 9) * t // 8 - 1:
      scores = k[row, keys, kv] @ q[row, query, head] * d**-0.5
      scores += bias[0][row, keys, kv] if bias else 0.0
      p = np.exp(scores - scores.max())
      p /= p.sum()
      entropies.append(-(p * np.log2(p)).sum())
      sinks.append(p[:2].sum())
      if query - keys[0] >= options.num_blocks * size:
        kept.append(p[[key // size in listed for key in keys]].sum())
    if head % (h // num_kv):
      continue
    initial, local = (0, 1) if method == "moba" else (1, 1)
    own, first = query // size, keys[0] // size
    must = {n for n in listed if n < first + initial or n > own - local}
    forced.append(len(must) / len(listed))
    if query > keys[0] and len(listed) == options.num_blocks:
      before = set(blocks[row, query - 1, kv].astype(int))
      overlaps.append(len(listed & before) / len(listed))
  expected = dict(
    attn_sparsity=np.mean(kept),
    entropy=np.mean(entropies),
    sink=np.mean(sinks),
    overlap_mean=np.mean(overlaps),
    overlap_min=np.min(overlaps),
    forced_share=np.mean(forced),
  )
  for name, value in expected.items():
    actual = found.layers[f"{stream}/{name}"][1]
    np.testing.assert_allclose(actual, value, atol=1e-4, err_msg=name)


def test_losses_are_those_of_validation_and_streams_differ():
  transformer, params, batch, found = take(attention__method="moba")
  losses = {}
  for stream in look.STREAMS:
    nll, _ = scoring.make_score(transformer, stream, 24)(params, batch)
    losses[stream] = float(nll.sum() / batch.weights.sum())
    np.testing.assert_allclose(found.model[f"loss_{stream}"], losses[stream], rtol=1e-5)
  np.testing.assert_allclose(
    found.model["gap"], losses["sparse"] - losses["full"], rtol=1e-3, atol=1e-5
  )
  assert found.model["kl"] > 1e-4


def test_with_every_block_allowed_nothing_is_lost():
  *_, found = take(attention__method="moba", attention__num_blocks=16)
  np.testing.assert_allclose(found.model["kl"], 0.0, atol=1e-5)
  # No query has more keys before it than it reads.
  assert "diagnostics/full/attn_sparsity" not in look.scalars(found)


def test_layers_of_a_pattern_have_their_own_numbers():
  *_, found = take(attention__layer_methods=("sliding_window", "moba"))
  kept = found.layers["sparse/attn_sparsity"]
  assert np.isnan(kept[0])
  assert 0.0 < kept[1] < 1.0
  values = look.scalars(found)
  assert "diagnostics/sparse/attn_sparsity/layer_0" not in values
  assert values["diagnostics/sparse/attn_sparsity"] == float(kept[1])
  entropy = found.layers["sparse/entropy"]
  assert values["diagnostics/sparse/entropy"] == pytest.approx(float(entropy.mean()))


def test_alignment_is_that_of_every_layer():
  transformer, params, batch, found = take(attention__method="ssa")
  output = transformer.apply(
    {"params": params}, batch.inputs, batch.positions, batch.segments, stream="train"
  )
  np.testing.assert_allclose(found.layers["align"], output.align_L, rtol=1e-4)


def test_rows_divide_over_devices_and_begin_again():
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  split = [jax.tree.map(lambda x, i=i: np.asarray(x[i]), small.make_batch(3)) for i in range(3)]
  batch = rows.first(split, 2, mesh)
  assert len(batch.inputs) == mesh.size
  for i in range(mesh.size):
    np.testing.assert_array_equal(batch.inputs[i], split[i % 3].inputs)
    assert jnp.array_equal(batch.weights[i], split[i % 3].weights)
