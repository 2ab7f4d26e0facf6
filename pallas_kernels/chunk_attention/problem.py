"""One call as every implementation takes it."""

from typing import NamedTuple

import jax


class Problem(NamedTuple):
  """What `api.chunk_attention` was given, checked; `offset` is a scalar int32 array."""

  q_BTHD: jax.Array
  k_BSKD: jax.Array
  v_BSKD: jax.Array
  offset: jax.Array
  key_bias_BSK: jax.Array | None

  @property
  def is_whole(self) -> bool:
    """Whether the chunk is the row, so that the offset is 0."""
    return self.q_BTHD.shape[1] == self.k_BSKD.shape[1]
