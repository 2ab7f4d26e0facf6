"""Meshes, and functions that every device runs on its own part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import errors, sharding


def test_minus_one_takes_what_is_left():
  assert dict(sharding.make_mesh(data=-1, fsdp=2, tensor=1).shape) == dict(
    data=4, fsdp=2, tensor=1
  )


@pytest.mark.parametrize("sizes", [(2, 1, 1), (3, -1, 1), (16, 1, 1), (-1, 3, 1)])
def test_a_mesh_that_is_not_the_devices_is_refused(sizes):
  data, fsdp, tensor = sizes
  with pytest.raises(errors.ConfigError, match=r"8 devices there are; set one of them to -1"):
    sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor)


def test_rows_that_do_not_divide_are_refused():
  mesh = sharding.make_mesh(data=4, fsdp=2, tensor=1)
  sharding.check_batch(mesh, 32, 2)
  with pytest.raises(errors.ConfigError, match=r"gives 12 rows to 8 devices.*batch_size of 16"):
    sharding.check_batch(mesh, 24, 2)


def test_a_batch_lies_over_data_and_fsdp():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  rows = np.arange(8 * 3).reshape(8, 3)
  batch = sharding.put_batch({"x": rows}, mesh)["x"]
  np.testing.assert_array_equal(batch, rows)
  assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}


def test_each_device_runs_its_part():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  shapes = []

  def double(x, nothing):
    assert nothing is None
    shapes.append(x.shape)
    return 2 * x

  x = jnp.arange(8.0 * 5 * 4).reshape(8, 5, 4)
  with sharding.use(mesh):
    run = sharding.per_device(
      double, (("batch", None, "heads"), None), ("batch", None, "heads")
    )
    doubled = jax.jit(lambda x: run(x, None))(x)
  np.testing.assert_array_equal(doubled, 2 * x)
  assert shapes == [(2, 5, 2)]


def test_outside_of_a_mesh_it_is_the_function_itself():
  def double(x):
    return 2 * x

  assert sharding.per_device(double, (("batch",),), ("batch",)) is double


def test_constraints_name_logical_axes():
  mesh = sharding.make_mesh(data=4, fsdp=1, tensor=2)
  with sharding.use(mesh):
    x = jax.jit(lambda x: sharding.constrain(x, "batch", "heads"))(jnp.ones((8, 4)))
  assert {shard.data.shape for shard in x.addressable_shards} == {(2, 2)}
