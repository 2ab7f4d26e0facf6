"""Stores and slots of pages, and lists of which pages go where."""

import jax
import jax.numpy as jnp
import numpy as np

P, S, X, D, R = 13, 9, 4, 8, 6


def put(tree, kind):
  device = jax.devices()[0]
  return jax.device_put(tree, jax.sharding.SingleDeviceSharding(device, memory_kind=kind))


def make(length, rng, x=X, d=D):
  """Keys, values and biases of any bits, NaNs among them."""
  keys, values = rng.integers(0, 2**16, (2, length, x, d), dtype=np.uint16)
  bias = rng.integers(0, 2**32, (length, x), dtype=np.uint32)
  return keys.view(jnp.bfloat16), values.view(jnp.bfloat16), bias.view(np.float32)


def make_lists(rng, distinct, p=P, s=S, r=R):
  """Different rows, or different pages, in some entries; in the others none, or no such one."""
  pages, rows = rng.integers(0, p, r), rng.integers(0, s, r)
  if distinct == "rows":
    rows = rng.permutation(s)[:r]
  else:
    pages = rng.permutation(p)[:r]
  # Numbers that do not exist, at either end.
  no_pages, no_rows = ((-1, -count, count, 2**31 - 1) for count in (p, s))
  pages = np.where(rng.random(r) < 0.3, rng.choice(no_pages, r), pages)
  rows = np.where(rng.random(r) < 0.1, rng.choice(no_rows, r), rows)
  return jnp.asarray(pages, jnp.int32), jnp.asarray(rows, jnp.int32)


def large(kind, num_pages=2048, num_slots=16, x=16, d=64, r=8):
  """Stores far larger than slots, and lists.

  They are arrays, because JAX traces a shape that lies on the host as if it did not.
  """

  def arrays(length, kind):
    page = jnp.zeros((length, x, d), jnp.bfloat16)
    return put((page, page + 1, jnp.zeros((length, x))), kind)

  return arrays(num_pages, kind), arrays(num_slots, "device"), *[jnp.arange(r)] * 2
