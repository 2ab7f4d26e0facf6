"""Block-sparse attention in plain XLA, for any device; memory is O(T x keys read).

Queries are taken in stripes. Where the lists cover a fair share of the keys, a stripe is
compared with every key and the unlisted ones are masked: dense matrix products, no gather.
Where they cover little, the listed blocks are gathered for every query. Both recompute the
scores in the backward pass.
"""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.block_sparse_attention import xla_gathered, xla_masked

# A query must read less than one key in so many before gathering beats masking: a gathered
# key is read once per query, a masked one once per stripe.
MASKED_UP_TO = 16
# What the backward pass needs besides its inputs, for rematerialisation policies.
RESIDUAL_NAME = "attention_residual"


@functools.partial(jax.custom_vjp, nondiff_argnames=("block_size", "scale"))
def block_sparse_attention(q_BTHD, k_BSKD, v_BSKD, blocks_BTKM, segments_BT, block_size, scale):
  return _forward(q_BTHD, k_BSKD, v_BSKD, blocks_BTKM, segments_BT, block_size, scale)[0]


def _forward(q_BTHD, k_BSKD, v_BSKD, blocks_BTKM, segments_BT, block_size, scale):
  problem = (q_BTHD, k_BSKD, v_BSKD, blocks_BTKM, segments_BT)
  way = _choose(problem, block_size)
  out_BTHD, lse_BTH = way.forward(*problem, block_size=block_size, scale=scale)
  out_BTHD = checkpoint_name(out_BTHD, RESIDUAL_NAME)
  lse_BTH = checkpoint_name(lse_BTH, RESIDUAL_NAME)
  return (out_BTHD, lse_BTH), (*problem, lse_BTH)


def _backward(block_size, scale, residuals, cotangents):
  *problem, lse_BTH = residuals
  dout_BTHD, dlse_BTH = cotangents
  way = _choose(problem, block_size)
  dq, dk, dv = way.backward(
    *problem, dout_BTHD, lse_BTH, dlse_BTH, block_size=block_size, scale=scale
  )
  q_BTHD, k_BSKD, v_BSKD, *_ = problem
  return (
    dq.astype(q_BTHD.dtype),
    dk.astype(k_BSKD.dtype),
    dv.astype(v_BSKD.dtype),
    None,
    None,
  )


block_sparse_attention.defvjp(_forward, _backward)


def _choose(problem, block_size):
  _, k_BSKD, _, blocks_BTKM, _ = problem
  is_dense_enough = k_BSKD.shape[1] <= MASKED_UP_TO * blocks_BTKM.shape[-1] * block_size
  return xla_masked if is_dense_enough else xla_gathered
