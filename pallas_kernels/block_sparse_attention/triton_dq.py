"""The gradient of queries in Triton: the walk of the forward pass once more."""

import typing

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.block_sparse_attention import triton_call, triton_walk
from pallas_kernels.block_sparse_attention.triton_lists import QueryLists
from pallas_kernels.block_sparse_attention.triton_shape import Shape


def config(shape: Shape) -> triton_call.Config:
  if shape.dtype == jnp.float32:
    return triton_call.Config(step=32, num_warps=4, num_stages=1)
  return triton_call.Config(step=64, num_warps=4, num_stages=2)


def dq(
  q_BTHD,
  dout_BTHD,
  lse_BTH,
  delta_BTH,
  k_BSKD,
  v_BSKD,
  bias_BSK,
  lists: QueryLists,
  first_BT,
  offset_1,
  *,
  shape: Shape,
) -> jax.Array:
  """The gradient of queries, [B, T, H, D].

  Args:
    lse_BTH: any finite number for a query that sees nothing.
    delta_BTH: the sum of the output times its cotangent, less the cotangent of lse.
  """
  layout = config(shape)
  return triton_call.call(
    _kernel,
    q_BTHD,
    dout_BTHD,
    lse_BTH,
    delta_BTH,
    k_BSKD,
    v_BSKD,
    bias_BSK,
    *lists,
    first_BT,
    offset_1,
    out_type=jax.ShapeDtypeStruct(q_BTHD.shape, q_BTHD.dtype),
    grid=(shape.grouping.num_units, shape.num_rows),
    num_warps=layout.num_warps,
    num_stages=layout.num_stages,
    STEP=layout.step,
    LENGTH=lists.blocks_RUE.shape[-1],
    **shape.constants,
  )


@triton.jit
@typing.no_type_check
def _kernel(
  q_ptr,
  dout_ptr,
  lse_ptr,
  delta_ptr,
  k_ptr,
  v_ptr,
  bias_ptr,
  blocks_ptr,
  tokens_ptr,
  count_ptr,
  first_ptr,
  offset_ptr,
  dq_ptr,
  TOKENS: tl.constexpr,
  HEADS: tl.constexpr,
  KV_HEADS: tl.constexpr,
  KEYS: tl.constexpr,
  DIM: tl.constexpr,
  BLOCK: tl.constexpr,
  PADDED_HEADS: tl.constexpr,
  LINES: tl.constexpr,
  SCALE: tl.constexpr,
  HAS_BIAS: tl.constexpr,
  PRECISION: tl.constexpr,
  STEP: tl.constexpr,
  LENGTH: tl.constexpr,
):
  unit, row = tl.program_id(0), tl.program_id(1)
  line_X, dim_D = tl.arange(0, LINES), tl.arange(0, DIM)
  number_X, is_line_X, first_X, last_X = triton_walk.find_lines(
    unit,
    line_X,
    row,
    tl.load(offset_ptr),
    first_ptr,
    TOKENS,
    HEADS,
    KV_HEADS,
    PADDED_HEADS,
    LINES,
  )
  at_XD = number_X[:, None] * DIM + dim_D[None, :]
  q_XD = tl.load(q_ptr + at_XD, mask=is_line_X[:, None], other=0.0)
  dout_XD = tl.load(dout_ptr + at_XD, mask=is_line_X[:, None], other=0.0)
  lse_X = tl.load(lse_ptr + number_X, mask=is_line_X, other=0.0) * triton_walk.LOG2E
  delta_X = tl.load(delta_ptr + number_X, mask=is_line_X, other=0.0)

  list_number = row.to(tl.int64) * tl.num_programs(0) + unit
  end = tl.load(count_ptr + list_number) * BLOCK
  blocks_ptr += list_number * LENGTH
  tokens_ptr += list_number * LENGTH
  # Where the keys of this batch element and head begin, in keys.
  start = (row // KV_HEADS).to(tl.int64) * (KEYS * KV_HEADS) + row % KV_HEADS

  dq_XD = tl.zeros([LINES, DIM], tl.float32)
  for begin in tl.range(0, end, STEP):
    key_Y, is_key_Y, bits_Y = triton_walk.find_keys(
      begin, end, blocks_ptr, tokens_ptr, STEP, KEYS, BLOCK
    )
    at_YD = (start + key_Y.to(tl.int64) * KV_HEADS)[:, None] * DIM + dim_D[None, :]
    k_YD = tl.load(k_ptr + at_YD, mask=is_key_Y[:, None], other=0.0)
    v_YD = tl.load(v_ptr + at_YD, mask=is_key_Y[:, None], other=0.0)
    scores_XY = triton_walk.scores(
      q_XD,
      k_YD,
      key_Y,
      is_key_Y,
      bits_Y,
      first_X,
      last_X,
      line_X // PADDED_HEADS,
      bias_ptr + start,
      KV_HEADS,
      LINES > PADDED_HEADS,
      SCALE,
      HAS_BIAS,
      PRECISION,
    )
    weights_XY = tl.exp2(scores_XY - lse_X[:, None])
    dweights_XY = tl.dot(dout_XD, tl.trans(v_YD), input_precision=PRECISION)
    dscores_XY = weights_XY * (dweights_XY - delta_X[:, None])
    dq_XD = tl.dot(dscores_XY.to(k_YD.dtype), k_YD, dq_XD, input_precision=PRECISION)

  dq_XD *= SCALE
  tl.store(dq_ptr + at_XD, dq_XD.to(q_XD.dtype), mask=is_line_X[:, None])
