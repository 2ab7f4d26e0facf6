"""The device mesh and what lies along each of its axes; the only file that names one."""

from collections.abc import Callable, Iterator
import contextlib
import math

from flax import linen as nn
import jax
import numpy as np

from sparsejax import errors

type Axes = tuple[str | None, ...]

AXES = ("data", "fsdp", "tensor")

# Logical axis of a parameter or an activation -> mesh axes it is divided over.
RULES = (
  ("batch", ("data", "fsdp")),
  ("length", None),
  ("embed", "fsdp"),
  ("mlp", "tensor"),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("head_dim", None),
  ("vocab", "tensor"),
  ("layers", None),
  ("norm", None),
  ("activation_embed", None),
)


def make_mesh(*, data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
  """A mesh over all devices; one of the sizes may be -1 to take what the others leave.

  Raises:
    ConfigError: the sizes do not multiply to the number of devices.
  """
  sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
  num_devices = len(jax.devices())
  given = math.prod(size for size in sizes.values() if size != -1)
  free = [name for name, size in sizes.items() if size == -1]
  if free and num_devices % given == 0:
    sizes[free[0]] = num_devices // given
  if math.prod(sizes.values()) != num_devices:
    asked = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    raise errors.ConfigError(
      f"{asked} do not multiply to the {num_devices} devices there are; set one of them to "
      "-1 to fit, or hide devices with CUDA_VISIBLE_DEVICES."
    )
  # Auto axes: with Explicit ones, make_mesh's default, linen's embedding refuses to trace.
  types = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types)


def check_batch(mesh: jax.sharding.Mesh, batch_size: int, accumulate_steps: int) -> None:
  """Checks that every device gets whole rows.

  Raises:
    ConfigError: a part of the batch does not divide over the devices that share it.
  """
  devices = mesh.shape["data"] * mesh.shape["fsdp"]
  part = batch_size // accumulate_steps
  if part % devices:
    fits = max(1, part // devices) * devices * accumulate_steps
    raise errors.ConfigError(
      f"data.batch_size={batch_size} in train.accumulate_steps={accumulate_steps} parts gives "
      f"{part} rows to {devices} devices (mesh.data x mesh.fsdp); take a batch_size of {fits} "
      "or another number of parts."
    )


@contextlib.contextmanager
def use(mesh: jax.sharding.Mesh) -> Iterator[None]:
  """A context in which logical axes mean axes of this mesh."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield


def of_tree(tree, mesh: jax.sharding.Mesh):
  """Shardings for a tree of boxed abstract parameters (from `jax.eval_shape(init)`)."""
  return nn.logical_to_mesh_sharding(nn.get_partition_spec(tree), mesh, RULES)


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """How the rows of a batch are divided."""
  return jax.sharding.NamedSharding(mesh, _spec(("batch",)))


def put_batch(batch, mesh: jax.sharding.Mesh):
  """Makes global arrays of the rows that this host has read, [B, ...] with B divided."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch
  )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """`x`, kept divided along its logical axes; nothing happens outside of a mesh."""
  return nn.with_logical_constraint(x, axes, rules=RULES)


def per_device(function: Callable, in_axes: tuple[Axes | None, ...], out_axes) -> Callable:
  """`function` run by each device on its own part of the arguments.

  For operations that need no communication but that the partitioner cannot see through:
  gathers with data-dependent indices, and GPU kernels, whose arguments it would gather whole
  on every device.

  Args:
    function: of arrays whose divided axes it treats elementwise.
    in_axes: logical axes of each argument; None for an argument that is None.
    out_axes: logical axes of the result, or a tuple of them.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return function
  in_specs = tuple(None if axes is None else _spec(axes) for axes in in_axes)
  is_single = isinstance(out_axes[0], str)
  out_specs = _spec(out_axes) if is_single else tuple(map(_spec, out_axes))
  return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _spec(axes: Axes) -> jax.sharding.PartitionSpec:
  return nn.logical_to_mesh_axes(axes, RULES)
