"""The forward pass in Triton: a program takes one unit of queries through its blocks."""

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


def forward(
  q_BTHD, k_BSKD, v_BSKD, bias_BSK, lists: QueryLists, first_BT, offset_1, *, shape: Shape
) -> tuple[jax.Array, jax.Array]:
  """Output, and lse in float32, [B, T, H]. `bias_BSK` is not looked at where there is none."""
  layout = config(shape)
  return triton_call.call(
    _kernel,
    q_BTHD,
    k_BSKD,
    v_BSKD,
    bias_BSK,
    *lists,
    first_BT,
    offset_1,
    out_type=(
      jax.ShapeDtypeStruct(q_BTHD.shape, q_BTHD.dtype),
      jax.ShapeDtypeStruct(q_BTHD.shape[:3], jnp.float32),
    ),
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
  k_ptr,
  v_ptr,
  bias_ptr,
  blocks_ptr,
  tokens_ptr,
  count_ptr,
  first_ptr,
  offset_ptr,
  out_ptr,
  lse_ptr,
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

  list_number = row.to(tl.int64) * tl.num_programs(0) + unit
  end = tl.load(count_ptr + list_number) * BLOCK
  blocks_ptr += list_number * LENGTH
  tokens_ptr += list_number * LENGTH
  # Where the keys of this batch element and head begin, in keys.
  start = (row // KV_HEADS).to(tl.int64) * (KEYS * KV_HEADS) + row % KV_HEADS

  largest_X = tl.full([LINES], float("-inf"), tl.float32)
  total_X = tl.zeros([LINES], tl.float32)
  out_XD = tl.zeros([LINES, DIM], tl.float32)
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
    new_X = tl.maximum(largest_X, tl.max(scores_XY, 1))
    # While nothing was seen, shifting by 0 instead keeps exp(-inf) = 0.
    shift_X = tl.where(new_X == float("-inf"), 0.0, new_X)
    weights_XY = tl.exp2(scores_XY - shift_X[:, None])
    keep_X = tl.exp2(largest_X - shift_X)
    total_X = total_X * keep_X + tl.sum(weights_XY, 1)
    out_XD = tl.dot(
      weights_XY.to(v_YD.dtype), v_YD, out_XD * keep_X[:, None], input_precision=PRECISION
    )
    largest_X = new_X

  is_any_X = total_X > 0
  total_X = tl.where(is_any_X, total_X, 1.0)
  out_XD /= total_X[:, None]
  tl.store(out_ptr + at_XD, out_XD.to(q_XD.dtype), mask=is_line_X[:, None])
  lse_X = (largest_X + tl.log2(total_X)) / triton_walk.LOG2E
  tl.store(lse_ptr + number_X, tl.where(is_any_X, lse_X, float("-inf")), mask=is_line_X)
