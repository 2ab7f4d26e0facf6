"""Block-sparse attention on NVIDIA GPUs from Ampere on, in kernels of Triton.

Needs the extra `triton`; nothing of it is imported before the kernels are used.
"""

import functools
import importlib.util

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import problem as problems
from pallas_kernels.block_sparse_attention import triton_lists, triton_shape
from pallas_kernels.block_sparse_attention.xla import RESIDUAL_NAME

DTYPES = ("bfloat16", "float32")
HEAD_DIMS = (32, 64, 128)
BLOCK_SIZES = (16, 32, 64, 128)
MOST_HEADS = 32
# Ampere: older tensor cores know no bfloat16.
_OLDEST = 8


def why_not(problem: problems.Problem, block_size: int) -> str | None:
  """Why these kernels cannot take a problem; None if they can."""
  dtype, d = problem.q_BTHD.dtype, problem.q_BTHD.shape[-1]
  heads = problem.q_BTHD.shape[2] // problem.k_BSKD.shape[2]
  if dtype.name not in DTYPES:
    return f"takes {' and '.join(DTYPES)}, not {dtype.name}"
  if d not in HEAD_DIMS:
    return f"takes head sizes {HEAD_DIMS}, not {d}"
  if block_size not in BLOCK_SIZES:
    return f"takes blocks of {BLOCK_SIZES} keys, not {block_size}"
  if heads > MOST_HEADS:
    return f"takes up to {MOST_HEADS} query heads per key head, not {heads}"
  if any(importlib.util.find_spec(name) is None for name in ("triton", "jax_triton")):
    return "needs jax-triton: pip install -e '.[triton]' in the repository"
  return None


def why_not_here() -> str | None:
  """Why these kernels cannot run on the first device; None if they can."""
  device = jax.devices()[0]
  if device.platform != "gpu":
    return f"needs an NVIDIA GPU, this is {device.device_kind}"
  capability = str(device.compute_capability)
  major = capability.partition(".")[0]
  # AMD's GPUs call themselves gfx and a number.
  if not major.isdigit():
    return f"needs an NVIDIA GPU, {device.device_kind} is {capability}"
  if int(major) < _OLDEST:
    return (
      f"needs compute capability {_OLDEST}.0 or later (Ampere), {device.device_kind} has "
      f"{capability}"
    )
  return None


@functools.partial(jax.custom_vjp, nondiff_argnames=("known_offset", "block_size", "scale"))
def block_sparse_attention(
  problem: problems.Problem, known_offset: int | None, block_size: int, scale: float
):
  return _forward(problem, known_offset, block_size, scale)[0]


def _forward(problem, known_offset, block_size, scale):
  from pallas_kernels.block_sparse_attention import triton_forward

  del known_offset  # positions are data to the kernels
  shape = triton_shape.of(problem, block_size, scale)
  first_BT = triton_lists.first_keys(problem)
  lists = triton_lists.query_lists(problem, first_BT, shape)
  out_BTHD, lse_BTH = triton_forward.forward(
    problem.q_BTHD,
    problem.k_BSKD,
    problem.v_BSKD,
    _bias(problem),
    lists,
    first_BT,
    problem.query_offset.reshape(1),
    shape=shape,
  )
  out_BTHD, lse_BTH, lists = jax.tree.map(
    lambda x: checkpoint_name(x, RESIDUAL_NAME), (out_BTHD, lse_BTH, lists)
  )
  return (out_BTHD, lse_BTH), (problem, out_BTHD, lse_BTH, lists)


def _backward(known_offset, block_size, scale, residuals, cotangents):
  from pallas_kernels.block_sparse_attention import triton_dkv, triton_dq, triton_parts

  del known_offset
  problem, out_BTHD, lse_BTH, lists = residuals
  dout_BTHD, dlse_BTH = cotangents
  shape = triton_shape.of(problem, block_size, scale)
  delta_BTH = (out_BTHD.astype(jnp.float32) * dout_BTHD.astype(jnp.float32)).sum(-1)
  # A query that sees nothing must not turn masked scores into NaN.
  lse_BTH = jnp.where(jnp.isneginf(lse_BTH), 0.0, lse_BTH)
  shared = (
    problem.q_BTHD,
    dout_BTHD,
    lse_BTH,
    delta_BTH - dlse_BTH,
    problem.k_BSKD,
    problem.v_BSKD,
    _bias(problem),
  )
  where = triton_lists.first_keys(problem), problem.query_offset.reshape(1)
  dq_BTHD = triton_dq.dq(*shared, lists, *where, shape=shape)

  key_lists = triton_lists.key_lists(lists, shape)
  sums = triton_dkv.dkv(*shared, key_lists, *where, shape=shape)
  gradients = dq_BTHD, *triton_parts.add_parts(sums, key_lists, shape=shape)
  return (problems.cotangent(problem, *gradients),)


block_sparse_attention.defvjp(_forward, _backward)


def _bias(problem):
  """Biases in float32; one number that no kernel looks at where there are none."""
  if problem.key_bias_BSK is None:
    return jnp.zeros(1, jnp.float32)
  return problem.key_bias_BSK.astype(jnp.float32)
