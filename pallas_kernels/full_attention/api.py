"""Causal attention to every earlier key of a query's document, or to the last of them.

Shape letters, used in every file of this folder:
  B batch   T queries and keys   H query heads   K key/value heads   D head size
"""

from typing import Literal

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Shaped
from pallas_kernels.full_attention import cudnn, reference, xla

type FullImplementation = Literal["auto", "strict", "cudnn", "xla", "reference"]

# What `auto` tries, in this order.
AUTOMATIC = ("cudnn", "xla")


def full_attention(
  q_BTHD: Float[Array, "B T H D"],
  k_BTKD: Float[Array, "B T K D"],
  v_BTKD: Float[Array, "B T K D"],
  *,
  segments_BT: Int[Array, "B T"] | None = None,
  max_documents: int | None = None,
  window: int | None = None,
  key_bias_BTK: Float[Array, "B T K"] | None = None,
  implementation: FullImplementation | None = None,
) -> Float[Array, "B T H D"]:
  """Returns causal softmax attention with scores scaled by D ** -0.5.

  There is no log-normaliser beside it: JAX cannot differentiate through cuDNN's.

  Args:
    q_BTHD, k_BTKD, v_BTKD: queries, keys and values of one dtype.
    segments_BT: document of each position, in runs; positions of different documents do not
      see each other. None is one document.
    max_documents: runs that a row of segments may hold; needed with them. A row with more
      comes out as NaN on cuDNN, rather than with borders missing. 1 says that segments set
      nothing apart but padding at a row's end; what the padding reads is then undefined.
    window: keys that a query reads at most, its own and those right before it (sliding-window
      attention); None is all of them. `xla` then takes O(T window) time and memory.
    key_bias_BTK: added to the scores of each key, after scaling (NOSA's importance,
      arXiv:2510.13602); None is 0. It carries a gradient.
    implementation: None and `auto` take cuDNN where it can run and `xla` elsewhere; `strict`
      is cuDNN or an error; `reference` is the definition.

  Raises:
    ValueError: shapes or dtypes that do not fit together, segments without
      `max_documents`, a window below 1, or an implementation that cannot run here.
    KeyError: no such implementation.
  """
  choice = choose_full_attention(
    q_BTHD,
    k_BTKD,
    v_BTKD,
    segments_BT=segments_BT,
    max_documents=max_documents,
    window=window,
    key_bias_BTK=key_bias_BTK,
    implementation=implementation,
  )
  run = _IMPLEMENTATIONS[choice.backend]
  # A window as long as the row hides nothing.
  window = None if window is None or window >= q_BTHD.shape[1] else window
  return run(q_BTHD, k_BTKD, v_BTKD, segments_BT, max_documents, window, key_bias_BTK)


def choose_full_attention(
  q_BTHD: Float[Shaped, "B T H D"],
  k_BTKD: Float[Shaped, "B T K D"],
  v_BTKD: Float[Shaped, "B T K D"],
  *,
  segments_BT: Int[Shaped, "B T"] | None = None,
  max_documents: int | None = None,
  window: int | None = None,
  key_bias_BTK: Float[Shaped, "B T K"] | None = None,
  implementation: FullImplementation | None = None,
) -> dispatch.Choice:
  """What `full_attention` runs for such arrays on the first device, and why.

  Takes the same arguments and raises the same errors; runs nothing, so that a
  `jax.ShapeDtypeStruct` will do for an array. With a window the operation is called
  `sliding_window_attention`.
  """
  _check(q_BTHD, k_BTKD, v_BTKD, segments_BT, max_documents, window, key_bias_BTK)
  has_documents = segments_BT is not None and max_documents > 1
  candidates = {
    "cudnn": lambda: cudnn.why_not(
      q_BTHD.dtype,
      q_BTHD.shape[-1],
      has_documents=has_documents,
      has_bias=key_bias_BTK is not None,
    ),
    "xla": dispatch.runs_anywhere,
    "reference": dispatch.runs_anywhere,
  }
  op = "full_attention" if window is None else "sliding_window_attention"
  return dispatch.choose(op, implementation, candidates, automatic=AUTOMATIC)


_IMPLEMENTATIONS = {
  "cudnn": cudnn.full_attention,
  "xla": xla.full_attention,
  "reference": reference.full_attention,
}


def _check(q_BTHD, k_BTKD, v_BTKD, segments_BT, max_documents, window, key_bias_BTK):
  (b, t, h, d), k = q_BTHD.shape, k_BTKD.shape[2]
  if k_BTKD.shape != (b, t, k, d) or v_BTKD.shape != (b, t, k, d):
    raise ValueError(f"k and v must be {(b, t, k, d)}, got {k_BTKD.shape} and {v_BTKD.shape}")
  if not q_BTHD.dtype == k_BTKD.dtype == v_BTKD.dtype:
    raise ValueError(
      f"q, k and v must share a dtype, got {q_BTHD.dtype}, {k_BTKD.dtype}, {v_BTKD.dtype}"
    )
  if h % k:
    raise ValueError(f"{h} query heads do not group over {k} key heads")
  if window is not None and window < 1:
    raise ValueError(f"{window=} must be at least 1, the query's own key")
  if key_bias_BTK is not None and key_bias_BTK.shape != (b, t, k):
    raise ValueError(f"biases of keys must be {(b, t, k)}, got {key_bias_BTK.shape}")
  if segments_BT is None:
    return
  if segments_BT.shape != (b, t):
    raise ValueError(f"segments must be {(b, t)}, got {segments_BT.shape}")
  if max_documents is None or max_documents < 1:
    raise ValueError(f"{max_documents=} must be at least 1 where there are segments")
