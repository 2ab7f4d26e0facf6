"""A model's parameters before and as they come to be on the devices."""

from collections.abc import Callable
import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from sparsejax import model, sharding


def init(transformer: model.Transformer, rng: jax.Array) -> dict:
  """New parameters, each boxed with its logical axes (see `abstract_of`).

  They are the same whatever attention runs on, and however it selects.
  """
  # One row cannot be divided over a mesh, and kernels refuse one that is not. It has one
  # block, of which `half_local` could take no half.
  options = dataclasses.replace(
    transformer.options,
    full_implementation="xla",
    sparse_implementation="xla",
    selection="exact",
  )
  ids = jnp.zeros((1, options.block_size), jnp.int32)
  return transformer.clone(options=options).init(rng, ids, ids, ids + 1)["params"]


def abstract(transformer: model.Transformer, mesh: jax.sharding.Mesh) -> dict:
  """Shapes, dtypes and shardings of the parameters; nothing is allocated."""
  return abstract_of(lambda: init(transformer, jax.random.key(0)), mesh)


def abstract_of(make: Callable, mesh: jax.sharding.Mesh):
  """The same for the tree that `make()` returns, with or without boxes."""
  boxed = jax.eval_shape(make)
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    nn.unbox(boxed),
    sharding.of_tree(boxed, mesh),
  )
