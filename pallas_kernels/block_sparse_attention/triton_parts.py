"""Adds what the chunks of a block left, in a fixed order, in Triton."""

import typing

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.block_sparse_attention import triton_call
from pallas_kernels.block_sparse_attention.triton_dkv import Sums
from pallas_kernels.block_sparse_attention.triton_lists import KeyLists
from pallas_kernels.block_sparse_attention.triton_shape import Shape

# Keys of a program: the least there may be in a block.
_WIDTH = 16


def add_parts(sums: Sums, lists: KeyLists, *, shape: Shape):
  """Gradients of keys and values, [B, S, K, D], and of biases, [B, S, K], or None."""
  b, s, k, d = shape.batch, shape.num_keys, shape.num_kv_heads, shape.head_dim
  gradient = jax.ShapeDtypeStruct((b, s, k, d), shape.dtype)
  dk_BSKD, dv_BSKD, dbias_BSK = triton_call.call(
    _kernel,
    *sums,
    lists.first_chunk_X,
    out_type=(gradient, gradient, jax.ShapeDtypeStruct((b, s, k), jnp.float32)),
    grid=(shape.num_rows * shape.num_blocks, shape.block_size // _WIDTH),
    num_warps=4,
    num_stages=2,
    KV_HEADS=k,
    KEYS=s,
    DIM=d,
    BLOCK=shape.block_size,
    HAS_BIAS=shape.has_bias,
    WIDTH=_WIDTH,
  )
  return dk_BSKD, dv_BSKD, dbias_BSK if shape.has_bias else None


@triton.jit
@typing.no_type_check
def _kernel(
  dk_parts_ptr,
  dv_parts_ptr,
  dbias_parts_ptr,
  first_chunk_ptr,
  dk_ptr,
  dv_ptr,
  dbias_ptr,
  KV_HEADS: tl.constexpr,
  KEYS: tl.constexpr,
  DIM: tl.constexpr,
  BLOCK: tl.constexpr,
  HAS_BIAS: tl.constexpr,
  WIDTH: tl.constexpr,
):
  block = tl.program_id(0)
  num_blocks: tl.constexpr = (KEYS + BLOCK - 1) // BLOCK
  row = block // num_blocks
  within_W = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
  key_W = (block % num_blocks) * BLOCK + within_W
  is_key_W = key_W < KEYS
  dim_D = tl.arange(0, DIM)

  dk_WD = tl.zeros([WIDTH, DIM], tl.float32)
  dv_WD = tl.zeros([WIDTH, DIM], tl.float32)
  dbias_W = tl.zeros([WIDTH], tl.float32)
  for chunk in tl.range(tl.load(first_chunk_ptr + block), tl.load(first_chunk_ptr + block + 1)):
    from_W = (chunk * BLOCK + within_W).to(tl.int64)
    from_WD = from_W[:, None] * DIM + dim_D[None, :]
    dk_WD += tl.load(dk_parts_ptr + from_WD)
    dv_WD += tl.load(dv_parts_ptr + from_WD)
    if HAS_BIAS:
      dbias_W += tl.load(dbias_parts_ptr + from_W)

  number_W = (row // KV_HEADS).to(tl.int64) * (KEYS * KV_HEADS) + row % KV_HEADS
  number_W += key_W.to(tl.int64) * KV_HEADS
  at_WD = number_W[:, None] * DIM + dim_D[None, :]
  tl.store(dk_ptr + at_WD, dk_WD.to(dk_ptr.dtype.element_ty), mask=is_key_W[:, None])
  tl.store(dv_ptr + at_WD, dv_WD.to(dv_ptr.dtype.element_ty), mask=is_key_W[:, None])
  if HAS_BIAS:
    tl.store(dbias_ptr + number_W, dbias_W, mask=is_key_W)
