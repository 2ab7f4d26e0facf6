"""The arrays of one call, which every implementation takes as a whole."""

from typing import NamedTuple

import jax


class Problem(NamedTuple):
  """What `api.decode_attention` was given, checked; the bias may be None."""

  q_BHD: jax.Array
  k_PXD: jax.Array
  v_PXD: jax.Array
  pages_BKM: jax.Array
  begin_BKM: jax.Array
  end_BKM: jax.Array
  key_bias_PX: jax.Array | None
