"""Causal attention of a chunk of a row's queries to all of its keys so far.

Shape letters, used in every file of this folder:
  B batch   T queries   S keys   H query heads   K key/value heads   D head size
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, positions
from pallas_kernels.chunk_attention import cudnn, reference, xla
from pallas_kernels.chunk_attention.problem import Problem
from pallas_kernels.dispatch import Shaped
from pallas_kernels.full_attention import cudnn as whole_rows

type ChunkImplementation = Literal["auto", "strict", "cudnn", "xla", "reference"]

# What `auto` tries, in this order.
AUTOMATIC = ("cudnn", "xla")


def chunk_attention(
  q_BTHD: Float[Array, "B T H D"],
  k_BSKD: Float[Array, "B S K D"],
  v_BSKD: Float[Array, "B S K D"],
  query_offset: int | Int[Array, ""],
  *,
  window: int | None = None,
  key_bias_BSK: Float[Array, "B S K"] | None = None,
  implementation: ChunkImplementation | None = None,
) -> Float[Array, "B T H D"]:
  """Returns softmax attention with scores scaled by D ** -0.5, of one document a row.

  Query `t` is at position `p = t + query_offset` and sees keys `s <= p`. What lies behind the
  chunk may be anything finite, and is not read. For inference: there is no gradient.

  Args:
    q_BTHD, k_BSKD, v_BSKD: queries, keys and values of one dtype.
    query_offset: position of the first query, from 0 to S - T; may be traced.
    window: keys that a query reads at most, its own and those right before it; None is all.
    key_bias_BSK: added to the scores of each key, after scaling; None is 0.
    implementation: None and `auto` take cuDNN where it can run and `xla` elsewhere; `strict`
      is cuDNN or an error; `reference` is the definition.

  Raises:
    ValueError: shapes or dtypes that do not fit together, queries beyond the keys, a window
      below 1, or an implementation that cannot run here.
    KeyError: no such implementation.
  """
  choice = choose_chunk_attention(
    q_BTHD,
    k_BSKD,
    v_BSKD,
    window=window,
    key_bias_BSK=key_bias_BSK,
    implementation=implementation,
  )
  t, s = q_BTHD.shape[1], k_BSKD.shape[1]
  positions.check(t, s, query_offset)
  # As many queries as keys can only begin with the first.
  offset = 0 if t == s else query_offset
  # A window as long as the row hides nothing.
  window = None if window is None or window >= s else window
  problem = Problem(q_BTHD, k_BSKD, v_BSKD, jnp.asarray(offset, jnp.int32), key_bias_BSK)
  return _IMPLEMENTATIONS[choice.backend](problem, window)


def choose_chunk_attention(
  q_BTHD: Float[Shaped, "B T H D"],
  k_BSKD: Float[Shaped, "B S K D"],
  v_BSKD: Float[Shaped, "B S K D"],
  *,
  window: int | None = None,
  key_bias_BSK: Float[Shaped, "B S K"] | None = None,
  implementation: ChunkImplementation | None = None,
) -> dispatch.Choice:
  """What `chunk_attention` runs for such arrays on the first device, and why.

  Takes the same arguments but for the offset, and raises the same errors; runs nothing, so
  that a `jax.ShapeDtypeStruct` will do for an array. With a window the operation is called
  `sliding_window_chunk_attention`.
  """
  _check(q_BTHD, k_BSKD, v_BSKD, window, key_bias_BSK)
  candidates = {
    "cudnn": lambda: whole_rows.why_not(
      q_BTHD.dtype,
      q_BTHD.shape[-1],
      has_documents=False,
      has_bias=key_bias_BSK is not None,
    ),
    "xla": dispatch.runs_anywhere,
    "reference": dispatch.runs_anywhere,
  }
  op = "chunk_attention" if window is None else "sliding_window_chunk_attention"
  return dispatch.choose(op, implementation, candidates, automatic=AUTOMATIC)


_IMPLEMENTATIONS = {
  "cudnn": cudnn.chunk_attention,
  "xla": xla.chunk_attention,
  "reference": reference.chunk_attention,
}


def _check(q_BTHD, k_BSKD, v_BSKD, window, key_bias_BSK):
  (b, t, h, d), (_, s, k, _) = q_BTHD.shape, k_BSKD.shape
  if k_BSKD.shape != (b, s, k, d) or v_BSKD.shape != (b, s, k, d):
    raise ValueError(f"k and v must be {(b, s, k, d)}, got {k_BSKD.shape} and {v_BSKD.shape}")
  if not q_BTHD.dtype == k_BSKD.dtype == v_BSKD.dtype:
    raise ValueError(
      f"q, k and v must share a dtype, got {q_BTHD.dtype}, {k_BSKD.dtype}, {v_BSKD.dtype}"
    )
  if h % k:
    raise ValueError(f"{h} query heads do not group over {k} key heads")
  if t > s:
    raise ValueError(f"{t} queries do not lie within {s} keys")
  if window is not None and window < 1:
    raise ValueError(f"{window=} must be at least 1, the query's own key")
  if key_bias_BSK is not None and key_bias_BSK.shape != (b, s, k):
    raise ValueError(f"biases of keys must be {(b, s, k)}, got {key_bias_BSK.shape}")
