"""What is asked of the devices before a kernel is chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_attention, devices, select_blocks
from tests.pallas_kernels import problems

P = jax.sharding.PartitionSpec
ROWS = P("data")
DIVIDED = "needs jax.shard_map for arrays of a mesh of 8 devices"


def make_mesh(data=8, tensor=1, kind=jax.sharding.AxisType.Auto):
  found = jax.devices()[: data * tensor]
  return jax.make_mesh(
    (data, tensor), ("data", "tensor"), axis_types=(kind,) * 2, devices=found
  )


def put(x, mesh, spec=ROWS):
  return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))


class Asked:
  """A function that asks, wherever it is traced, and returns its argument."""

  def __call__(self, x):
    self.answer = devices.why_not_divided((x, None))
    return x


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
@pytest.mark.parametrize("spec", [ROWS, P()], ids=["divided", "replicated"])
def test_arrays_of_a_mesh_are_refused_in_and_out_of_jit(kind, spec):
  """Replicated ones too: inside of a program, nothing tells them apart."""
  ask = Asked()
  x = put(jnp.ones((8, 4)), make_mesh(kind=kind), spec)
  for run in (ask, jax.jit(ask), jax.jit(lambda x: ask(2 * x))):
    run(x)
    assert ask.answer == DIVIDED
  shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  assert devices.why_not_divided(shape) == DIVIDED


def test_a_mesh_around_the_call_is_enough():
  ask = Asked()
  with jax.set_mesh(make_mesh()):
    jax.jit(ask)(jnp.ones((8, 4)))
  assert ask.answer == DIVIDED


def test_arrays_of_one_device_are_fine():
  ask = Asked()
  x = np.ones((8, 4), np.float32)
  alone = make_mesh(data=1)
  for one in (x, jnp.asarray(x), jax.ShapeDtypeStruct((8, 4), jnp.float32), put(x, alone)):
    assert devices.why_not_divided(one) is None
  with jax.set_mesh(alone):
    jax.jit(ask)(put(x, alone))
  assert ask.answer is None


def test_in_shard_map_every_device_has_its_own():
  ask = Asked()
  mesh = make_mesh(data=4, tensor=2)
  x = put(jnp.ones((8, 4)), mesh)
  run = functools.partial(jax.shard_map, ask, mesh=mesh, in_specs=ROWS, check_vma=False)
  jax.jit(run(out_specs=ROWS))(x)
  assert ask.answer is None
  # An axis that is left to the partitioner.
  jax.jit(run(out_specs=ROWS, axis_names={"data"}))(x)
  assert ask.answer == "needs jax.shard_map for arrays of a mesh of 2 devices"


@pytest.fixture
def hopper(monkeypatch):
  """A machine that calls itself one, so that nothing but the mesh stands against kernels."""
  monkeypatch.setattr(devices, "why_not_hopper", lambda: None)


def test_over_a_mesh_auto_takes_xla_and_strict_refuses(hopper):
  problem = problems.make(8, 32, 4, 2, 64, 16, 2)
  arrays = [x.astype(jnp.bfloat16) for x in (problem.q, problem.k, problem.v)]

  def run(q, k, v, implementation="auto"):
    options = dict(block_size=16, implementation=implementation)
    blocks = select_blocks(q, k, num_blocks=2, **options)
    return blocks, *block_sparse_attention(q, k, v, blocks, **options)

  divided = [put(x, make_mesh()) for x in arrays]
  wanted = jax.jit(functools.partial(run, implementation="xla"))(*arrays)
  for actual, exact in zip(jax.jit(run)(*divided), wanted, strict=True):
    np.testing.assert_array_equal(actual, exact)
  for implementation in ("strict", "mosaic_gpu"):
    with pytest.raises(
      ValueError, match=f"block_selection: .* cannot run: mosaic_gpu {DIVIDED}"
    ):
      run(*divided, implementation)
    with pytest.raises(
      ValueError, match=f"sparse_attention: .* cannot run: mosaic_gpu {DIVIDED}"
    ):
      block_sparse_attention(*divided, wanted[0], block_size=16, implementation=implementation)
