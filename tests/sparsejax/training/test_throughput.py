"""Speed and means over a window of steps, on a clock that the test winds."""

import types

import jax.numpy as jnp
import pytest

from sparsejax import cost
from sparsejax.training import throughput
from tests import small

COSTS = throughput.Costs(
  tokens_per_step=1000,
  flops_per_token=6e6,
  dense_flops_per_token=9e6,
  peak_flops=1e12,
  num_devices=4,
)


@pytest.fixture
def clock(monkeypatch):
  fake = types.SimpleNamespace(now=100.0)
  fake.perf_counter = lambda: fake.now
  monkeypatch.setattr(throughput, "time", fake)
  return fake


def metrics(loss, full_share=1.0, **changes):
  values = dict(
    loss=loss,
    ce=loss - 1.0,
    align=0.5,
    accuracy=0.25,
    z_loss=4.0,
    full_share=full_share,
    num_skipped=0,
    grad_norm=2.0,
    learning_rate=0.1,
  )
  return {name: jnp.asarray(value) for name, value in (values | changes).items()}


def test_speed_is_tokens_over_time(clock):
  window = throughput.Window(COSTS)
  for _ in range(5):
    window.add(metrics(3.0))
  window.waited(0.5)
  window.waited(0.25)
  clock.now += 10.0
  values = window.summary()
  assert values["perf/step_seconds"] == pytest.approx(2.0)
  assert values["perf/tokens_per_second"] == pytest.approx(500.0)
  assert values["perf/tokens_per_second_per_device"] == pytest.approx(125.0)
  assert values["perf/data_wait_share"] == pytest.approx(0.075)
  assert values["perf/mfu"] == pytest.approx(500 * 6e6 / 1e12)
  assert values["perf/mfu_dense_equivalent"] == pytest.approx(500 * 9e6 / 1e12)


def test_a_pause_does_not_count(clock):
  window = throughput.Window(COSTS)
  window.add(metrics(9.0))
  window.waited(3.0)
  clock.now += 50.0
  window.restart()
  window.add(metrics(3.0))
  clock.now += 4.0
  values = window.summary()
  assert values["perf/step_seconds"] == pytest.approx(4.0)
  assert values["perf/data_wait_share"] == 0.0
  assert values["train/loss"] == pytest.approx(3.0)


def test_values_are_means_and_states_the_last(clock):
  window = throughput.Window(COSTS)
  taken = window.add(metrics(2.0))
  assert taken["loss"] == 2.0
  assert type(taken["num_skipped"]) is float
  window.add(metrics(4.0, num_skipped=3, learning_rate=0.2, grad_norm=6.0, accuracy=0.75))
  clock.now += 1.0
  values = window.summary()
  assert values["train/loss"] == pytest.approx(3.0)
  assert values["train/ce"] == pytest.approx(2.0)
  assert values["train/align"] == pytest.approx(0.5)
  assert values["train/accuracy"] == pytest.approx(0.5)
  assert values["train/z_loss"] == pytest.approx(4.0)
  assert values["opt/grad_norm"] == pytest.approx(4.0)
  assert values["opt/learning_rate"] == pytest.approx(0.2)
  assert values["train/num_skipped"] == 3


def test_losses_are_told_apart_by_the_stream_that_ran(clock):
  """Steps that ran partly on each stream (a coin per layer) belong to neither."""
  window = throughput.Window(COSTS)
  for loss, share in ((2.0, 1.0), (3.0, 1.0), (7.0, 0.0), (100.0, 0.5)):
    window.add(metrics(loss, share))
  clock.now += 1.0
  values = window.summary()
  assert values["train/ce_full"] == pytest.approx(1.5)
  assert values["train/ce_sparse"] == pytest.approx(6.0)


def test_a_stream_that_did_not_run_has_no_loss(clock):
  window = throughput.Window(COSTS)
  window.add(metrics(2.0, 0.0))
  clock.now += 1.0
  assert "train/ce_full" not in window.summary()
  assert "train/ce_sparse" in window.summary()


def test_there_is_no_mfu_where_the_peak_is_not_known(clock):
  window = throughput.Window(throughput.Costs(1000, 6e6, 9e6, None, 4))
  window.add(metrics(2.0))
  clock.now += 1.0
  assert not [name for name in window.summary() if "mfu" in name]


def test_costs_are_those_of_the_model_on_all_devices():
  transformer = small.make_model(attention__method="moba")
  costs = throughput.make_costs(transformer, batch_size=6, sequence_length=64, peak_tflops=2.0)
  shape, options = transformer.shape, transformer.options
  assert costs.tokens_per_step == 384
  assert costs.num_devices == 8
  assert costs.peak_flops == pytest.approx(8 * 2e12)
  assert costs.flops_per_token == cost.train_flops_per_token(shape, options, 64)
  assert costs.dense_flops_per_token == cost.dense_flops_per_token(shape, 64)
  assert costs.flops_per_token < costs.dense_flops_per_token


def test_the_peak_of_a_cpu_is_not_known():
  costs = throughput.make_costs(
    small.make_model(), batch_size=6, sequence_length=64, peak_tflops=None
  )
  assert costs.peak_flops is None
