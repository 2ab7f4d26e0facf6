"""Sizes that the Triton kernels of block-sparse attention share.

Kernels see queries in *units*: the heads that one or several tokens have for one key/value
head, at least 16 *lines* of them, which is what a tensor core takes. The number of heads is
padded to a power of two; what pads it is never loaded.

Extra shape letters, in every file `triton_*`:
  R = B * K   U units of a row R   E blocks of a unit   X lines of a unit
  Y keys or lines that a step of a loop takes
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.block_lists import units
from pallas_kernels.block_sparse_attention import problem as problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """One call, as the kernels see it.

  Attributes:
    batch, num_tokens, num_heads, num_kv_heads, num_keys, head_dim: B, T, G, K, S, D.
    block_size: keys per block.
    dtype: of queries, keys and values.
    scale: factor on the scores.
    has_bias: whether keys have biases.
  """

  batch: int
  num_tokens: int
  num_heads: int
  num_kv_heads: int
  num_keys: int
  head_dim: int
  block_size: int
  dtype: jnp.dtype
  scale: float
  has_bias: bool

  @property
  def padded_heads(self) -> int:
    return 1 << (self.num_heads - 1).bit_length()

  @property
  def num_lines(self) -> int:
    return max(units.UNIT, self.padded_heads)

  @property
  def grouping(self) -> units.Grouping:
    return units.Grouping(
      num_tokens=self.num_tokens,
      tokens_per_unit=self.num_lines // self.padded_heads,
      units_per_token=1,
    )

  @property
  def num_rows(self) -> int:
    return self.batch * self.num_kv_heads

  @property
  def num_blocks(self) -> int:
    return -(-self.num_keys // self.block_size)

  @property
  def constants(self) -> dict:
    """What all kernels but the sum of parts take as compile-time constants."""
    return dict(
      TOKENS=self.num_tokens,
      HEADS=self.num_heads,
      KV_HEADS=self.num_kv_heads,
      KEYS=self.num_keys,
      DIM=self.head_dim,
      BLOCK=self.block_size,
      PADDED_HEADS=self.padded_heads,
      LINES=self.num_lines,
      SCALE=self.scale,
      HAS_BIAS=self.has_bias,
      # The default for float32 is TF32, which is no more exact than bfloat16 by much.
      PRECISION="ieee" if self.dtype == jnp.float32 else "tf32",
    )


def of(problem: problems.Problem, block_size: int, scale: float) -> Shape:
  (b, t, h, d), (_, s, k, _) = problem.q_BTHD.shape, problem.k_BSKD.shape
  return Shape(
    batch=b,
    num_tokens=t,
    num_heads=h // k,
    num_kv_heads=k,
    num_keys=s,
    head_dim=d,
    block_size=block_size,
    dtype=problem.q_BTHD.dtype,
    scale=scale,
    has_bias=problem.key_bias_BSK is not None,
  )
