"""The one place that calls Triton kernels from JAX."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How a kernel is laid out.

  Attributes:
    step: keys, or lines of queries, that a loop takes at a time.
    num_warps: warps of a program.
    num_stages: steps whose loads are under way at the same time.
  """

  step: int
  num_warps: int
  num_stages: int


def call(kernel, *arrays, out_type, grid, num_warps: int, num_stages: int, **constants):
  """Runs `kernel(*arrays, *outputs, **constants)` once for each point of a grid.

  Args:
    kernel: a function under `triton.jit`.
    arrays: inputs, of which the kernel sees pointers.
    out_type: shapes and dtypes of the outputs, a tuple or one of them.
    grid: how many programs, one to three numbers.
    num_warps, num_stages: see `Config`.
    constants: arguments of the kernel that are marked as compile-time constants.
  """
  # Not at the top: jax_triton is an extra, and cannot be imported where JAX has no GPU.
  import jax_triton

  return jax_triton.triton_call(
    *arrays,
    kernel=kernel,
    out_shape=out_type,
    grid=grid,
    num_warps=num_warps,
    num_stages=num_stages,
    **constants,
  )
