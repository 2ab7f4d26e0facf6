"""Whether what the benchmark times is right, at a length that the definition can take."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import benchmark_lists
from pallas_kernels.benchmark_shape import Shape, make_inputs
from pallas_kernels.block_selection.api import select_blocks
from pallas_kernels.block_sparse_attention import mosaic_gpu, reference
from pallas_kernels.block_sparse_attention.problem import Problem

# Largest root mean square of an error over that of the value, for bfloat16 results.
TOLERANCE = 5e-3
# Lists may differ where rounding decides between scores, but no more often than this.
MOST_DIFFERENT = 0.01
_NAMES = "out", "lse", "dq", "dk", "dv"


class Check:
  """Compiled, to be run with `errors`.

  Args:
    shape: of what is timed.
  """

  def __init__(self, shape: Shape):
    self._shape = short = dataclasses.replace(
      shape, batch=1, length=max(1024, 4 * shape.block_size)
    )
    q, k, v, dout = jax.eval_shape(lambda: make_inputs(short))
    blocks = jax.ShapeDtypeStruct((*k.shape[:3], short.num_blocks), jnp.int32)

    def outputs(attend, dtype, q, k, v, blocks, dout):
      def of(q, k, v):
        problem = Problem(q, k, v, blocks, jnp.int32(0), None, None)
        return attend(problem, 0, short.block_size, short.head_dim**-0.5)

      (out, lse), vjp = jax.vjp(of, *(x.astype(dtype) for x in (q, k, v)))
      return out, lse, *vjp((dout.astype(dtype), jnp.zeros_like(lse)))

    def both(*args):
      exact = outputs(reference.block_sparse_attention, jnp.float32, *args)
      return exact, outputs(mosaic_gpu.block_sparse_attention, jnp.bfloat16, *args)

    def lists(q, k):
      """Those of the kernel, and those that XLA finds."""
      sizes = dict(block_size=short.block_size, num_blocks=short.num_blocks)
      return [
        jnp.sort(select_blocks(q, k, implementation=name, **sizes), axis=-1)
        for name in ("mosaic_gpu", "xla")
      ]

    self._lists = jax.jit(lists).lower(q, k).compile()
    self._both = jax.jit(both).lower(q, k, v, blocks, dout).compile()

  def errors(self, kind: str) -> dict[str, float]:
    """Errors of every output and gradient, on one kind of lists.

    Raises:
      AssertionError: one of them is too large.
    """
    q, k, v, dout = make_inputs(self._shape, seed=1)
    sizes = dict(block_size=self._shape.block_size, num_blocks=self._shape.num_blocks)
    kind = "clustered" if ".npy" in kind else kind
    blocks = benchmark_lists.make_lists(kind, q, k, **sizes)
    chosen, expected = self._lists(q, k)
    different = float((chosen != expected).any(-1).mean())
    assert different <= MOST_DIFFERENT, f"{different:.1%} of the chosen lists are others"
    errors = {"lists": different}
    for name, exact, actual in zip(_NAMES, *self._both(q, k, v, blocks, dout), strict=True):
      difference = actual.astype(jnp.float32) - exact
      errors[name] = float(jnp.sqrt(jnp.square(difference).mean() / jnp.square(exact).mean()))
      assert errors[name] <= TOLERANCE, f"{name} of {kind} lists is off by {errors[name]:.1e}"
    return errors
