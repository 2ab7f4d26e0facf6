"""Block-sparse attention in plain XLA, for any device; memory is O(T x keys read).

Queries are taken in stripes. Where the lists cover a fair share of the keys, a stripe is
compared with every key and the unlisted ones are masked: dense matrix products, no gather.
Where they cover little, the listed blocks are gathered for every query. Both recompute the
scores in the backward pass.
"""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.block_sparse_attention import problem as problems
from pallas_kernels.block_sparse_attention import xla_gathered, xla_masked

# A query must read less than one key in so many before gathering beats masking: a gathered
# key is read once per query, a masked one once per stripe.
MASKED_UP_TO = 16
# What the backward pass needs besides its inputs, for rematerialisation policies.
RESIDUAL_NAME = "attention_residual"


@functools.partial(jax.custom_vjp, nondiff_argnames=("known_offset", "block_size", "scale"))
def block_sparse_attention(
  problem: problems.Problem, known_offset: int | None, block_size: int, scale: float
):
  return _forward(problem, known_offset, block_size, scale)[0]


def _forward(problem, known_offset, block_size, scale):
  out_BTHD, lse_BTH = _way(problem, block_size).forward(
    problem, known_offset=known_offset, block_size=block_size, scale=scale
  )
  out_BTHD = checkpoint_name(out_BTHD, RESIDUAL_NAME)
  lse_BTH = checkpoint_name(lse_BTH, RESIDUAL_NAME)
  return (out_BTHD, lse_BTH), (problem, lse_BTH)


def _backward(known_offset, block_size, scale, residuals, cotangents):
  problem, lse_BTH = residuals
  gradients = _way(problem, block_size).backward(
    problem,
    lse_BTH,
    *cotangents,
    known_offset=known_offset,
    block_size=block_size,
    scale=scale,
  )
  return (problems.cotangent(problem, *gradients),)


block_sparse_attention.defvjp(_forward, _backward)


def _way(problem, block_size):
  num_read = problem.blocks_BTKM.shape[-1] * block_size
  is_dense_enough = problem.k_BSKD.shape[1] <= MASKED_UP_TO * num_read
  return xla_masked if is_dense_enough else xla_gathered
