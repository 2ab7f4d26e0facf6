"""Where the documents of a row begin."""

import jax
import jax.numpy as jnp


def first_positions(segments_BS: jax.Array) -> jax.Array:
  """The first position of the run of equal segments that each position is in, [B, S]."""
  index_S = jnp.arange(segments_BS.shape[1], dtype=jnp.int32)
  begins_BS = jnp.diff(segments_BS, axis=1, prepend=segments_BS[:, :1] - 1) != 0
  return jax.lax.cummax(jnp.where(begins_BS, index_S[None], 0), axis=1)
