"""Kernels that write into arrays which are there already, in the host's memory too.

A reference that a kernel writes to has an effect, for which some transformations, such as
flax's scan over layers, refuse a function. And Pallas says of every result that it lies in
device memory, XLA of a result that takes the place of an operand that it lies where that
does. Such a kernel is therefore a primitive of its own here: it has no effect, and its results
have the types of what they replace. Compiled, it is the kernel and nothing else.
"""

from collections.abc import Callable, Sequence

import jax
from jax.extend import core
from jax.interpreters import mlir

_replace_p = core.Primitive("replace_in_place")
_replace_p.multiple_results = True


def replace(
  kernel: Callable[..., Sequence[jax.Array]],
  targets: Sequence[jax.Array],
  *others: jax.Array,
  made: tuple[jax.ShapeDtypeStruct, ...] = (),
) -> tuple[jax.Array, ...]:
  """Returns what `kernel(targets, *others)` does, where the targets are.

  The caller of the program donates the targets; XLA would copy them otherwise.

  Args:
    kernel: a function of a module, which is traced with all arrays typed as if they were in
      device memory. Its results take the places of the targets (`input_output_aliases`), in
      their order. It has no other effect.
    targets: in any memory.
    others: in any memory.
    made: what the kernel returns after them, in device memory.
  """
  made = tuple((x.shape, x.dtype.name) for x in made)
  return tuple(
    _replace_p.bind(*targets, *others, kernel=kernel, num_targets=len(targets), made=made)
  )


_jitted = jax.jit(_replace_p.bind, static_argnames=("kernel", "num_targets", "made"))
_replace_p.def_impl(_jitted)


@_replace_p.def_abstract_eval
def _types(*avals, kernel, num_targets, made):
  del kernel
  return *avals[:num_targets], *(jax.core.ShapedArray(shape, dtype) for shape, dtype in made)


def _lower(ctx, *operands, kernel, num_targets, made):
  del made

  def run(*arrays):
    return tuple(kernel(arrays[:num_targets], *arrays[num_targets:]))

  device = jax.memory.Space.Device
  # What lies where is not in the types of StableHLO: XLA follows it from the program's
  # parameters through the kernel to its results.
  ctx = ctx.replace(
    avals_in=[aval.update(memory_space=device) for aval in ctx.avals_in],
    avals_out=[aval.update(memory_space=device) for aval in ctx.avals_out],
  )
  return mlir.lower_fun(run, multiple_results=True)(ctx, *operands)


mlir.register_lowering(_replace_p, _lower)
