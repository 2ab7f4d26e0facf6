"""Rotary embeddings against complex arithmetic, and Llama 3's scaling rule."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.attention import rotary


def make_scaling(**changes):
  return rotary.Scaling(
    **dict(
      rope_type="default",
      factor=4.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=8192,
    )
    | changes
  )


def test_channels_turn_as_complex_numbers():
  """Hugging Face's layout: channel i pairs with channel i + D/2."""
  d, theta = 8, 10_000.0
  x = np.random.default_rng(0).normal(size=(2, 5, 3, d)).astype(np.float32)
  position = np.array([[0, 1, 2, 0, 1], [3, 4, 5, 6, 7]])
  angle = rotary.angles(jnp.asarray(position), d, theta, make_scaling())
  turned = np.asarray(rotary.rotate(jnp.asarray(x), angle))
  paired = x[..., : d // 2] + 1j * x[..., d // 2 :]
  frequency = theta ** (-2 * np.arange(d // 2) / d)
  paired = paired * np.exp(1j * position[..., None, None] * frequency)
  np.testing.assert_allclose(turned[..., : d // 2], paired.real, atol=1e-5)
  np.testing.assert_allclose(turned[..., d // 2 :], paired.imag, atol=1e-5)


def test_products_depend_on_the_distance_alone():
  rng = np.random.default_rng(1)
  q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 64)), jnp.float32) for _ in range(2))

  def product(at, distance):
    positions = jnp.asarray([[at + distance]]), jnp.asarray([[at]])
    a, b = (rotary.angles(p, 64, 5e5, make_scaling()) for p in positions)
    return (rotary.rotate(q, a) * rotary.rotate(k, b)).sum()

  np.testing.assert_allclose(product(0, 17), product(1000, 17), rtol=1e-3)
  assert abs(product(0, 17) - product(0, 18)) > 1e-3


def test_llama3_scaling():
  """The rule of Hugging Face's `_compute_llama3_parameters`, band by band."""
  scaling = make_scaling(rope_type="llama3", factor=32.0)
  frequency = np.asarray(rotary.frequencies(64, 500_000.0, scaling))
  for i in range(32):
    plain = 500_000.0 ** (-2 * i / 64)
    wavelength = 2 * np.pi / plain
    if wavelength < 8192 / 4.0:
      wanted = plain
    elif wavelength > 8192 / 1.0:
      wanted = plain / 32.0
    else:
      smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
      wanted = (1 - smooth) * plain / 32.0 + smooth * plain
    np.testing.assert_allclose(frequency[i], wanted, rtol=1e-4)


@pytest.mark.parametrize("rope_type", ["default", "llama3"])
def test_position_zero_does_not_turn(rope_type):
  x = jnp.ones((1, 1, 1, 16))
  angle = rotary.angles(
    jnp.zeros((1, 1), jnp.int32), 16, 1e4, make_scaling(rope_type=rope_type)
  )
  np.testing.assert_array_equal(rotary.rotate(x, angle), x)
