"""From queries and keys to the list of key blocks that each query reads.

Shape letters, used in every file of this folder:
  B batch   T queries and keys   N = ceil(T / block_size) key blocks
  H query heads   K key/value heads   G = H // K   D head size
  M blocks per query (shared by the G heads of a group; -1 marks an empty slot)
"""

from typing import Literal

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.block_selection import reference, xla

type SelectionImplementation = Literal["reference", "xla"]
type Rule = Literal["exact", "half_local"]


def select_blocks(
  q_BTHD: Float[Array, "B T H D"],
  k_BTKD: Float[Array, "B T K D"],
  *,
  block_size: int,
  num_blocks: int,
  segments_BT: Int[Array, "B T"] | None = None,
  scale: float | None = None,
  rule: Rule = "exact",
  implementation: SelectionImplementation | None = None,
) -> Int[Array, "B T K M"]:
  """Returns the `num_blocks` best blocks of every query and key head, -1 where fewer exist.

  A block is represented by the mean of its keys. Each query head turns its scores with the
  blocks that are complete at its position into a softmax; the probabilities are summed over
  the heads of a group, and the best blocks before the query's own are taken. The query's
  own block always is. Equal scores are decided for the lower block. This is the selection
  of SSA (arXiv:2511.20102, section 4.1 and released code).

  With segments, a query sees only blocks whose last key lies in its own document, and a
  block's mean covers only the keys of the document of its last key: what lies before is
  hidden from every query that can see the block. Segments must be runs.

  Lists are in no particular order and carry no gradient.

  Args:
    q_BTHD, k_BTKD: queries and keys, positions encoded.
    block_size: keys per block.
    num_blocks: M.
    segments_BT: document of each position; None is one document.
    scale: factor on the scores; None is D ** -0.5.
    rule: `exact`: the best of all blocks; `half_local`: the best M/2 blocks among the
      M-aligned run of blocks that the query's own is in, and the best M/2 before it. The
      latter is what SSA's released kernel computes where block_size = M.
    implementation: None is the fastest one this device supports.

  Raises:
    ValueError: shapes that do not fit together, or an odd M under `half_local`.
    KeyError: no such rule or implementation.
  """
  _check(q_BTHD, k_BTKD, segments_BT, block_size, num_blocks, rule)
  scale = q_BTHD.shape[-1] ** -0.5 if scale is None else scale
  run = _IMPLEMENTATIONS[implementation or "xla"]
  q_BTHD, k_BTKD = jax.lax.stop_gradient((q_BTHD, k_BTKD))
  return run(
    q_BTHD,
    k_BTKD,
    segments_BT,
    block_size=block_size,
    num_blocks=num_blocks,
    scale=scale,
    rule=rule,
  )


_IMPLEMENTATIONS = {"reference": reference.select_blocks, "xla": xla.select_blocks}


def _check(q_BTHD, k_BTKD, segments_BT, block_size, num_blocks, rule):
  (b, t, h, d), k = q_BTHD.shape, k_BTKD.shape[2]
  if k_BTKD.shape != (b, t, k, d):
    raise ValueError(f"keys must be {(b, t, k, d)}, got {k_BTKD.shape}")
  if h % k:
    raise ValueError(f"{h} query heads do not group over {k} key heads")
  if block_size < 1 or num_blocks < 1:
    raise ValueError(f"{block_size=} and {num_blocks=} must be at least 1")
  if rule not in ("exact", "half_local"):
    raise KeyError(f"no selection rule {rule!r}: exact or half_local")
  if rule == "half_local" and num_blocks % 2:
    raise ValueError(f"{num_blocks=} must be even for rule='half_local'")
  if segments_BT is not None and segments_BT.shape != (b, t):
    raise ValueError(f"segments must be {(b, t)}, got {segments_BT.shape}")
