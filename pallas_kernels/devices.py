"""What the first device is, and what is asked of it, for choosing between implementations."""

import math

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


def why_not_divided(arrays) -> str | None:
  """Why kernels cannot take these arrays, or shapes for arrays; None if they can.

  A kernel is a custom call, which XLA's partitioner cannot divide: it would gather whole
  arrays on every device of a mesh and have each do all of the work, in silence. In
  `jax.shard_map`, over all axes of the mesh, every device has arrays of its own. (cuDNN's
  calls come with rules for the partitioner.)
  """
  meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arrays)]
  num_devices = max(map(_num_devices_to_divide_over, meshes))
  if num_devices > 1:
    return f"needs jax.shard_map for arrays of a mesh of {num_devices} devices"
  return None


def _num_devices_to_divide_over(mesh: jax.sharding.AbstractMesh) -> int:
  axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
  return math.prod(size for size, kind in axes if kind != jax.sharding.AxisType.Manual)


def num_multiprocessors() -> int:
  """Streaming multiprocessors of the first device, or of a Hopper GPU where it has none."""
  return getattr(jax.devices()[0], "core_count", None) or _NUM_MULTIPROCESSORS
