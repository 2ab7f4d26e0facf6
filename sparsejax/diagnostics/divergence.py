"""How far predictions of the full and of the sparse stream are apart.

Letters: B batch, T positions, E width, V vocabulary, C positions of a chunk.
"""

import jax
import jax.numpy as jnp


def from_full(full_BTE, sparse_BTE, table_VE, *, chunk_length: int) -> jax.Array:
  """KL(full || sparse) of the predictions of each position, nats, float32 [B, T].

    KL(t) = sum over v of p_full(t, v) (log p_full(t, v) - log p_sparse(t, v))

  Table A9 of SSA (arXiv:2511.20102). Logits exist for `chunk_length` positions at a time.

  Args:
    full_BTE, sparse_BTE: hidden states under either mode of inference.
    table_VE: see `model.unembedding`.
    chunk_length: C.
  """
  t = full_BTE.shape[1]
  size = min(chunk_length, t)
  hidden = [jnp.pad(x, [(0, 0), (0, -t % size), (0, 0)]) for x in (full_BTE, sparse_BTE)]
  chunks = [jnp.moveaxis(x.reshape(len(x), -1, size, x.shape[-1]), 1, 0) for x in hidden]

  def of_chunk(pair):
    full, sparse = (
      jax.nn.log_softmax(
        jnp.einsum(
          "bce,ve->bcv", x, table_VE.astype(x.dtype), preferred_element_type=jnp.float32
        )
      )
      for x in pair
    )
    return (jnp.exp(full) * (full - sparse)).sum(-1)

  kl = jax.lax.map(of_chunk, tuple(chunks))
  return jnp.moveaxis(kl, 0, 1).reshape(len(full_BTE), -1)[:, :t]
