"""What sparse attention loses of one layer's output, and the most that it can lose.

Theorem 1 of SSA (arXiv:2511.20102). With h a head's output before its gate, under full
attention and over the keys that a query lists, both of the same queries, keys and values:

  error(t) = ||h_full(t) - h_sparse(t)||
           <= bound(t) = delta(t) (max over dropped j of ||v(j)|| + ||h_sparse(t)||)

where delta(t) = 1 - AttnSparsity(t) is full attention's mass on the keys that t sees and does
not list. A gate multiplies both sides.

Letters: B batch, P sampled queries, S keys, H query heads, K key/value heads, G = H // K,
D head size, M blocks listed, N blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.diagnostics import attention_mass


class Dropped(NamedTuple):
  """Of every sampled query and head, float32 [B, P, H].

  Attributes:
    mass: delta; 0 where a query lists all that it sees.
    error: the norm of the difference of outputs.
    bound: on it.
  """

  mass: jax.Array
  error: jax.Array
  bound: jax.Array


def measure(scores_BPHS, v_BSKD, blocks_BPKM, block_size: int) -> Dropped:
  """Both sides of the theorem.

  Args:
    scores_BPHS: see `attention_mass.scores`. Not probabilities: what is listed may have none
      that a float32 can tell from 0, and is then all the same the whole of sparse attention.
    v_BSKD: all values.
    blocks_BPKM: lists of the sampled queries, -1 for empty slots.
    block_size: keys per block.
  """
  b, p, h, s = scores_BPHS.shape
  k = v_BSKD.shape[2]
  scores = scores_BPHS.reshape(b, p, k, h // k, s)
  listed_BPKN = attention_mass.is_listed(blocks_BPKM, -(-s // block_size))
  is_listed_BPKS = jnp.repeat(listed_BPKN, block_size, axis=-1)[..., :s]
  is_kept = is_listed_BPKS[:, :, :, None] & (scores > -jnp.inf)
  full = jax.nn.softmax(scores, axis=-1)
  # A query that lists nothing reads nothing.
  sparse = jnp.where(
    is_kept.any(-1, keepdims=True),
    jax.nn.softmax(jnp.where(is_kept, scores, -jnp.inf), axis=-1),
    0.0,
  )

  def output(weights):
    return jnp.einsum(
      "bpkgs,bskd->bpkgd", weights, v_BSKD.astype(jnp.float32), precision="highest"
    )

  is_dropped = ~is_listed_BPKS[:, :, :, None] & (scores > -jnp.inf)
  mass = jnp.where(is_dropped, full, 0.0).sum(-1)
  size_BKS = jnp.linalg.norm(v_BSKD.astype(jnp.float32), axis=-1).transpose(0, 2, 1)
  largest = jnp.where(is_dropped, size_BKS[:, None, :, None], 0.0).max(-1)
  # The proof's identity for full - sparse, since full is (1 - delta) sparse on what is kept: a
  # difference of outputs, or of weights, would lose the small ones to rounding.
  difference = jnp.where(is_dropped, full, -mass[..., None] * sparse)
  error = jnp.linalg.norm(output(difference), axis=-1)
  bound = mass * (largest + jnp.linalg.norm(output(sparse), axis=-1))
  return Dropped(*(x.reshape(b, p, h) for x in (mass, error, bound)))
