"""The gradients of keys, values and biases in Triton, as partial sums of chunks.

A program takes some keys of a block through a chunk of the units that list it (see
`triton_lists`), several units at a time.

Extra shape letters:
  C chunks   W keys of a program   Z = block_size
"""

import typing
from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.block_sparse_attention import triton_call, triton_walk
from pallas_kernels.block_sparse_attention.triton_lists import KeyLists
from pallas_kernels.block_sparse_attention.triton_shape import Shape


class Sums(NamedTuple):
  """Of every chunk, in float32; those of chunks that are not there hold anything.

  `dbias_CZ` is of no meaning where there are no biases.
  """

  dk_CZD: jax.Array
  dv_CZD: jax.Array
  dbias_CZ: jax.Array


def config(shape: Shape) -> triton_call.Config:
  if shape.dtype == jnp.float32:
    return triton_call.Config(step=32, num_warps=4, num_stages=1)
  # With 4 warps, two sums of 64 keys by 128 numbers leave no registers for the rest.
  is_wide = shape.head_dim == 128 and keys_per_program(shape) == 64
  return triton_call.Config(step=64, num_warps=8 if is_wide else 4, num_stages=2)


def keys_per_program(shape: Shape) -> int:
  return min(shape.block_size, 32 if shape.dtype == jnp.float32 else 64)


def dkv(
  q_BTHD,
  dout_BTHD,
  lse_BTH,
  delta_BTH,
  k_BSKD,
  v_BSKD,
  bias_BSK,
  lists: KeyLists,
  first_BT,
  offset_1,
  *,
  shape: Shape,
) -> Sums:
  """Partial sums; arguments as for `triton_dq.dq`."""
  layout = config(shape)
  num_chunks, block_size = len(lists.block_C), shape.block_size
  width = keys_per_program(shape)
  sums = jax.ShapeDtypeStruct((num_chunks, block_size, shape.head_dim), jnp.float32)
  return Sums(
    *triton_call.call(
      _kernel,
      q_BTHD,
      dout_BTHD,
      lse_BTH,
      delta_BTH,
      k_BSKD,
      v_BSKD,
      bias_BSK,
      lists.units_P,
      lists.tokens_P,
      lists.bounds_C2,
      lists.block_C,
      first_BT,
      offset_1,
      out_type=(sums, sums, jax.ShapeDtypeStruct((num_chunks, block_size), jnp.float32)),
      grid=(num_chunks, block_size // width),
      num_warps=layout.num_warps,
      num_stages=layout.num_stages,
      STEP=layout.step,
      WIDTH=width,
      **shape.constants,
    )
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
  units_ptr,
  tokens_ptr,
  bounds_ptr,
  block_ptr,
  first_ptr,
  offset_ptr,
  dk_ptr,
  dv_ptr,
  dbias_ptr,
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
  WIDTH: tl.constexpr,
):
  chunk = tl.program_id(0)
  chunk_begin = tl.load(bounds_ptr + 2 * chunk)
  chunk_end = tl.load(bounds_ptr + 2 * chunk + 1)
  if chunk_begin >= chunk_end:
    return
  num_blocks: tl.constexpr = (KEYS + BLOCK - 1) // BLOCK
  block = tl.load(block_ptr + chunk)
  row = block // num_blocks
  within_W = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
  key_W = (block % num_blocks) * BLOCK + within_W
  is_key_W = key_W < KEYS
  dim_D = tl.arange(0, DIM)
  # Numbers of the keys among [B, S, K].
  number_W = (row // KV_HEADS).to(tl.int64) * (KEYS * KV_HEADS) + row % KV_HEADS
  number_W += key_W.to(tl.int64) * KV_HEADS
  at_WD = number_W[:, None] * DIM + dim_D[None, :]
  k_WD = tl.load(k_ptr + at_WD, mask=is_key_W[:, None], other=0.0)
  v_WD = tl.load(v_ptr + at_WD, mask=is_key_W[:, None], other=0.0)
  bias_W = tl.zeros([WIDTH], tl.float32)
  if HAS_BIAS:
    bias_W = tl.load(bias_ptr + number_W, mask=is_key_W, other=0.0) * triton_walk.LOG2E
  offset = tl.load(offset_ptr)

  dk_WD = tl.zeros([WIDTH, DIM], tl.float32)
  dv_WD = tl.zeros([WIDTH, DIM], tl.float32)
  dbias_W = tl.zeros([WIDTH], tl.float32)
  for begin in tl.range(0, (chunk_end - chunk_begin) * LINES, STEP):
    place_Y = begin + tl.arange(0, STEP)
    pair_Y = chunk_begin + place_Y // LINES
    line_Y = place_Y % LINES
    unit_Y = tl.load(units_ptr + pair_Y, mask=pair_Y < chunk_end, other=0)
    # No bit is set beyond the end of the chunk.
    bits_Y = tl.load(tokens_ptr + pair_Y, mask=pair_Y < chunk_end, other=0)
    number_Y, is_line_Y, first_Y, last_Y = triton_walk.find_lines(
      unit_Y,
      line_Y,
      row,
      offset,
      first_ptr,
      TOKENS,
      HEADS,
      KV_HEADS,
      PADDED_HEADS,
      LINES,
    )
    is_line_Y &= ((bits_Y >> (line_Y // PADDED_HEADS)) & 1) == 1
    at_YD = number_Y[:, None] * DIM + dim_D[None, :]
    q_YD = tl.load(q_ptr + at_YD, mask=is_line_Y[:, None], other=0.0)
    dout_YD = tl.load(dout_ptr + at_YD, mask=is_line_Y[:, None], other=0.0)
    lse_Y = tl.load(lse_ptr + number_Y, mask=is_line_Y, other=0.0) * triton_walk.LOG2E
    delta_Y = tl.load(delta_ptr + number_Y, mask=is_line_Y, other=0.0)

    scores_WY = tl.dot(k_WD, tl.trans(q_YD), input_precision=PRECISION)
    scores_WY = scores_WY * (SCALE * triton_walk.LOG2E) + bias_W[:, None]
    sees_WY = (key_W[:, None] <= last_Y[None, :]) & (key_W[:, None] >= first_Y[None, :])
    sees_WY &= is_line_Y[None, :]
    weights_WY = tl.where(sees_WY, tl.exp2(scores_WY - lse_Y[None, :]), 0.0)
    dv_WD = tl.dot(weights_WY.to(v_WD.dtype), dout_YD, dv_WD, input_precision=PRECISION)
    dweights_WY = tl.dot(v_WD, tl.trans(dout_YD), input_precision=PRECISION)
    dscores_WY = weights_WY * (dweights_WY - delta_Y[None, :])
    dk_WD = tl.dot(dscores_WY.to(k_WD.dtype), q_YD, dk_WD, input_precision=PRECISION)
    if HAS_BIAS:
      dbias_W += tl.sum(dscores_WY, 1)

  to_W = chunk.to(tl.int64) * BLOCK + within_W
  to_WD = to_W[:, None] * DIM + dim_D[None, :]
  tl.store(dk_ptr + to_WD, dk_WD * SCALE)
  tl.store(dv_ptr + to_WD, dv_WD)
  if HAS_BIAS:
    tl.store(dbias_ptr + to_W, dbias_W)
