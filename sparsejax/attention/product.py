"""A product with one weight, as layers and methods of attention make theirs."""

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
    kernel = self.param("kernel", init, self.shape)
    return jnp.einsum(self.equation, x.astype(self.dtype), kernel.astype(self.dtype))
