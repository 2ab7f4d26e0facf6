"""What a run would be, without running it: shapes, sizes, memory, and a compiled step."""

from collections.abc import Iterator

from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_collections

from sparsejax import cost, sharding
from sparsejax.configuration import build, checks, record
from sparsejax.data import batch as data
from sparsejax.training import loop
from sparsejax.training import state as states
from sparsejax.training import step as steps

# Rows are assumed to hold up to this many documents where no data is read.
ASSUMED_DOCUMENTS = 16


def run(config: ml_collections.ConfigDict) -> Iterator[str]:
  """Yields lines on a config's model and memory; reads no data and writes nothing.

  Raises:
    ConfigError: the config contradicts itself or the devices.
  """
  checks.check(config)
  mesh = sharding.make_mesh(**config.mesh)
  sharding.check_batch(mesh, config.data.batch_size, config.train.accumulate_steps)
  transformer = build.make_model(config, max_documents=ASSUMED_DOCUMENTS)
  backends = build.choose_backends(config, transformer)
  optimizer, schedule = build.make_optimizer(config)
  state = states.abstract_state(transformer, optimizer, mesh)

  yield f"config {record.digest(config)}"
  for path, x in traverse_util.flatten_dict(state.params, sep="/").items():
    spec = tuple(x.sharding.spec)
    yield f"  {path:48} {x.shape!s:24} {x.dtype} over {spec}"
  yield from loop.describe(transformer, None, mesh, state, backends)
  per_token = cost.train_flops_per_token(
    transformer.shape, transformer.options, config.data.sequence_length
  )
  tokens = config.data.batch_size * config.data.sequence_length
  yield (
    f"work: {tokens:,} tokens a step, {per_token * tokens:.3g} FLOP a step, "
    f"{per_token * tokens * config.train.num_steps:.3g} FLOP in all"
  )
  yield "compiling one step ..."
  train_step = steps.make_train_step(
    transformer,
    optimizer,
    schedule,
    build.make_loss_options(config),
    accumulate_steps=config.train.accumulate_steps,
  )
  with sharding.use(mesh):
    compiled = (
      jax.jit(train_step, donate_argnums=0)
      .lower(state, _abstract_batch(config, mesh), jax.eval_shape(lambda: jax.random.key(0)))
      .compile()
    )
  memory = compiled.memory_analysis()
  if memory is None:
    yield "memory of a step: the backend does not say"
  else:
    yield (
      f"memory of a step, per device: {memory.argument_size_in_bytes / 2**30:.3f} GiB of state "
      f"and batch, {memory.temp_size_in_bytes / 2**30:.3f} GiB of intermediates"
    )


def _abstract_batch(config, mesh) -> data.Batch:
  rows = config.data.batch_size, config.data.sequence_length
  sharding_ = sharding.batch_sharding(mesh)

  def field(dtype):
    return jax.ShapeDtypeStruct(rows, dtype, sharding=sharding_)

  ids = field(jnp.int32)
  return data.Batch(ids, ids, field(jnp.float32), ids, ids)
