"""What the first device is, for choosing between implementations."""

import jax

# Of an H100 or H200, where there is no device to ask.
_NUM_MULTIPROCESSORS = 132


def why_not_hopper() -> str | None:
  """Why kernels for Hopper cannot run here; None if they can."""
  device = jax.devices()[0]
  if device.platform != "gpu":
    return f"needs a Hopper GPU, this is {device.device_kind}"
  capability = device.compute_capability
  if capability != "9.0":
    return f"needs compute capability 9.0 (H100, H200), {device.device_kind} has {capability}"
  return None


def num_multiprocessors() -> int:
  """Streaming multiprocessors of the first device, or of a Hopper GPU where it has none."""
  return getattr(jax.devices()[0], "core_count", None) or _NUM_MULTIPROCESSORS
