"""What training carries from step to step, and how it comes to be on the devices."""

from flax import linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from sparsejax import model, parameters, sharding


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes.

  Attributes:
    step: steps taken, skipped ones included: the position in data and of the coin.
    params: float32.
    opt_state: of the optimizer.
    num_skipped: steps whose loss or gradient was not finite, and that changed nothing.
    num_skipped_in_a_row: of those, how many ended the run of steps so far.
  """

  step: jax.Array
  params: dict
  opt_state: optax.OptState
  num_skipped: jax.Array
  num_skipped_in_a_row: jax.Array


def abstract_state(
  transformer: model.Transformer,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
) -> TrainState:
  """Shapes, dtypes and shardings of a state; nothing is allocated."""
  return parameters.abstract_of(lambda: _init(transformer, optimizer, jax.random.key(0)), mesh)


def init_state(
  transformer: model.Transformer,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  seed: int,
) -> TrainState:
  """A state at step 0, made where it will live: never whole on one device."""
  shardings = jax.tree.map(lambda x: x.sharding, abstract_state(transformer, optimizer, mesh))
  make = jax.jit(
    lambda seed: nn.unbox(_init(transformer, optimizer, jax.random.key(seed))),
    out_shardings=shardings,
  )
  # Not inside of `sharding.use`: the one row that shapes are found with divides among nobody.
  return make(jax.device_put(jnp.uint32(seed), sharding.replicated(mesh)))


def _init(transformer, optimizer, rng) -> TrainState:
  """A state whose parameters are still boxed with their logical axes."""
  params = parameters.init(transformer, rng)
  zero = jnp.zeros((), jnp.int32)
  return TrainState(zero, params, optimizer.init(params), zero, zero)
