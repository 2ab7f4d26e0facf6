"""Counting against brute force."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from sparsejax import cost
from tests import small


def read_keys(length, block_size, num_blocks):
  """Keys each query reads if it always finds `num_blocks` blocks, one query at a time."""
  for t in range(length):
    own = t // block_size
    yield min(num_blocks - 1, own) * block_size + t % block_size + 1


@pytest.mark.parametrize("length", [64, 61, 8, 5])
@pytest.mark.parametrize("num_blocks", [1, 3, 8])
def test_keys_read(length, num_blocks):
  options = dataclasses.replace(small.make_model().options, num_blocks=num_blocks)
  expected = np.mean(list(read_keys(length, 8, num_blocks)))
  np.testing.assert_allclose(cost.mean_keys_sparse(length, options), expected)
  np.testing.assert_allclose(cost.mean_keys_full(length), np.mean(np.arange(length) + 1))


def test_every_block_costs_full_attention():
  options = dataclasses.replace(small.make_model().options, num_blocks=8)
  np.testing.assert_allclose(cost.mean_keys_sparse(64, options), cost.mean_keys_full(64))


@pytest.mark.parametrize("window", [1, 5, 64, 100])
def test_keys_read_of_a_window(window):
  expected = np.mean([min(t + 1, window) for t in range(64)])
  np.testing.assert_allclose(cost.mean_keys_window(64, window), expected)


@pytest.mark.parametrize(("size", "stride"), [(8, 4), (12, 4), (8, 8), (80, 8)])
def test_windows_seen(size, stride):
  expected = np.mean(
    [sum(start + size - 1 <= t for start in range(0, 64, stride)) for t in range(64)]
  )
  np.testing.assert_allclose(cost.mean_windows(64, size, stride), expected)


@pytest.mark.parametrize("kv", ["separate", "shared"])
@pytest.mark.parametrize("compression", ["mlp", "mean"])
def test_nsa_costs_its_branches_and_six_per_weight_of_its_own(kv, compression):
  transformer = small.make_model(
    attention__method="nsa", nsa__kv=kv, nsa__compression=compression
  )
  own = small.make_params(transformer)["layers"]["self_attn"]["sparse"]
  # The weights of the compression see one token in four, less what the row's end cuts off.
  compress = [own.pop(name) for name in ("k_compress", "v_compress") if name in own]
  uses = cost.num_parameters(own)
  uses += sum(cost.num_parameters([x["up"], x["down"]]) for x in compress) * 15 / 64
  matrices = cost.dense_flops_per_token(transformer.shape, 1) - 2 * 12 * 4 * 8
  windows = cost.mean_windows(64, 8, 4)
  keys = np.mean(list(read_keys(64, 8, 3))) + windows + cost.mean_keys_window(64, 12)
  # Both layers; scores of the selection are products with keys alone, forward only.
  expected = matrices + 6 * uses + 2 * 4 * 8 * (12 * keys + 2 * windows)
  actual = cost.train_flops_per_token(transformer.shape, transformer.options, 64)
  assert actual == pytest.approx(expected)


def test_matrices_cost_six_per_parameter_and_token():
  """The rule of thumb: 6 N, N without the embedding table but with the unembedding."""
  transformer = small.make_model(attention__method="full")
  params = small.make_params(transformer)
  scales = 2 * 2 * 32 + 32
  dense = cost.dense_flops_per_token(transformer.shape, 1)
  # A row of one token attends to itself: 12 H D per layer.
  attention = 2 * 12 * 4 * 8
  assert dense == 6 * (cost.num_parameters(params) - scales) + attention


def test_methods_in_order():
  def flops(method):
    transformer = small.make_model(attention__method=method)
    return cost.train_flops_per_token(transformer.shape, transformer.options, 64)

  dense = cost.dense_flops_per_token(small.make_model().shape, 64)
  assert flops("full") == dense
  assert flops("moba") < flops("full") < flops("ssa")
  # SSA runs both streams, and the selection once.
  matrices = cost.dense_flops_per_token(small.make_model().shape, 1) - 2 * 12 * 4 * 8
  assert flops("ssa") == pytest.approx(flops("full") + flops("moba") - matrices)
  # Two layers of 12 operations for every channel of every head and key.
  reads = 2 * 12 * 4 * 8 * cost.mean_keys_window(64, 12)
  assert flops("sliding_window") == pytest.approx(matrices + reads)


@pytest.mark.parametrize(
  ("changes", "scores", "has_head"),
  [
    (dict(attention__method="moba"), 1 / 8, False),
    (dict(attention__method="infllmv2"), 1 / 2, False),
    (dict(attention__method="infllmv2", infllmv2__normalizer="coarse"), 1 / 2 + 1 / 8, False),
    (dict(attention__method="nosa"), 1 / 2, True),
    (dict(attention__method="nosa", nosa__num_query_aware=0), 0, True),
    (dict(attention__method="dma"), 0, True),
  ],
)
def test_selection_and_heads_cost_their_products(changes, scores, has_head):
  """Beside the keys that are read: 2 H D per score forward; 6 (K D) K for a head."""
  transformer = small.make_model(**changes)
  shape, options = transformer.shape, transformer.options
  matrices = cost.dense_flops_per_token(shape, 1) - 2 * 12 * 4 * 8
  read = 2 * 12 * 4 * 8 * cost.mean_keys_sparse(64, options)
  selection = 2 * (2 * 4 * 8 * cost.mean_keys_full(64) * scores + has_head * 6 * 2 * 8 * 2)
  flops = cost.train_flops_per_token(shape, options, 64)
  assert flops == pytest.approx(matrices + read + selection)


@pytest.mark.parametrize("method", ["infllmv2", "ssa"])
def test_a_dense_row_costs_full_attention_once(method):
  for dense_length, is_dense in ((65, True), (64, False)):
    transformer = small.make_model(
      attention__method=method,
      attention__sparse_method="infllmv2",
      infllmv2__dense_length=dense_length,
    )
    flops = cost.train_flops_per_token(transformer.shape, transformer.options, 64)
    assert (flops == cost.dense_flops_per_token(transformer.shape, 64)) == is_dense


@pytest.mark.parametrize(
  ("kind", "expected"),
  [
    ("NVIDIA H200", 989.0),
    ("NVIDIA H100 80GB HBM3", 989.0),
    ("NVIDIA H100 PCIe", 756.0),
    ("NVIDIA A100-SXM4-80GB", 312.0),
    ("NVIDIA L40S", 362.0),
    ("NVIDIA L4", 121.0),
    ("NVIDIA GeForce RTX 4090", 165.0),
    ("cpu", None),
  ],
)
def test_peaks(kind, expected):
  assert cost.peak_tflops(SimpleNamespace(device_kind=kind)) == expected
