"""Which units read a tile of keys: the lists turned round, for the gradients of keys.

A tile's units are dealt into *windows* of 32. A kernel walks through windows with one warp
per piece of 16 keys, and holds one window at a time; a warp has work where a unit reads its
piece. In the order of time, the queries that read a piece come in long runs, and most warps
would wait for one. Dealt out one by one over all windows of the tile, every window holds
about the same share of every piece's queries. Where a tile is a single block, every unit
that reads it reads all of it, and windows stay in the order of time: workers at tiles of
their own then read the same queries at about the same time, from the device's cache.

The windows of all tiles, end to end, are cut into parts of equal cost, one or several for
each worker. A tile may be shared by several parts: each leaves its sum in a slot of its own,
`tile + part`, which no other pair has, as either number only grows along the way.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_lists import units

WINDOW = 32
PIECE = 16
# This bit of `pieces` marks units that may not see every key of the tile.
EDGE_BIT = 30
EDGE = 1 << EDGE_BIT
# Costs in units of one product of a warp: a window, which is copied, and a change of tiles.
_WINDOW_COST = 6.0
_TILE_COST = 4.0
# Costs are counted over one of so many units.
_SAMPLE = 8


class KeyTiles(NamedTuple):
  """The units of every tile of `keys_per_tile` keys.

  Attributes:
    units_W: numbers of units, 32 for each window; 0 where a window has room left. Behind
      the last window there is one to spare, for who reads ahead.
    pieces_W: bit p says whether the unit reads the p-th piece of the tile, and `EDGE`.
    tokens_WP: bit i says whether the unit's i-th token reads the p-th piece; None where
      units are single tokens.
    first_window_X: the first window of every tile, and at last their number. X = R * tiles
      of a row, + 1.
    bounds_W: the first window of every part, and at last their number.
    first_tile_W, last_tile_W: the tiles that a part begins and ends in.
    first_part_X, last_part_X: parts that share a tile; where it has no window, the
      last is before the first. Parts between them may have no window at all.
  """

  units_W: jax.Array
  pieces_W: jax.Array
  tokens_WP: jax.Array | None
  first_window_X: jax.Array
  bounds_W: jax.Array
  first_tile_W: jax.Array
  last_tile_W: jax.Array
  first_part_X: jax.Array
  last_part_X: jax.Array


class Dealt(NamedTuple):
  """The units of every tile, dealt into windows; see `KeyTiles`.

  Attributes:
    windows_X: windows of every tile.
    units_W, pieces_W, tokens_WP, first_window_X: see `KeyTiles`.
  """

  windows_X: jax.Array
  first_window_X: jax.Array
  units_W: jax.Array
  pieces_W: jax.Array
  tokens_WP: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
  """How keys make tiles.

  Attributes:
    block_size: keys per block, a multiple of 16 that divides `keys_per_tile`.
    num_blocks: N.
    keys_per_tile: a multiple of 16, for at most 30 pieces.
    in_order: whether units fill one window after the other, in the order of time.
  """

  block_size: int
  num_blocks: int
  keys_per_tile: int
  in_order: bool = False

  @property
  def tiles_per_row(self) -> int:
    return -(-self.num_blocks * self.block_size // self.keys_per_tile)

  @property
  def blocks_per_tile(self) -> int:
    return self.keys_per_tile // self.block_size

  @property
  def pieces_per_block(self) -> int:
    return self.block_size // PIECE

  def most_windows(self, blocks_RUE) -> int:
    """In the worst case: no two blocks of a unit share a tile, no tile fills its last."""
    r, u, e = blocks_RUE.shape
    most_pairs = r * u * min(e, self.tiles_per_row)
    return -(-most_pairs // WINDOW) + r * self.tiles_per_row


def key_tiles(
  lists: units.UnitLists, tiling: Tiling, *, num_parts: int, has_tokens: bool
) -> KeyTiles:
  """Turns the lists round.

  Args:
    lists: of the units.
    tiling: of keys.
    num_parts: of the work.
    has_tokens: whether units hold several tokens.

  Raises:
    ValueError: more pairs of tiles and units than 32 bits can number.
  """
  return share(deal(lists, tiling, has_tokens), lists, tiling, num_parts)


def deal(lists: units.UnitLists, tiling: Tiling, has_tokens: bool) -> Dealt:
  """Finds the units of every tile by sorting; raises what `key_tiles` does."""
  r, u, _ = lists.blocks_RUE.shape
  per_row = tiling.tiles_per_row
  num_tiles = r * per_row
  if max(num_tiles * u, lists.blocks_RUE.size) >= 2**31:
    raise ValueError(
      f"{num_tiles} tiles of {tiling.keys_per_tile} keys times {u} units, or the "
      f"{lists.blocks_RUE.size} entries of lists, are too many to number with 32 bits; use a "
      "smaller batch or larger blocks"
    )
  # Every tile that a unit reads, as `tile * U + unit`, in order; then numbers beyond all.
  number_P, entry_P = jax.lax.sort_key_val(*_pairs(lists.blocks_RUE, tiling))
  edges_X = jnp.searchsorted(
    number_P, jnp.arange(num_tiles + 1, dtype=jnp.uint32) * u, method="scan_unrolled"
  ).astype(jnp.int32)
  windows_X, first_window_X = windows_of(jnp.diff(edges_X))

  most = tiling.most_windows(lists.blocks_RUE)
  window_W = jnp.arange(most, dtype=jnp.int32)
  tile_W = _place(first_window_X, window_W, num_tiles)
  # Pair i of a tile with w windows goes to window i % w, or in order to window i // 32.
  step_W, step_I = (WINDOW, 1) if tiling.in_order else (1, windows_X[tile_W, None])
  pair_WI = edges_X[tile_W, None] + step_W * (window_W - first_window_X[tile_W])[:, None]
  pair_WI += step_I * jnp.arange(WINDOW, dtype=jnp.int32)[None]
  is_pair_WI = (window_W < first_window_X[-1])[:, None] & (pair_WI < edges_X[tile_W + 1, None])
  entry_WI = jnp.where(is_pair_WI, entry_P.at[pair_WI].get(mode="clip"), 0)
  unit_WI = jnp.where(is_pair_WI, entry_WI // lists.blocks_RUE.shape[2] % u, 0)

  pieces_WI, tokens_WIP = _read_by(lists, tile_W, unit_WI, entry_WI, tiling, has_tokens)
  pieces_WI = jnp.where(is_pair_WI, pieces_WI, 0)
  tokens_WP = tokens_WIP.reshape(most * WINDOW, -1) if has_tokens else None
  units_W, pieces_W = (jnp.pad(x.reshape(-1), (0, WINDOW)) for x in (unit_WI, pieces_WI))
  return Dealt(windows_X, first_window_X, units_W, pieces_W, tokens_WP)


def windows_of(num_units_X) -> tuple[jax.Array, jax.Array]:
  """Windows of every tile, and the first of them, from the number of units that read it."""
  windows_X = -(-num_units_X // WINDOW)
  return windows_X, jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(windows_X)])


def share(dealt: Dealt, lists: units.UnitLists, tiling: Tiling, num_parts: int) -> KeyTiles:
  """Cuts the windows into parts of equal cost."""
  windows_X, first_window_X = dealt.windows_X, dealt.first_window_X
  num_tiles = len(windows_X)
  bounds_W = _bounds(_cost(lists, windows_X, tiling), windows_X, first_window_X, num_parts)
  starts_X = first_window_X[:-1]
  return KeyTiles(
    units_W=dealt.units_W,
    pieces_W=dealt.pieces_W,
    tokens_WP=dealt.tokens_WP,
    first_window_X=first_window_X,
    bounds_W=bounds_W,
    first_tile_W=_place(first_window_X, bounds_W[:-1], num_tiles),
    last_tile_W=_place(first_window_X, bounds_W[1:] - 1, num_tiles),
    first_part_X=_place(bounds_W, starts_X, num_parts),
    last_part_X=jnp.where(
      windows_X > 0, _place(bounds_W, first_window_X[1:] - 1, num_parts), -1
    ),
  )


def _pairs(blocks_RUE, tiling: Tiling) -> tuple[jax.Array, jax.Array]:
  """The number of every tile that a unit reads, once, and the entry of its first block there.

  Entries are places in `blocks_RUE`, flat; other places have the largest number.
  """
  r, u, _ = blocks_RUE.shape
  per_row = tiling.tiles_per_row
  is_block_RUE = blocks_RUE < units.NONE
  tile_RUE = jnp.where(is_block_RUE, blocks_RUE // tiling.blocks_per_tile, per_row)
  # Lists ascend, so the blocks of one tile follow each other; the first speaks for all.
  is_first_RUE = jnp.diff(tile_RUE, axis=-1, prepend=-1) != 0
  row_R = jnp.arange(r, dtype=jnp.int32)[:, None, None]
  unit_U = jnp.arange(u, dtype=jnp.int32)[None, :, None]
  number_RUE = ((row_R * per_row + tile_RUE) * u + unit_U).astype(jnp.uint32)
  no_pair = jnp.uint32(2**32 - 1)
  number_P = jnp.where(is_first_RUE & is_block_RUE, number_RUE, no_pair).reshape(-1)
  return number_P, jnp.arange(number_P.size, dtype=jnp.int32)


def _read_by(lists, tile_W, unit_WI, entry_WI, tiling: Tiling, has_tokens):
  """Pieces of its tile that each unit reads, and which of its tokens do (or None).

  `entry_WI` is the first of the unit's blocks in the tile; the others follow it.
  """
  blocks_RUE, tokens_RUE, first_BU, last_BU = lists
  per_row, keys_per_tile = tiling.tiles_per_row, tiling.keys_per_tile
  row_W, x_W = tile_W // per_row, tile_W % per_row
  begin_W1 = (x_W * keys_per_tile)[:, None]
  b_W1 = (row_W // (blocks_RUE.shape[0] // first_BU.shape[0]))[:, None]
  is_edge_WI = first_BU[b_W1, unit_WI] > begin_W1
  is_edge_WI |= last_BU[b_W1, unit_WI] < begin_W1 + keys_per_tile - 1

  per_tile, per_block = tiling.blocks_per_tile, tiling.pieces_per_block
  e, first_block_W1 = blocks_RUE.shape[2], (x_W * per_tile)[:, None]
  pieces_WI, tokens_WIP = jnp.where(is_edge_WI, EDGE, 0), 0
  for i in range(min(per_tile, e)):
    # At the end of a list there is another's.
    is_there_WI = entry_WI % e + i < e
    block_WI = blocks_RUE.reshape(-1).at[entry_WI + i].get(mode="clip") - first_block_W1
    is_there_WI &= (block_WI >= 0) & (block_WI < per_tile)
    piece_WI = jnp.where(is_there_WI, block_WI * per_block, 0)
    bits_WI = jnp.where(is_there_WI, jnp.left_shift((1 << per_block) - 1, piece_WI), 0)
    pieces_WI |= bits_WI
    if has_tokens:
      own_WI = tokens_RUE.reshape(-1).at[entry_WI + i].get(mode="clip")
      piece_P = jnp.arange(keys_per_tile // PIECE)
      has_piece_WIP = jnp.right_shift(bits_WI[..., None], piece_P[None, None]) & 1
      tokens_WIP += has_piece_WIP * own_WI[..., None]
  return pieces_WI, tokens_WIP if has_tokens else None


def _cost(lists, windows_X, tiling: Tiling):
  """What a window of each tile costs: the most products that any of its warps has.

  Counted over every `_SAMPLE`-th unit: costs share out the work, and need not be exact.
  """
  blocks_RUE = lists.blocks_RUE[:, ::_SAMPLE]
  r, per_row, per_tile = blocks_RUE.shape[0], tiling.tiles_per_row, tiling.blocks_per_tile
  row_R = jnp.arange(r, dtype=jnp.int32)[:, None, None]
  index_RUE = jnp.where(
    blocks_RUE < units.NONE, row_R * per_row * per_tile + blocks_RUE, r * per_row * per_tile
  )
  reads = jnp.zeros(r * per_row * per_tile, jnp.int32).at[index_RUE].add(1, mode="drop")
  most_X = _SAMPLE * reads.reshape(r * per_row, per_tile).max(-1)
  return jnp.maximum(most_X / jnp.maximum(windows_X, 1), _WINDOW_COST)


def _bounds(cost_X, windows_X, first_window_X, num_parts: int):
  """Windows at which parts begin, so that all of them cost about the same."""
  total_X = jnp.where(windows_X > 0, cost_X * windows_X + _TILE_COST, 0.0)
  before_X = jnp.concatenate([jnp.zeros(1), jnp.cumsum(total_X)])
  share_W = before_X[-1] * jnp.arange(1, num_parts) / num_parts
  tile_W = _place(before_X, share_W, len(windows_X))
  within_W = ((share_W - before_X[tile_W]) / cost_X[tile_W]).astype(jnp.int32)
  within_W = jnp.clip(within_W, 0, windows_X[tile_W])
  inner_W = first_window_X[tile_W] + within_W
  # Rounding must not send a bound back before the one it follows.
  inner_W = jax.lax.cummax(inner_W.astype(jnp.int32))
  return jnp.concatenate([jnp.zeros(1, jnp.int32), inner_W, first_window_X[-1:]])


def _place(edges, values, num_places: int):
  """The last of the intervals that begin at `edges` in which each value lies."""
  found = jnp.searchsorted(edges, values, side="right", method="scan_unrolled") - 1
  return jnp.clip(found, 0, num_places - 1).astype(jnp.int32)
