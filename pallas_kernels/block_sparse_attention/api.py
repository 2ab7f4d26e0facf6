"""Attention in which every query reads a short list of key blocks.

Shape letters, used in every file of this folder:
  B batch   T queries   S keys   N = ceil(S / block_size) key blocks
  H query heads   K key/value heads   G = H // K   D head size
  M blocks per query (shared by the G heads of a group; -1 marks an empty slot)
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import devices, dispatch, positions
from pallas_kernels.block_sparse_attention import mosaic_gpu, reference, triton_gpu, xla
from pallas_kernels.block_sparse_attention import problem as problems
from pallas_kernels.dispatch import Shaped

type AttentionImplementation = Literal[
  "auto", "strict", "mosaic_gpu", "triton", "xla", "reference"
]

# What `auto` tries, in this order. Not Triton: it has not
# been timed, and has run on no GPU but Hopper.
AUTOMATIC = ("mosaic_gpu", "xla")


def block_sparse_attention(
  q_BTHD: Float[Array, "B T H D"],
  k_BSKD: Float[Array, "B S K D"],
  v_BSKD: Float[Array, "B S K D"],
  blocks_BTKM: Int[Array, "B T K M"],
  *,
  block_size: int,
  query_offset: int | Int[Array, ""] = 0,
  segments_BS: Int[Array, "B S"] | None = None,
  key_bias_BSK: Float[Array, "B S K"] | None = None,
  scale: float | None = None,
  implementation: AttentionImplementation | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
  """Returns `(out, lse)`: causal attention restricted to the listed blocks.

  Query `t` is at position `p = t + query_offset`. It sees key `s` iff `s <= p`,
  `s // block_size` is one of `blocks[:, t]`, and positions `p` and `s` have the same
  segment. A query that sees no key gets `out = 0` and `lse = -inf`. Lists need not be
  sorted; a repeated block counts once; a block beyond the keys is as good as -1.

  `lse` is the natural logarithm of the sum of the exponentiated scores, float32. It is
  always returned, so no flag changes the type of the result. Both outputs carry gradients
  to q, k, v and the bias; the lists carry none.

  Args:
    q_BTHD, k_BSKD, v_BSKD: queries, keys and values of one dtype.
    blocks_BTKM: the lists.
    block_size: keys per block; the last block may be cut short by S.
    query_offset: position of the first query, when queries come in chunks.
    segments_BS: document of each position, in runs; positions of different documents do not
      see each other. None is one document.
    key_bias_BSK: added to the scores of each key, after scaling (NOSA's importance,
      arXiv:2510.13602); None is 0.
    scale: factor on the scores; None is D ** -0.5.
    implementation: `mosaic_gpu` runs on Hopper GPUs, `triton` on NVIDIA GPUs from Ampere on
      where the extra of that name is installed, each for the dtypes and sizes in its file;
      `xla` runs anywhere; `reference` is the definition. None and `auto` take `mosaic_gpu`
      where it can run and `xla` elsewhere; `triton` runs by name or with `strict`, which is
      the first of the GPU kernels that can run, or an error. Arrays that are divided over a
      mesh of several devices reach the kernels in `jax.shard_map` alone.

  Raises:
    ValueError: shapes or dtypes that do not fit together, queries beyond the keys, or an
      implementation that cannot take the problem or run on this device.
    KeyError: no such implementation.
  """
  _check(q_BTHD, k_BSKD, v_BSKD, blocks_BTKM, query_offset, segments_BS, block_size)
  problem = problems.Problem(
    q_BTHD,
    k_BSKD,
    v_BSKD,
    jax.lax.stop_gradient(blocks_BTKM),
    jnp.asarray(query_offset, jnp.int32),
    segments_BS,
    key_bias_BSK,
  )
  # As many queries as keys can only begin with the first.
  is_whole = q_BTHD.shape[1] == k_BSKD.shape[1]
  known_offset = query_offset if isinstance(query_offset, int) else 0 if is_whole else None
  scale = q_BTHD.shape[-1] ** -0.5 if scale is None else scale
  run = _IMPLEMENTATIONS[_choose(problem, block_size, implementation).backend]
  return run(problem, known_offset, block_size, scale)


def choose_block_sparse_attention(
  q_BTHD: Float[Shaped, "B T H D"],
  k_BSKD: Float[Shaped, "B S K D"],
  v_BSKD: Float[Shaped, "B S K D"],
  blocks_BTKM: Int[Shaped, "B T K M"],
  *,
  block_size: int,
  segments_BS: Int[Shaped, "B S"] | None = None,
  key_bias_BSK: Float[Shaped, "B S K"] | None = None,
  implementation: AttentionImplementation | None = None,
) -> dispatch.Choice:
  """What `block_sparse_attention` runs for such arrays on the first device, and why.

  Takes the same arguments, but for those that do not matter here, and raises the same
  errors; runs nothing, so that a `jax.ShapeDtypeStruct` will do for an array.
  """
  _check(q_BTHD, k_BSKD, v_BSKD, blocks_BTKM, 0, segments_BS, block_size)
  offset = jax.ShapeDtypeStruct((), jnp.int32)
  problem = problems.Problem(
    q_BTHD, k_BSKD, v_BSKD, blocks_BTKM, offset, segments_BS, key_bias_BSK
  )
  return _choose(problem, block_size, implementation)


def _choose(problem, block_size, implementation) -> dispatch.Choice:
  candidates = {
    "mosaic_gpu": lambda: (
      devices.why_not_hopper()
      or devices.why_not_divided(problem)
      or mosaic_gpu.why_not(problem, block_size)
    ),
    "triton": lambda: (
      triton_gpu.why_not_here()
      or devices.why_not_divided(problem)
      or triton_gpu.why_not(problem, block_size)
    ),
    "xla": dispatch.runs_anywhere,
    "reference": dispatch.runs_anywhere,
  }
  return dispatch.choose(
    "block_sparse_attention", implementation, candidates, automatic=AUTOMATIC
  )


_IMPLEMENTATIONS = {
  "mosaic_gpu": mosaic_gpu.block_sparse_attention,
  "triton": triton_gpu.block_sparse_attention,
  "xla": xla.block_sparse_attention,
  "reference": reference.block_sparse_attention,
}


def _check(q_BTHD, k_BSKD, v_BSKD, blocks_BTKM, query_offset, segments_BS, block_size):
  (b, t, h, d), (_, s, k, _) = q_BTHD.shape, k_BSKD.shape
  if k_BSKD.shape != (b, s, k, d) or v_BSKD.shape != (b, s, k, d):
    raise ValueError(f"k and v must be {(b, s, k, d)}, got {k_BSKD.shape} and {v_BSKD.shape}")
  if not q_BTHD.dtype == k_BSKD.dtype == v_BSKD.dtype:
    raise ValueError(
      f"q, k and v must share a dtype, got {q_BTHD.dtype}, {k_BSKD.dtype}, {v_BSKD.dtype}"
    )
  if h % k:
    raise ValueError(f"{h} query heads do not group over {k} key heads")
  if block_size < 1:
    raise ValueError(f"{block_size=} must be at least 1")
  if blocks_BTKM.shape[:3] != (b, t, k):
    raise ValueError(f"blocks must be {(b, t, k)} + (M,), got {blocks_BTKM.shape}")
  if not jnp.issubdtype(blocks_BTKM.dtype, jnp.integer):
    raise ValueError(f"blocks must be integers, got {blocks_BTKM.dtype}")
  positions.check(t, s, query_offset)
  if segments_BS is not None and segments_BS.shape != (b, s):
    raise ValueError(f"segments must be {(b, s)}, got {segments_BS.shape}")
