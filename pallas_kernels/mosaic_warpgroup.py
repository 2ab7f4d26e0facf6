"""Matrix products in which all warps of a thread work as one, for Mosaic GPU kernels.

Where the 64 rows of a thread meet the same right-hand side, the warpgroup's instruction
reads it once for all of them, at about twice the rate of what `mosaic_warp` does. Several
products are given together, so that they are all on their way before one is waited for.

Left operands of `add_products` are in registers, which the interpreter has no such product
for: there, everything is plain arithmetic.
"""

from collections.abc import Sequence

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp


def products(pairs: Sequence[tuple], *, interpreted: bool) -> list[jax.Array]:
  """float32 [64, N] for each pair: its rows [64, D] times its keys [N, D].

  Args:
    pairs: of tiled shared-memory arrays, bfloat16.
    interpreted: whether the kernel runs in the interpreter.
  """
  if interpreted:
    return [_dot(rows[...], keys[...].T) for rows, keys in pairs]

  def run(*accumulators):
    for accumulator, (rows, keys) in zip(accumulators, pairs, strict=True):
      plgpu.wgmma(accumulator, rows, keys.transpose((1, 0)))
    last = len(pairs) - 1
    return [
      plgpu.wgmma_accumulator_load(x, wait_n=last - i) for i, x in enumerate(accumulators)
    ]

  shapes = [(rows.shape[0], keys.shape[0]) for rows, keys in pairs]
  return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def add_products(terms: Sequence[tuple], *, interpreted: bool) -> list[jax.Array]:
  """float32 [64, D] for each term: its total plus its weights [64, N] times its rows [N, D].

  Args:
    terms: a total, float32; weights, bfloat16; and a tiled shared-memory array, bfloat16.
    interpreted: whether the kernel runs in the interpreter.
  """
  if interpreted:
    return [total + _dot(weights, rows[...]) for total, weights, rows in terms]

  def run(accumulators):
    for accumulator, (_, weights, rows) in zip(accumulators, terms, strict=True):
      plgpu.wgmma(accumulator, weights, rows)

  return pl.run_state(run)([plgpu.ACC.init(total) for total, _, _ in terms])


def _dot(a, b):
  return jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
