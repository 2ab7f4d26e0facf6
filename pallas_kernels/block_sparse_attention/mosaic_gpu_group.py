"""The blocks that a warp takes together on its walk along a union; see `mosaic_gpu_walk`."""

import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import mosaic_ring
from pallas_kernels.block_lists import query_tiles
from pallas_kernels.block_sparse_attention.mosaic_gpu_arrays import (
  MASKED,
  along_rows,
  token_of_row,
)
from pallas_kernels.block_sparse_attention.mosaic_gpu_shape import UNIT


@dataclasses.dataclass(frozen=True)
class Group:
  """The blocks that a warp takes in one step.

  Attributes:
    tile: the `mosaic_gpu_tile.Tile` that it walks along.
    entries: of the blocks, ascending.
    is_taken: which of them count: the first ones.
    places: of the blocks in the union.
    e: number of the first entry in its list.
    first, last: keys between which every row of the unit sees everything.
  """

  tile: Any
  entries: list[jax.Array]
  is_taken: list[jax.Array]
  places: list[jax.Array]
  e: jax.Array
  first: jax.Array
  last: jax.Array

  @property
  def num_taken(self) -> jax.Array:
    return sum(taken.astype(jnp.int32) for taken in self.is_taken)

  @property
  def _slots(self) -> list[jax.Array]:
    """Places of the blocks in the ring."""
    ring, group = self.tile.ring, self.tile.shape.group
    size = ring.num_stages * group
    return [mosaic_ring.wrap(ring.before * group + place, size) for place in self.places]

  @property
  def pieces(self) -> list[jax.Array]:
    """Numbers of the group's pieces, 16 keys each, in the ring."""
    per_block = self.tile.shape.pieces_per_block
    return [slot * per_block + i for slot in self._slots for i in range(per_block)]

  def biases(self, numbers: range) -> jax.Array:
    """Biases of the keys of some of its pieces, [rows, 16 len(numbers)]."""
    shape, slots = self.tile.shape, self._slots
    per_block = shape.pieces_per_block
    places = [(slots[n // per_block], UNIT * (n % per_block)) for n in numbers]
    return shape.warps.columns(self.tile.smem["bias"], places)

  def masked(self, scores, numbers: range) -> jax.Array:
    """The scores of some of its pieces, with what a row does not see put out of reach."""
    if self.tile.shape.has_tokens:
      return self._mask(scores, numbers)
    # Entries ascend, so the outer blocks tell. What is not taken has to go in any case.
    begins, size = self._begins, self.tile.shape.block_size
    is_edge = ~self.is_taken[-1]
    is_edge |= (begins[0] < self.first) | (begins[-1] + (size - 1) > self.last)
    return lax.cond(is_edge, lambda s: self._mask(s, numbers), lambda s: s, scores)

  @property
  def _begins(self) -> list[jax.Array]:
    """First keys of the blocks."""
    shift, size = query_tiles.PLACE_BITS, self.tile.shape.block_size
    return [lax.shift_right_logical(x, shift) * size for x in self.entries]

  def _mask(self, scores, numbers):
    tile, shape = self.tile, self.tile.shape
    warps, per_block = shape.warps, shape.pieces_per_block
    first = warps.load_vector(tile.own("first"))
    position = warps.load_vector(tile.own("position"))
    column = warps.iota(1)
    if shape.has_tokens:
      bits = warps.words(tile.own("tokens"), self.e, shape.group)
      token = token_of_row(shape)
    parts = []
    for i, n in enumerate(numbers):
      block = n // per_block
      begin = self._begins[block] + UNIT * (n % per_block)
      # What is not taken begins beyond all positions.
      seen_from = jnp.where(self.is_taken[block], begin, jnp.int32(2**30))
      low, high = (along_rows(x, column.shape) for x in (first - begin, position - seen_from))
      is_seen = (column >= low) & (column <= high)
      if shape.has_tokens:
        is_seen &= (lax.shift_right_logical(bits[block], token) & 1) == 1
      parts.append(jnp.where(is_seen, scores[:, UNIT * i : UNIT * (i + 1)], MASKED))
    return jnp.concatenate(parts, axis=1)
