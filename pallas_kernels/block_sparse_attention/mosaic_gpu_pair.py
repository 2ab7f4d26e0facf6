"""Two units that a warp takes together for the gradients of its keys; see `mosaic_gpu_dkv`."""

import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import mosaic_ring
from pallas_kernels.block_lists import key_tiles
from pallas_kernels.block_sparse_attention import mosaic_gpu_arrays as arrays
from pallas_kernels.block_sparse_attention.mosaic_gpu_shape import UNIT

# Units that a warp takes in one step.
PAIR = 2
# Numbers of every row of queries, 16 of each: lse in base 2, delta, and the first and the
# last key that it may see. As float32, which holds positions up to 2**24 exactly.
LSE, DELTA, FIRST, LAST = range(0, 4 * UNIT, UNIT)


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two units of a window that read a warp's piece, or one of them twice.

  Attributes:
    share: the `mosaic_gpu_share.Share` of the tile.
    piece: number of the warp's piece in its tile.
    window: that they are of.
    places: of the units in the window.
    first_slot: units of the share before the window.
    is_pair: whether the second one counts.
    edges: bits of the units of the window that do not see every key of the tile.
  """

  share: Any
  piece: jax.Array
  window: jax.Array
  places: tuple[jax.Array, jax.Array]
  first_slot: jax.Array
  is_pair: jax.Array
  edges: jax.Array

  @property
  def slots(self) -> list[jax.Array]:
    """Places of the units in the ring."""
    ring, per_stage = self.share.ring, self.share.config.units_per_stage
    size, before = ring.num_stages * per_stage, ring.before * per_stage
    return [mosaic_ring.wrap(before + self.first_slot + place, size) for place in self.places]

  def columns(self, what: int):
    """Numbers of the units' rows (see `LSE`), [rows, 32]."""
    share = self.share
    places = [(slot, what) for slot in self.slots]
    return share.shape.warps.columns(share.smem["numbers"], places)

  def masked(self, scores):
    """Scores [rows, 32] with keys that a column's query does not see put out of reach."""
    if self.share.shape.has_tokens:
      return self._mask(scores)
    is_edge = ~self.is_pair
    for i in self.places:
      is_edge |= (lax.shift_right_logical(self.edges, i) & 1) == 1
    return lax.cond(is_edge, self._mask, lambda s: s, scores)

  def _mask(self, scores):
    share, warps = self.share, self.share.shape.warps
    # Rows count on through the warps of a thread; within a piece there are 16.
    key = share.first_key + self.piece * UNIT + (warps.iota(0) & (UNIT - 1))
    key = key.astype(jnp.float32)
    first, last = self.columns(FIRST), self.columns(LAST)
    parts = []
    for n in range(PAIR):
      part = slice(UNIT * n, UNIT * (n + 1))
      is_seen = (key >= first[:, part]) & (key <= last[:, part])
      if n:
        is_seen &= self.is_pair
      if share.shape.has_tokens:
        index = self.window * key_tiles.WINDOW + self.places[n]
        bits = share.gmem["tokens"][index, self.piece]
        token = arrays.token_of_row(share.shape, axis=1)
        is_seen &= (lax.shift_right_logical(bits, token) & 1) == 1
      parts.append(jnp.where(is_seen, scores[:, part], arrays.MASKED))
    return jnp.concatenate(parts, axis=1)


def lowest(bits):
  """The number of the lowest bit that is set."""
  return 31 - lax.clz(bits & -bits)
