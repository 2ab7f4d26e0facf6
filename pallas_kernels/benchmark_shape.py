"""The shapes that the benchmark knows, and their inputs."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Shape:
  """What is measured: queries of `heads` over `kv_heads`, `num_blocks` blocks each."""

  batch: int
  length: int
  heads: int
  kv_heads: int
  head_dim: int
  block_size: int
  num_blocks: int


SHAPES = {
  "ssa_2k": Shape(8, 2048, 32, 2, 64, 16, 16),
  "ssa_8k": Shape(2, 8192, 32, 2, 64, 16, 16),
  "ssa_32k": Shape(1, 32768, 32, 2, 64, 16, 16),
  "nosa_16k": Shape(1, 16384, 32, 2, 128, 64, 64),
  "nosa_32k": Shape(1, 32768, 32, 2, 128, 64, 64),
  **{
    f"length_{length // 1024}k": Shape(1, length, 32, 2, 64, 16, 16)
    for length in (4096, 8192, 16384, 32768, 65536, 131072)
  },
}
DEFAULT = ("ssa_2k", "ssa_8k", "ssa_32k", "nosa_16k", "nosa_32k")


def make_inputs(shape: Shape, seed: int = 0) -> tuple[jax.Array, ...]:
  """Random queries, keys, values and cotangents of the output, bfloat16."""
  keys = jax.random.split(jax.random.key(seed), 4)

  def draw(key, heads):
    size = shape.batch, shape.length, heads, shape.head_dim
    return jax.random.normal(key, size, jnp.bfloat16)

  heads = shape.heads, shape.kv_heads, shape.kv_heads, shape.heads
  return tuple(draw(key, h) for key, h in zip(keys, heads, strict=True))
