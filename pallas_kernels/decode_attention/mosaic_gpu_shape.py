"""Sizes that the files of the Mosaic GPU kernel share; see `mosaic_gpu`.

Extra shape letters:
  R = B * K rows of a list   U units of 16 query heads   N pieces of 16 keys
"""

import dataclasses

from pallas_kernels import mosaic_warp

PIECE = mosaic_warp.PIECE
# Of a warpgroup. Each works alone: on one unit, and on pieces of its own.
WARPS = 4
# Thread blocks of a multiprocessor, which shared memory has room for.
RESIDENT = 2
# What a thread block costs besides its pieces, in the time that a warp takes for one.
_COST = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """What may change speed but never the answer.

  Attributes:
    stages: pieces of keys and values in shared memory, for every warp.
    group: pieces that a warp takes together.
  """

  stages: int
  group: int


def config(head_dim: int) -> Config:
  """24 KiB in shared memory for every warp."""
  return Config(stages=6, group=4) if head_dim == 64 else Config(stages=3, group=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """One call, as the kernel sees it.

  Attributes:
    num_rows: R.
    num_units: U, 1 or 2.
    num_slots, num_pages, page_size, head_dim: M, P, X and D.
    num_splits: thread blocks that share a row.
    has_bias: whether keys have biases.
    interpreted: whether the kernel runs in the interpreter.
  """

  num_rows: int
  num_units: int
  num_slots: int
  num_pages: int
  page_size: int
  head_dim: int
  num_splits: int
  has_bias: bool
  interpreted: bool

  @property
  def warps(self) -> mosaic_warp.Warps:
    return mosaic_warp.Warps(self.interpreted)

  @property
  def num_threads(self) -> int:
    return WARPS // self.warps.per_thread

  @property
  def pieces_per_page(self) -> int:
    return self.page_size // PIECE

  @property
  def num_pieces(self) -> int:
    """N, of a row's list."""
    return self.num_slots * self.pieces_per_page

  @property
  def num_takers(self) -> int:
    """Warps that share the pieces of a row, for each unit."""
    return self.num_splits * (WARPS // self.num_units)


def num_splits(num_rows: int, num_pieces: int, takers: int, num_multiprocessors: int) -> int:
  """Thread blocks for each row, so that all of them are done soonest.

  Args:
    num_rows: R.
    num_pieces: N, counting all slots as full.
    takers: of a thread block.
    num_multiprocessors: of the device.
  """
  room = RESIDENT * num_multiprocessors
  # More than fit at once help only where they round up to better advantage.
  most = min(-(-num_pieces // takers), max(1, 2 * room // num_rows))

  def time(splits):
    waves = -(-num_rows * splits // room)
    return waves * (-(-num_pieces // (takers * splits)) + _COST)

  return min(range(1, most + 1), key=time)
