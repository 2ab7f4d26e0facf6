"""Full and block-sparse attention over the same queries, keys and values.

Shape letters:
  B batch   T queries and keys   N = ceil(T / block_size) key blocks
  H query heads   K key/value heads   G = H // K   D head size
  M blocks per query (shared by the G heads of a group; -1 marks an empty slot)
"""

from typing import Literal

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.block_sparse_attention import api as sparse
from pallas_kernels.dispatch import Shaped
from pallas_kernels.full_attention import api as full

type DualPathImplementation = Literal["auto", "separate"]

# What `auto` tries, in this order.
AUTOMATIC = ("separate",)


def dual_path_attention(
  q_BTHD: Float[Array, "B T H D"],
  k_BTKD: Float[Array, "B T K D"],
  v_BTKD: Float[Array, "B T K D"],
  blocks_BTKM: Int[Array, "B T K M"],
  *,
  block_size: int,
  full_segments_BT: Int[Array, "B T"] | None = None,
  sparse_segments_BT: Int[Array, "B T"] | None = None,
  max_documents: int | None = None,
  key_bias_BTK: Float[Array, "B T K"] | None = None,
  full_implementation: full.FullImplementation | None = None,
  sparse_implementation: sparse.AttentionImplementation | None = None,
  implementation: DualPathImplementation | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H D"]]:
  """Returns `(full, sparse)`: causal attention to every key, and to the listed blocks.

  The two streams of SSA (arXiv:2511.20102, Algorithm 1). Both carry gradients to q, k, v and
  the bias, and those add up; the lists carry none. Which stream a layer goes on with, and
  where one is held fixed for the other to follow, is the caller's affair: see
  `full_attention` and `block_sparse_attention` for what each is.

  `separate` runs the two back to back. One pass over all tiles could share the product of
  queries and keys, but needs a second accumulator: half as many products again in a dense
  kernel's forward pass (6 D for 4 D operations per score), and two beside five in its
  backward pass. Measured on an H200 (results/kernels), forward, at SSA's budget: Pallas' dense
  kernel takes 1.32 ms at 8k tokens where cuDNN's takes 1.23 and the block-sparse kernel 0.18,
  so that 0.09 ms are left for work of about 0.6 ms; at 2k it takes 0.41 against 0.37 and 0.16,
  with 0.12 ms left for 0.2. There is no dense backward kernel in Mosaic to begin from.

  Args:
    q_BTHD, k_BTKD, v_BTKD: queries, keys and values of one dtype.
    blocks_BTKM: the lists.
    block_size: keys per block; the last block may be cut short by T.
    full_segments_BT, sparse_segments_BT: document of each position, in runs, for either
      stream; None lets it cross documents.
    max_documents: as `full_attention` takes it.
    key_bias_BTK: added to the scaled scores of each key in both streams; None is 0.
    full_implementation, sparse_implementation: what each stream runs on, as the operation of
      that stream takes it.
    implementation: `separate` is the only one and what None and `auto` mean.

  Raises:
    ValueError: shapes or dtypes that do not fit together, or an implementation that cannot
      run here.
    KeyError: no such implementation.
  """
  _choose(implementation)  # there is one so far, but other names are refused
  full_BTHD = full.full_attention(
    q_BTHD,
    k_BTKD,
    v_BTKD,
    segments_BT=full_segments_BT,
    max_documents=max_documents,
    key_bias_BTK=key_bias_BTK,
    implementation=full_implementation,
  )
  sparse_BTHD, _ = sparse.block_sparse_attention(
    q_BTHD,
    k_BTKD,
    v_BTKD,
    blocks_BTKM,
    block_size=block_size,
    segments_BS=sparse_segments_BT,
    key_bias_BSK=key_bias_BTK,
    implementation=sparse_implementation,
  )
  return full_BTHD, sparse_BTHD


def choose_dual_path_attention(
  q_BTHD: Float[Shaped, "B T H D"],
  k_BTKD: Float[Shaped, "B T K D"],
  v_BTKD: Float[Shaped, "B T K D"],
  blocks_BTKM: Int[Shaped, "B T K M"],
  *,
  block_size: int,
  full_segments_BT: Int[Shaped, "B T"] | None = None,
  sparse_segments_BT: Int[Shaped, "B T"] | None = None,
  max_documents: int | None = None,
  key_bias_BTK: Float[Shaped, "B T K"] | None = None,
  full_implementation: full.FullImplementation | None = None,
  sparse_implementation: sparse.AttentionImplementation | None = None,
  implementation: DualPathImplementation | None = None,
) -> dispatch.Choice:
  """What `dual_path_attention` runs for such arrays on the first device, and why.

  Takes the same arguments and raises the same errors; runs nothing, so that a
  `jax.ShapeDtypeStruct` will do for an array. The reason names the streams' backends.
  """
  choice = _choose(implementation)
  parts = (
    full.choose_full_attention(
      q_BTHD,
      k_BTKD,
      v_BTKD,
      segments_BT=full_segments_BT,
      max_documents=max_documents,
      key_bias_BTK=key_bias_BTK,
      implementation=full_implementation,
    ),
    sparse.choose_block_sparse_attention(
      q_BTHD,
      k_BTKD,
      v_BTKD,
      blocks_BTKM,
      block_size=block_size,
      segments_BS=sparse_segments_BT,
      key_bias_BSK=key_bias_BTK,
      implementation=sparse_implementation,
    ),
  )
  return choice._replace(reason=", ".join(f"{part.op} by {part.backend}" for part in parts))


def _choose(implementation) -> dispatch.Choice:
  candidates = {"separate": dispatch.runs_anywhere}
  return dispatch.choose("dual_path_attention", implementation, candidates, automatic=AUTOMATIC)
