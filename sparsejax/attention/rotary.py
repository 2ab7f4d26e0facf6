"""Rotary position embeddings, in the half-split layout of Hugging Face Llama."""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
  """How frequencies are stretched to longer contexts; field names as in HF `rope_scaling`.

  Attributes:
    rope_type: `default` leaves them alone; `llama3` divides the slow ones by `factor`,
      leaves the fast ones and blends between.
    factor: how much longer the context is.
    low_freq_factor, high_freq_factor: turns within the original context below which a band
      is slow, and above which it is fast.
    original_max_position_embeddings: context the model was trained at.
  """

  rope_type: str
  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int


def angles(position_BT, head_dim: int, theta: float, scaling: Scaling) -> jax.Array:
  """Angles by which to turn each pair of channels, float32 [B, T, D // 2]."""
  frequency_D = frequencies(head_dim, theta, scaling)
  return position_BT.astype(jnp.float32)[..., None] * frequency_D[None, None]


def frequencies(head_dim: int, theta: float, scaling: Scaling) -> jax.Array:
  """Radians per position of each pair of channels, float32 [D // 2]."""
  frequency_D = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  if scaling.rope_type == "default":
    return frequency_D
  turns_D = scaling.original_max_position_embeddings * frequency_D / (2 * math.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  # 0 for slow bands, 1 for fast ones.
  keep_D = jnp.clip((turns_D - low) / (high - low), 0.0, 1.0)
  return keep_D * frequency_D + (1.0 - keep_D) * frequency_D / scaling.factor


def rotate(x_BTHD, angle_BTD) -> jax.Array:
  """`x` with its channels `(i, i + D/2)` turned by the i-th angle; computed in float32."""
  first, second = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
  cos, sin = jnp.cos(angle_BTD)[:, :, None], jnp.sin(angle_BTD)[:, :, None]
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x_BTHD.dtype)
