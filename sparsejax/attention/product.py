"""A product with one weight, as layers and methods of attention make theirs."""

import functools

from flax import linen as nn
import jax.numpy as jnp


class Product(nn.Module):
  """A product with one weight, `kernel`, that carries the logical axes it was given.

  `nn.DenseGeneral` would do, but constrains its kernel under the wrong rank in a mesh.
  """

  equation: str
  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  kernel_init: nn.initializers.Initializer
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    init = nn.with_logical_partitioning(self.kernel_init, self.axes)
    kernel = self.param("kernel", init, self.shape).astype(self.dtype)
    return of_rows(functools.partial(jnp.einsum, self.equation), x.astype(self.dtype), kernel)


def of_rows(product, x, weight):
  """`product(x, weight)` of one row as that of two: XLA has no fast kernel for one on a GPU.

  It would write all products of a weight's elements to memory and add them up, or make float32
  of the weight first, every time that a token is decoded by itself.
  """
  if x.size != x.shape[-1]:
    return product(x, weight)
  return product(jnp.concatenate([x, x]), weight)[:1]
