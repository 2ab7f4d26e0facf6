"""What the Triton kernels do alike: find lines and keys, and say which see which.

Kernels are marked `no_type_check` because Triton compiles their source: nothing may wrap
them, as the check of array types in tests would.
"""

import typing

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
@typing.no_type_check
def find_lines(
  unit,
  line,
  row,
  offset,
  first_ptr,
  TOKENS: tl.constexpr,
  HEADS: tl.constexpr,
  KV_HEADS: tl.constexpr,
  PADDED_HEADS: tl.constexpr,
  LINES: tl.constexpr,
):
  """What lines of units are; `unit` is one number, or one for each line.

  Returns:
    Their numbers among [B, T, H], whether they are there (or pad a unit), and the first and
    the last key that each may see.
  """
  batch = row // KV_HEADS
  token = unit * (LINES // PADDED_HEADS) + line // PADDED_HEADS
  head = line % PADDED_HEADS
  is_there = (token < TOKENS) & (head < HEADS)
  number = (batch.to(tl.int64) * TOKENS + token) * (KV_HEADS * HEADS)
  number += (row % KV_HEADS) * HEADS + head
  first = tl.load(first_ptr + batch * TOKENS + token, mask=is_there, other=0)
  return number, is_there, first, offset + token


@triton.jit
@typing.no_type_check
def find_keys(
  begin,
  end,
  blocks_ptr,
  tokens_ptr,
  STEP: tl.constexpr,
  KEYS: tl.constexpr,
  BLOCK: tl.constexpr,
):
  """The keys of a step through a list of blocks, `end // BLOCK` of them.

  Returns:
    Their positions, whether they are there, and the bits of the tokens that list them.
  """
  place = begin + tl.arange(0, STEP)
  is_listed = place < end
  block = tl.load(blocks_ptr + place // BLOCK, mask=is_listed, other=0)
  bits = tl.load(tokens_ptr + place // BLOCK, mask=is_listed, other=0)
  key = block * BLOCK + place % BLOCK
  return key, is_listed & (key < KEYS), bits


@triton.jit
@typing.no_type_check
def scores(
  q_XD,
  k_YD,
  key_Y,
  is_key_Y,
  bits_Y,
  first_X,
  last_X,
  token_X,
  bias_ptr,
  KV_HEADS: tl.constexpr,
  SHARED: tl.constexpr,
  SCALE: tl.constexpr,
  HAS_BIAS: tl.constexpr,
  PRECISION: tl.constexpr,
):
  """Scores times log2(e), -inf where a line does not see a key; `SHARED` by several tokens.

  `bias_ptr` is where the biases of the batch element and of the key head begin.
  """
  scores_XY = tl.dot(q_XD, tl.trans(k_YD), input_precision=PRECISION) * (SCALE * LOG2E)
  if HAS_BIAS:
    bias_Y = tl.load(bias_ptr + key_Y * KV_HEADS, mask=is_key_Y, other=0.0)
    scores_XY += (bias_Y * LOG2E)[None, :]
  sees_XY = (key_Y[None, :] <= last_X[:, None]) & (key_Y[None, :] >= first_X[:, None])
  sees_XY &= is_key_Y[None, :]
  if SHARED:
    sees_XY &= ((bits_Y[None, :] >> token_X[:, None]) & 1) == 1
  return tl.where(sees_XY, scores_XY, float("-inf"))
