"""Attention of one query per row to keys that lie in pages, of which a row lists its own.

Shape letters, used in every file of this folder:
  B rows, one query each   H query heads   K key heads   G = H // K   D head size
  P pages   X keys of a page   M slots of a list (shared by the G heads of a group)
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import devices, dispatch
from pallas_kernels.decode_attention import mosaic_gpu, reference, xla
from pallas_kernels.decode_attention import problem as problems
from pallas_kernels.dispatch import Shaped

type DecodeImplementation = Literal["auto", "strict", "mosaic_gpu", "xla", "reference"]

# What `auto` tries, in this order. On an H200 the kernel reads pages in place, at 2.9 TB/s for
# one row of 65,536 keys and up to 4.2 for more; XLA gathers them first.
AUTOMATIC = ("mosaic_gpu", "xla")

DTYPES = (jnp.bfloat16, jnp.float32)


def decode_attention(
  q_BHD: Float[Array, "B H D"],
  k_PXD: Float[Array, "P X D"],
  v_PXD: Float[Array, "P X D"],
  pages_BKM: Int32[Array, "B K M"],
  *,
  begin_BKM: Int32[Array, "B K M"],
  end_BKM: Int32[Array, "B K M"],
  key_bias_PX: Float32[Array, "P X"] | None = None,
  scale: float | None = None,
  implementation: DecodeImplementation | None = None,
) -> tuple[Float[Array, "B H D"], Float32[Array, "B H"]]:
  """Returns `(out, lse)`: softmax attention of every row's query to the keys of its pages.

  What decoding needs: keys and values lie in pages of one key head each (the paged cache of
  vLLM, arXiv:2309.06180), every row lists the pages that it reads for each key head, all of
  its context or the few blocks that a sparse method chose, and the ranges say which keys of a
  page count. Causality, windows and lengths are up to whoever makes lists and ranges.

  `out` has the dtype of `q`; `lse`, float32, is the natural logarithm of the sum of
  exponentiated scores. A row that reads nothing for a key head gets out = 0 and lse = -inf
  there. What is not listed, or outside of its range, reaches no output, be it NaN. Scores and
  softmax are float32; weights are rounded to the dtype of `v` before they meet the values.

  There are no gradients to speak of: kernels have none, and nobody tests those of the rest.

  Args:
    q_BHD: queries; head h reads by the lists of key head h // G. `mosaic_gpu` takes
      bfloat16 alone, and `xla` rounds them to the dtype of the keys.
    k_PXD, v_PXD: keys and values, both bfloat16 or both float32.
    pages_BKM: which pages to read, in any order, each at most once (one that is listed twice
      counts twice). A negative number is an empty slot, and so is one of P or above.
    begin_BKM, end_BKM: of the page in a slot, keys with begin <= i < end are read, 0 <= i < X;
      none where the range is empty.
    key_bias_PX: added to the scores of each key, after scaling (NOSA's importance,
      arXiv:2510.13602); None is 0.
    scale: factor on the scores; None is D ** -0.5.
    implementation: `mosaic_gpu` runs on Hopper GPUs, for the dtypes and sizes in its file;
      `xla` gathers pages and runs anywhere; `reference` is the definition. None and `auto` take
      the kernel where it can run and `xla` elsewhere; `strict` is the kernel or an error.
      Arrays that are divided over a mesh of several devices reach the kernel in
      `jax.shard_map` alone.

  Raises:
    ValueError: shapes or dtypes that do not fit together, or an implementation that cannot
      take the problem or run on this device.
    KeyError: no such implementation.
  """
  problem = problems.Problem(q_BHD, k_PXD, v_PXD, pages_BKM, begin_BKM, end_BKM, key_bias_PX)
  choice = _choose(problem, implementation)
  scale = q_BHD.shape[-1] ** -0.5 if scale is None else scale
  return _IMPLEMENTATIONS[choice.backend](problem, scale)


def choose_decode_attention(
  q_BHD: Float[Shaped, "B H D"],
  k_PXD: Float[Shaped, "P X D"],
  v_PXD: Float[Shaped, "P X D"],
  pages_BKM: Int32[Shaped, "B K M"],
  *,
  begin_BKM: Int32[Shaped, "B K M"],
  end_BKM: Int32[Shaped, "B K M"],
  key_bias_PX: Float32[Shaped, "P X"] | None = None,
  implementation: DecodeImplementation | None = None,
) -> dispatch.Choice:
  """What `decode_attention` runs for such arrays on the first device, and why.

  Takes the same arguments, but for the scale, and raises the same errors; runs nothing, so
  that a `jax.ShapeDtypeStruct` will do for an array.
  """
  problem = problems.Problem(q_BHD, k_PXD, v_PXD, pages_BKM, begin_BKM, end_BKM, key_bias_PX)
  return _choose(problem, implementation)


def _choose(problem, implementation) -> dispatch.Choice:
  _check(problem)
  candidates = {
    "mosaic_gpu": lambda: (
      devices.why_not_hopper()
      or devices.why_not_divided(problem)
      or mosaic_gpu.why_not(problem)
    ),
    "xla": dispatch.runs_anywhere,
    "reference": dispatch.runs_anywhere,
  }
  return dispatch.choose("decode_attention", implementation, candidates, automatic=AUTOMATIC)


_IMPLEMENTATIONS = {
  "mosaic_gpu": mosaic_gpu.decode_attention,
  "xla": xla.decode_attention,
  "reference": reference.decode_attention,
}


def _check(problem):
  q_BHD, k_PXD, v_PXD, pages_BKM, begin_BKM, end_BKM, key_bias_PX = problem
  (b, h, d), (p, x, _) = q_BHD.shape, k_PXD.shape
  if k_PXD.shape != (p, x, d) or v_PXD.shape != (p, x, d):
    raise ValueError(f"k and v must be {(p, x, d)}, got {k_PXD.shape} and {v_PXD.shape}")
  if k_PXD.dtype != v_PXD.dtype or k_PXD.dtype not in DTYPES:
    raise ValueError(
      f"k and v must both be bfloat16 or float32, got {k_PXD.dtype} and {v_PXD.dtype}"
    )
  if pages_BKM.ndim != 3 or pages_BKM.shape[0] != b:
    raise ValueError(f"pages must be {(b,)} + (K, M), got {pages_BKM.shape}")
  if not pages_BKM.shape == begin_BKM.shape == end_BKM.shape:
    raise ValueError(
      f"pages, begin and end must have one shape, got {pages_BKM.shape}, {begin_BKM.shape}"
      f" and {end_BKM.shape}"
    )
  if not pages_BKM.dtype == begin_BKM.dtype == end_BKM.dtype == jnp.int32:
    raise ValueError(
      f"pages, begin and end must be int32, got {pages_BKM.dtype}, {begin_BKM.dtype}"
      f" and {end_BKM.dtype}"
    )
  if 0 in (*q_BHD.shape, *k_PXD.shape, *pages_BKM.shape):
    raise ValueError(
      f"no axis may be empty: q {q_BHD.shape}, k {k_PXD.shape}, pages {pages_BKM.shape}"
    )
  if h % pages_BKM.shape[1]:
    raise ValueError(f"{h} query heads do not group over {pages_BKM.shape[1]} key heads")
  if key_bias_PX is not None and key_bias_PX.shape != (p, x):
    raise ValueError(f"biases of keys must be {(p, x)}, got {key_bias_PX.shape}")
