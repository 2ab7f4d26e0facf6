"""The arrays of one call, which every implementation takes as a whole."""

from typing import NamedTuple

import jax


class Problem(NamedTuple):
  """What `api.block_sparse_attention` was given, checked; optional arrays may be None.

  `query_offset` is a scalar int32 array.
  """

  q_BTHD: jax.Array
  k_BSKD: jax.Array
  v_BSKD: jax.Array
  blocks_BTKM: jax.Array
  query_offset: jax.Array
  segments_BS: jax.Array | None
  key_bias_BSK: jax.Array | None


def cotangent(problem: Problem, dq_BTHD, dk_BSKD, dv_BSKD, dbias_BSK) -> Problem:
  """Gradients in the dtypes of what they belong to; lists, offset and segments have none."""
  arrays = problem.q_BTHD, problem.k_BSKD, problem.v_BSKD, problem.key_bias_BSK
  dq, dk, dv, dbias = (
    None if x is None else dx.astype(x.dtype)
    for x, dx in zip(arrays, (dq_BTHD, dk_BSKD, dv_BSKD, dbias_BSK), strict=True)
  )
  return Problem(dq, dk, dv, None, None, None, dbias)
