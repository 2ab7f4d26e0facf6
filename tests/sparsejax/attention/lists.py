"""A method with arrays for it, and the lists that it chooses."""

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import attention
from sparsejax.attention import method
from tests import small

T, H, K, D = 160, 4, 2, 8
BLOCK = 16
# Windows and forced blocks in the papers' proportions.
OPTIONS = dict(
  attention__block_size=BLOCK,
  attention__num_blocks=6,
  infllmv2__num_initial=1,
  infllmv2__num_local=2,
  infllmv2__window_size=8,
  infllmv2__window_stride=4,
  infllmv2__num_windows=5,
)
# The same for `by_hand.lists`.
BY_HAND = dict(
  block=BLOCK, num_blocks=6, size=8, stride=4, count=5, first=0, initial=1, local=2
)


def make(name, **changes):
  options = small.make_model(attention__method=name, **OPTIONS | changes).options
  return attention.METHODS[name](options)


def make_arrays(seed=0, rows=1, length=T, size=2.0):
  keys = jax.random.split(jax.random.key(seed), 3)
  q = size * jax.random.normal(keys[0], (rows, length, H, D))
  k, v = (jax.random.normal(key, (rows, length, K, D)) for key in keys[1:])
  tokens = method.Tokens(jnp.ones((rows, length), jnp.int32), None, jnp.asarray(True))
  return q, k, v, tokens


def make_head(seed=0):
  """Parameters of an eviction head that has something to say."""
  keys = jax.random.split(jax.random.key(100 + seed), 2)
  kernel = jax.random.normal(keys[0], (K, D, K)) / 2
  return dict(head=dict(kernel=kernel, scale=jnp.asarray([1.5, -0.8])))


def run(module, arrays, stream="sparse", params=None):
  """The output [B, T, H, D], and the lists [B, T, K, M] if any were chosen."""

  @jax.jit
  def apply(params, *arrays):
    return module.apply({"params": params or {}}, *arrays, stream, mutable=["intermediates"])

  attended, seen = apply(params or {}, *arrays)
  blocks = seen.get("intermediates", {}).get("blocks", (None,))[0]
  return np.asarray(attended.out_BTHD), blocks


def as_sets(blocks_TKM):
  return [[{int(b) for b in row if b >= 0} for row in rows] for rows in np.asarray(blocks_TKM)]
