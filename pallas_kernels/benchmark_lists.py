"""Block lists to measure with: how alike neighbouring queries choose decides the speed.

independent  every query chooses at random
clustered    scores wander slowly over time (first-order autoregression) and favour near
             blocks; as trained models choose
steady       scores wander more slowly still: as where half of the blocks are chosen by what
             they hold, whoever asks (NOSA)
exact        the best blocks of random queries and keys, as `select_blocks` finds them
FILE.npy     int32 [T, K, M] of a model, the same for all rows; or [T, M], for all heads
             too. FILE.npy:3 takes the third of a file of layers, counted from 0.
"""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels

# Correlation of a block's score from one query to the next, and preference for near blocks.
_DRAWN = {
  "independent": dict(rho=0.0, local=0.0),
  "clustered": dict(rho=0.9, local=0.5),
  "steady": dict(rho=0.97, local=0.2),
}


def make_lists(kind: str, q_BTHD, k_BTKD, *, block_size: int, num_blocks: int) -> jax.Array:
  """Lists [B, T, K, M] of a kind, each with the query's own block.

  Raises:
    ValueError: no such kind, or a file of another shape.
  """
  (b, t, _, _), k = q_BTHD.shape, k_BTKD.shape[2]
  if kind == "exact":
    select = functools.partial(
      pallas_kernels.select_blocks, block_size=block_size, num_blocks=num_blocks
    )
    return jax.jit(select)(q_BTHD, k_BTKD)
  if kind in _DRAWN:
    keys = jax.random.split(jax.random.key(0), k)
    draw = functools.partial(
      _wandering, length=t, block_size=block_size, num_blocks=num_blocks, **_DRAWN[kind]
    )
    lists_TKM = jnp.stack([jax.jit(draw)(key) for key in keys], axis=1)
    return jnp.broadcast_to(lists_TKM[None], (b, *lists_TKM.shape))
  file, _, layer = kind.partition(":")
  if not pathlib.Path(file).is_file():
    raise ValueError(f"{kind!r} is none of {', '.join(_DRAWN)}, exact, and no file")
  lists = np.load(file)[int(layer)] if layer else np.load(file)
  if lists.shape not in ((t, num_blocks), (t, k, num_blocks)):
    raise ValueError(
      f"{kind} holds {lists.shape}, not {(t, num_blocks)} or {(t, k, num_blocks)}"
    )
  lists_TKM = jnp.asarray(lists if lists.ndim == 3 else lists[:, None])
  return jnp.broadcast_to(lists_TKM[None], (b, t, k, num_blocks))


def _wandering(key, *, length, block_size, num_blocks, rho, local):
  """Lists [T, M] of one head from scores that remember themselves."""
  n = length // block_size
  first_key, key = jax.random.split(key)
  number_N = jnp.arange(n)

  def step(score_N, part):
    key, position = part
    noise_N = jax.random.normal(key, (n,))
    score_N = rho * score_N + math.sqrt(1 - rho**2) * noise_N
    own = position // block_size
    distance_N = own - number_N
    biased_N = score_N - local * jnp.log1p(jnp.maximum(distance_N, 0).astype(jnp.float32))
    biased_N = jnp.where(distance_N < 0, -jnp.inf, biased_N)
    biased_N = jnp.where(distance_N == 0, jnp.inf, biased_N)
    best_M, blocks_M = jax.lax.top_k(biased_N, min(num_blocks, n))
    blocks_M = jnp.where(jnp.isneginf(best_M), -1, blocks_M)
    return score_N, jnp.pad(blocks_M, (0, max(0, num_blocks - n)), constant_values=-1)

  start_N = jax.random.normal(first_key, (n,))
  steps = jax.random.split(key, length), jnp.arange(length)
  return jax.lax.scan(step, start_N, steps)[1]


def num_pairs(blocks_BTKM, block_size: int) -> int:
  """Pairs of a query and a key that it reads, over all rows and key heads."""
  blocks = np.asarray(blocks_BTKM)
  position = np.arange(blocks.shape[1])[None, :, None, None]
  keys = np.minimum(block_size, position - blocks * block_size + 1)
  return int(np.where(blocks >= 0, np.maximum(keys, 0), 0).sum())
