"""Speed over the steps since the last line."""

import dataclasses
import time

import jax
import numpy as np

from sparsejax import cost


@dataclasses.dataclass(frozen=True)
class Costs:
  """What a step costs and the devices can do at best.

  Attributes:
    tokens_per_step: of the global batch.
    flops_per_token: as the method needs them.
    dense_flops_per_token: of one pass of full attention.
    peak_flops: of all devices together, per second; None where it is not known.
    num_devices: all of them.
  """

  tokens_per_step: int
  flops_per_token: float
  dense_flops_per_token: float
  peak_flops: float | None
  num_devices: int


class Window:
  """Gathers the metrics of several steps into one record."""

  def __init__(self, costs: Costs):
    self._costs = costs
    self.restart()

  def restart(self) -> None:
    """Begins to count anew: after a line, and after a pause that is no training."""
    self._started = time.perf_counter()
    self._waited = 0.0
    self._steps: list[dict[str, float]] = []

  def waited(self, seconds: float) -> None:
    """Counts time in which the devices had no data."""
    self._waited += seconds

  def add(self, metrics: dict[str, jax.Array]) -> dict[str, float]:
    """Takes the metrics of one step off the device and returns them."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    self._steps.append(values)
    return values

  def summary(self) -> dict[str, float]:
    """Means over the window's steps, and its speed, by the names of metrics.jsonl."""
    steps, last = self._steps, self._steps[-1]
    seconds = time.perf_counter() - self._started
    step_seconds = seconds / len(steps)
    speed = self._costs.tokens_per_step / step_seconds
    values = {
      f"train/{name}": _mean(steps, name)
      for name in ("loss", "ce", "align", "accuracy", "z_loss")
    }
    # Steps that ran wholly on one stream; the coin decides how many there are.
    for stream, share in (("full", 1.0), ("sparse", 0.0)):
      chosen = [values for values in steps if values["full_share"] == share]
      if chosen:
        values[f"train/ce_{stream}"] = _mean(chosen, "ce")
    values |= {
      "train/num_skipped": last["num_skipped"],
      "opt/grad_norm": _mean(steps, "grad_norm"),
      "opt/learning_rate": last["learning_rate"],
      "perf/tokens_per_second": speed,
      "perf/tokens_per_second_per_device": speed / self._costs.num_devices,
      "perf/step_seconds": step_seconds,
      "perf/data_wait_share": self._waited / seconds,
    }
    if self._costs.peak_flops:
      peak = self._costs.peak_flops
      values["perf/mfu"] = speed * self._costs.flops_per_token / peak
      values["perf/mfu_dense_equivalent"] = speed * self._costs.dense_flops_per_token / peak
    return values


def _mean(steps: list[dict[str, float]], name: str) -> float:
  return float(np.mean([values[name] for values in steps]))


def make_costs(
  transformer, *, batch_size: int, sequence_length: int, peak_tflops: float | None
) -> Costs:
  """The costs of training a model on rows of a length."""
  devices = jax.devices()
  peak = peak_tflops or cost.peak_tflops(devices[0])
  shape, options = transformer.shape, transformer.options
  return Costs(
    tokens_per_step=batch_size * sequence_length,
    flops_per_token=cost.train_flops_per_token(shape, options, sequence_length),
    dense_flops_per_token=cost.dense_flops_per_token(shape, sequence_length),
    peak_flops=peak * 1e12 * len(devices) if peak else None,
    num_devices=len(devices),
  )
