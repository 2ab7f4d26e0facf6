"""Block-sparse attention on Hopper GPUs, in kernels of Pallas Mosaic GPU."""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import problem as problems
from pallas_kernels.block_sparse_attention.mosaic_gpu_call import (
  Call,
  dq_operands,
  entries_per_unit,
  query_config,
)
from pallas_kernels.block_sparse_attention.mosaic_gpu_dq import Lines
from pallas_kernels.block_sparse_attention.mosaic_gpu_shape import UNIT
from pallas_kernels.block_sparse_attention.xla import RESIDUAL_NAME

HEAD_DIMS = (64, 128)
BLOCK_SIZES = (16, 32, 64, 128)


def why_not(problem: problems.Problem, block_size: int) -> str | None:
  """Why these kernels cannot take a problem; None if they can."""
  dtype, d = problem.q_BTHD.dtype, problem.q_BTHD.shape[-1]
  heads = problem.q_BTHD.shape[2] // problem.k_BSKD.shape[2]
  if dtype != jnp.bfloat16:
    return f"takes bfloat16, not {dtype.name}"
  if d not in HEAD_DIMS:
    return f"takes head sizes {HEAD_DIMS}, not {d}"
  if block_size not in BLOCK_SIZES:
    return f"takes blocks of {BLOCK_SIZES} keys, not {block_size}"
  if heads > 2 * UNIT:
    return f"takes up to {2 * UNIT} query heads per key head, not {heads}"
  entries = entries_per_unit(problem, block_size)
  if query_config(d, dq_operands(d), entries).stages < 2:
    return f"has no room in shared memory for lists of {entries} blocks of {UNIT} rows together"
  return None


@functools.partial(
  jax.custom_vjp, nondiff_argnames=("known_offset", "block_size", "scale", "interpret")
)
def block_sparse_attention(
  problem: problems.Problem,
  known_offset: int | None,
  block_size: int,
  scale: float,
  interpret=None,
):
  return _forward(problem, known_offset, block_size, scale, interpret)[0]


def _forward(problem, known_offset, block_size, scale, interpret):
  del known_offset  # positions are data to the kernels
  call = Call(problem, block_size, scale, interpret)
  bounds = call.bounds(problem)
  unit_lists, tiles = call.make_lists(problem.blocks_BTKM, bounds)
  lists = call.make_walk_lists(problem, tiles, bounds)
  out_BVXD, lse_RL = call.forward(call.packing.pack(problem.q_BTHD), lists)
  out_BTHD, lse_BTH = call.packing.unpack(out_BVXD), call.packing.from_lines(lse_RL)
  out_BTHD, lse_BTH, unit_lists, tiles = jax.tree.map(
    lambda x: checkpoint_name(x, RESIDUAL_NAME), (out_BTHD, lse_BTH, unit_lists, tiles)
  )
  return (out_BTHD, lse_BTH), (problem, out_BTHD, lse_BTH, unit_lists, tiles)


def _backward(known_offset, block_size, scale, interpret, residuals, cotangents):
  del known_offset
  problem, out_BTHD, lse_BTH, unit_lists, tiles = residuals
  call = Call(problem, block_size, scale, interpret)
  bounds = call.bounds(problem)
  q_BVXD, dout_BVXD = call.packing.pack(problem.q_BTHD), call.packing.pack(cotangents[0])
  lines = backward_lines(call, out_BTHD, lse_BTH, *cotangents)

  lists = call.make_walk_lists(problem, tiles, bounds)
  dq_BVXD, delta_RL = call.dq(q_BVXD, dout_BVXD, lines, lists)

  key_tiles = call.make_key_tiles(unit_lists)
  numbers_RUC = call.line_numbers(lines.lse_RL, delta_RL, bounds)
  sums = call.dkv(q_BVXD, dout_BVXD, numbers_RUC, problem, key_tiles)
  gradients = call.packing.unpack(dq_BVXD), *call.add_parts(sums, key_tiles)
  return (problems.cotangent(problem, *gradients),)


block_sparse_attention.defvjp(_forward, _backward)


def backward_lines(call: Call, out_BTHD, lse_BTH, dout_BTHD, dlse_BTH) -> Lines:
  """What the kernel of dq knows of each row of queries."""
  # A row that sees nothing must not turn masked scores into NaN.
  lse_RL = call.packing.to_lines(jnp.where(jnp.isneginf(lse_BTH), 0.0, lse_BTH))
  if call.dq_finds_delta:
    return Lines(lse_RL, call.packing.to_lines(dlse_BTH), call.packing.pack(out_BTHD))
  delta_BTH = (out_BTHD.astype(jnp.float32) * dout_BTHD.astype(jnp.float32)).sum(-1)
  return Lines(lse_RL, call.packing.to_lines(delta_BTH - dlse_BTH), None)
