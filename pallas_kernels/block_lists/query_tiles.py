"""What a tile of units reads, and where each unit finds its own blocks in that."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_lists import units

# An entry is a block's number above so many bits, and its place in the tile's union below.
PLACE_BITS = 16
# Larger than any entry: ends the list of a unit.
END = 2**31 - 1
# Entries are read in groups, the last of which may reach beyond the list.
GROUP = 4
# Kernels fetch the union so many numbers at a time.
CHUNK = 32
# A copy to shared memory brings at most so many numbers of a row.
COPY = 256


class QueryTiles(NamedTuple):
  """The blocks of every tile of `units_per_tile` units.

  Attributes:
    union_RXC: numbers of the blocks that any unit of a tile reads, ascending; after the
      last one, it is repeated. X tiles, C a multiple of `CHUNK`.
    count_RX: how many blocks that are.
    entries_RUE: `block << PLACE_BITS | place in the union` of every block of a unit,
      ascending, then `END`. U and E are padded.
    tokens_RUE: bit i says whether the unit's i-th token lists the block.
  """

  union_RXC: jax.Array
  count_RX: jax.Array
  entries_RUE: jax.Array
  tokens_RUE: jax.Array


def check_num_blocks(num_blocks: int) -> None:
  """Raises ValueError for more blocks than an entry can number."""
  if num_blocks >= 2 ** (31 - PLACE_BITS):
    raise ValueError(
      f"{num_blocks} key blocks are more than {2 ** (31 - PLACE_BITS) - 1}; use larger blocks"
    )


def length(num_blocks: int, num_slots: int) -> int:
  """Room for the union of so many slots."""
  # The worst case: every block there is, or no two slots hold the same.
  return -(-min(num_blocks, num_slots) // CHUNK) * CHUNK


def width(num_slots: int) -> int:
  """Room for the entries of a unit with so many slots."""
  # Rows of a multiple of 32 bytes, with room for a group after the last entry; those that
  # are copied in pieces, of 128 bytes.
  whole = 8 if num_slots + GROUP <= COPY else 32
  return -(-(num_slots + GROUP) // whole) * whole


def query_tiles(lists: units.UnitLists, *, units_per_tile: int, num_blocks: int) -> QueryTiles:
  """Joins the lists of every tile.

  Raises:
    ValueError: more blocks than an entry can number.
  """
  check_num_blocks(num_blocks)
  r, u, e = lists.blocks_RUE.shape
  num_tiles = -(-u // units_per_tile)
  rows = [(0, 0), (0, num_tiles * units_per_tile - u), (0, 0)]
  blocks_RUE = jnp.pad(lists.blocks_RUE, rows, constant_values=units.NONE)
  tokens_RUE = jnp.pad(lists.tokens_RUE, rows)

  listed_RXL = blocks_RUE.reshape(r, num_tiles, units_per_tile * e)
  size = length(num_blocks, units_per_tile * e)
  # Marks of all blocks are less to write than lists that long are to sort.
  join = _by_marks if num_blocks <= 2 * listed_RXL.shape[2] else _by_sorting
  union_RXC, place_RXL = join(listed_RXL, size, num_blocks)
  count_RX = (union_RXC < units.NONE).sum(-1).astype(jnp.int32)
  place_RUE = place_RXL.reshape(blocks_RUE.shape)
  entries_RUE = jnp.left_shift(blocks_RUE, PLACE_BITS) | place_RUE
  entries_RUE = jnp.where(blocks_RUE < units.NONE, entries_RUE, END)
  slots = [(0, 0), (0, 0), (0, width(e) - e)]

  last_RX1 = jnp.maximum(count_RX - 1, 0)[..., None]
  last_RX1 = jnp.take_along_axis(union_RXC, last_RX1, axis=-1)
  last_RX1 = jnp.where(count_RX[..., None] > 0, last_RX1, 0)
  return QueryTiles(
    union_RXC=jnp.where(union_RXC < units.NONE, union_RXC, last_RX1),
    count_RX=count_RX,
    entries_RUE=jnp.pad(entries_RUE, slots, constant_values=END),
    tokens_RUE=jnp.pad(tokens_RUE, slots),
  )


def _by_sorting(listed_RXL, size: int, num_blocks: int) -> tuple[jax.Array, jax.Array]:
  """Blocks of every tile, ascending, then `NONE`; and where among them each entry is."""
  del num_blocks
  union_RXC = units.sorted_without_repeats(listed_RXL)[..., :size]
  missing = [(0, 0), (0, 0), (0, size - union_RXC.shape[-1])]
  union_RXC = jnp.pad(union_RXC, missing, constant_values=units.NONE)
  place_RXL = (union_RXC[:, :, None] < listed_RXL[..., None]).sum(-1).astype(jnp.int32)
  return union_RXC, place_RXL


def _by_marks(listed_RXL, size: int, num_blocks: int) -> tuple[jax.Array, jax.Array]:
  """The same, by a mark for every block that a tile lists; `NONE` has any place."""
  r, x, _ = listed_RXL.shape
  listed_YL = listed_RXL.reshape(r * x, -1)
  row_Y1 = jnp.arange(r * x)[:, None]
  marks_YN = jnp.zeros((r * x, num_blocks), jnp.int32)
  marks_YN = marks_YN.at[row_Y1, listed_YL].set(1, mode="drop")
  place_YN = jnp.cumsum(marks_YN, axis=-1) - 1
  number_1N = jnp.arange(num_blocks, dtype=jnp.int32)[None]
  union_YC = jnp.full((r * x, size), units.NONE, jnp.int32)
  to_YN = jnp.where(marks_YN > 0, place_YN, size)
  union_YC = union_YC.at[row_Y1, to_YN].set(number_1N, mode="drop")
  place_YL = jnp.take_along_axis(place_YN, jnp.minimum(listed_YL, num_blocks - 1), axis=-1)
  return union_YC.reshape(r, x, size), place_YL.reshape(listed_RXL.shape)
