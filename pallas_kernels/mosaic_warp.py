"""Matrix products in which every warp chooses its own keys, for Mosaic GPU kernels.

A thread of a Mosaic kernel is a warpgroup, and its matrix instructions multiply the rows of
all four warps by the same right-hand side. Attention with lists wants the opposite: the 16
rows of a warp are the heads of one query (or a piece of 16 keys), and they meet only what
that query lists. Here every warp multiplies its rows by *pieces*, 16 consecutive rows of a
shared-memory array, whose numbers it found itself.

Rows, weights and accumulators are ordinary Pallas arrays `[rows, n]`: in the WGMMA layout
each warp holds 16 rows just as the warp-level instruction `mma.sync.m16n8k16` wants them.
So all but the products is plain Pallas. Numbers of pieces are scalars; they may differ
between the warps of a thread, and may steer loops and branches in which nothing
synchronises the warpgroup.

The interpreter knows none of this. There, a thread stands for one warp and has 16 rows:
`Warps` says how many warps a thread is, and its methods do the same by other means. Where
all warps of a thread work as one (see `mosaic_warpgroup`), a thread is four warps there too.
"""

from collections.abc import Sequence
import dataclasses

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_inline as inline
from pallas_kernels.mosaic_inline import LAYOUT, PIECE


@dataclasses.dataclass(frozen=True)
class Warps:
  """The warps of one thread of a kernel.

  Attributes:
    interpreted: whether the kernel runs in the interpreter.
    as_one: whether the warps of a thread never part, and need no numbers of their own.
  """

  interpreted: bool
  as_one: bool = False

  @property
  def per_thread(self) -> int:
    return 1 if self.interpreted and not self.as_one else 4

  @property
  def rows(self) -> int:
    """Rows of a thread, 16 for each of its warps."""
    return PIECE * self.per_thread

  # Arrays.

  def zeros(self, num_columns: int) -> jax.Array:
    """[rows, num_columns] of float32."""
    return self._cast(jnp.zeros((self.rows, num_columns), jnp.float32), LAYOUT)

  def filled(self, value: float) -> jax.Array:
    """[rows] of float32, one number per row."""
    return self._cast(jnp.full((self.rows,), value, jnp.float32), LAYOUT.reduce(1))

  def iota(self, axis: int, num_columns: int = PIECE) -> jax.Array:
    """[rows, num_columns] of int32: the number of the row, or of the column."""
    shape = (self.rows, num_columns)
    if self.interpreted:
      return lax.broadcasted_iota(jnp.int32, shape, axis)
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=LAYOUT)

  def load_vector(self, ref) -> jax.Array:
    """[rows] of a shared-memory vector."""
    return ref[...] if self.interpreted else plgpu.load(ref, layout=LAYOUT.reduce(1))

  def load_rows(self, ref) -> jax.Array:
    """bfloat16 [rows, D] of a tiled shared-memory array, as left operand of products."""
    return ref[...] if self.interpreted else inline.load_rows(ref)

  # Rows in device memory, counted among all rows of D elements of an array [..., D].

  def load_global_rows(self, ref, row, step: int) -> jax.Array:
    """bfloat16 [rows, D]: each warp's rows `row`, `row + step` and on, as left operand."""
    if not self.interpreted:
      return inline.load_global_rows(ref, row, step)
    return _flat_rows(ref, [row + step * i for i in range(PIECE)])

  def store_global_rows(self, ref, row, is_there, x) -> None:
    """Writes bfloat16 [rows, D] from each warp's `row` on, where `is_there`."""
    if not self.interpreted:
      inline.store_global_rows(ref, row, is_there, x)
      return
    *index, first = _index_of_row(ref, row)

    @pl.when(is_there)
    def _store():
      ref[*index, pl.ds(first, PIECE), :] = x

  # Products.

  def products(self, rows, ref, pieces: Sequence[jax.Array]) -> jax.Array:
    """float32 [rows, 16 len(pieces)]: each warp's rows times the rows of its pieces.

    Args:
      rows: bfloat16 [rows, D] from `load_rows`.
      ref: tiled shared-memory array [16 n, D].
      pieces: their numbers, below n.
    """
    if not self.interpreted:
      return inline.products(rows, ref, pieces)
    keys = [_read_piece(ref, piece) for piece in pieces]
    return jnp.concatenate([_dot(rows, key.T) for key in keys], axis=1)

  def add_products(self, total, weights, ref, pieces: Sequence[jax.Array]) -> jax.Array:
    """float32 [rows, D]: `total` plus each warp's weights times the rows of its pieces.

    Args:
      total: float32 [rows, D].
      weights: bfloat16 [rows, 16 len(pieces)].
      ref: tiled shared-memory array [16 n, D].
      pieces: their numbers, below n.
    """
    if not self.interpreted:
      return inline.add_products(total, weights, ref, pieces)
    for number, piece in enumerate(pieces):
      part = weights[:, PIECE * number : PIECE * (number + 1)]
      total = total + _dot(part, _read_piece(ref, piece))
    return total

  def row_sums(self, weights) -> jax.Array:
    """float32 [rows]: sums of bfloat16 [rows, 16 n]; a product with ones costs less."""
    if not self.interpreted:
      return inline.row_sums(weights)
    return weights.astype(jnp.float32).sum(axis=1)

  def columns(self, ref, places: Sequence[tuple[jax.Array, int | jax.Array]]) -> jax.Array:
    """float32 [rows, 16 len(places)]: numbers that belong to columns, the same in every row.

    Args:
      ref: float32 shared-memory array [n, m].
      places: `(row, start)`, each naming `ref[row, start : start + 16]`.
    """
    if not self.interpreted:
      return inline.columns(ref, places)
    parts = [ref[row, pl.ds(start, PIECE)] for row, start in places]
    return jnp.broadcast_to(jnp.concatenate(parts)[None], (self.rows, PIECE * len(parts)))

  # Scalars that each warp has for itself.

  def index(self) -> jax.Array:
    """The number of the warp in its thread."""
    return jnp.int32(0) if self.interpreted else inline.warp_index()

  def synchronize(self) -> None:
    """Lets the lanes of each warp see what the others have written to shared memory."""
    if not self.interpreted:
      inline.synchronize()

  def any_above(self, x_rows, limit: float) -> jax.Array:
    """Whether any of the numbers of a warp's rows, float32 [rows], is above a limit."""
    if self.interpreted:
      return (x_rows > limit).any()
    return inline.any_above(x_rows, limit) != 0

  def words(self, ref, start, num_words: int) -> list[jax.Array]:
    """The words from `start` on of each warp's row of an int32 shared-memory array.

    A vector counts as rows of 16.
    """
    if self.interpreted:
      row = (0,) if len(ref.shape) == 2 else ()
      return [ref[*row, start + i] for i in range(num_words)]
    return list(inline.words(ref, start, num_words))

  def ballot(self, ref, start, bit) -> jax.Array:
    """An int32 whose bit i is bit `bit` of `ref[start + i]`, an int32 GMEM vector."""
    if not self.interpreted:
      return inline.ballot(ref, start, bit)
    one = jnp.int32(1)

    def add(i, word):
      is_set = lax.shift_right_logical(ref[start + i], bit) & 1
      return word | lax.shift_left(is_set * one, i)

    return lax.fori_loop(0, 32, add, jnp.int32(0))

  # Numbers that a single warp reads from device memory, 32 at a time and ahead of use.

  def fetch(self, ref, start) -> jax.Array:
    """Begins to read `ref[start : start + 32]` of an int32 GMEM vector (see `fetched`)."""
    return jnp.int32(start) if self.interpreted else inline.lane_load(ref, start)

  def fetched(self, ref, handle, i) -> jax.Array:
    """The i-th of the numbers that `handle = fetch(ref, start)` stands for."""
    return ref[handle + i] if self.interpreted else inline.of_lane(handle, i)

  def _cast(self, x, layout):
    return x if self.interpreted else plgpu.layout_cast(x, layout)


def _index_of_row(ref, row) -> list[jax.Array]:
  """The index, but for the last axis, of a row of D elements."""
  index = []
  for size in ref.shape[-2:0:-1]:
    index.insert(0, lax.rem(row, jnp.int32(size)))
    row = lax.div(row, jnp.int32(size))
  return [row, *index]


def _flat_rows(ref, rows):
  return jnp.stack([ref[*_index_of_row(ref, row), :] for row in rows])


def _read_piece(ref, piece):
  return ref[pl.ds(piece * PIECE, PIECE), :]


def _dot(a, b):
  return jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
