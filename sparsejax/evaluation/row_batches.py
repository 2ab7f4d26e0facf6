"""Rows of different lengths in batches of few shapes."""

from collections.abc import Iterator, Sequence

import numpy as np

from sparsejax.data import batch as data

# Rows shorter than this share one program with those that are as long.
_SHORTEST = 64


def row_lengths(max_length: int, block_size: int, dense_length: int = 0) -> list[int]:
  """Lengths that rows are padded to, ascending: whole blocks, doubled up to `max_length`.

  Args:
    max_length: the last of them.
    block_size: tokens of a block.
    dense_length: rows of fewer tokens run the full stream (InfLLM-V2). The longest that do are
      a length of their own, lest padding make a short row sparse.
  """
  length = -(-_SHORTEST // block_size) * block_size
  lengths = {max_length}
  while length < max_length:
    lengths.add(length)
    length *= 2
  if 1 < dense_length <= max_length:
    lengths.add(dense_length - 1)
  return sorted(lengths)


def make_row(ids: Sequence[int], num_scored: int, length: int) -> data.Batch:
  """Ids as one document in a row of `length` tokens; the last `num_scored` of them count."""
  size = len(ids) - 1
  inputs, targets, segments = np.zeros((3, length), np.int32)
  weights = np.zeros(length, np.float32)
  inputs[:size], targets[:size], segments[:size] = ids[:-1], ids[1:], 1
  weights[size - num_scored : size] = 1
  return data.Batch(inputs, targets, weights, segments, np.arange(length, dtype=np.int32))


def by_length(
  lengths: Sequence[int], *, max_length: int, rows: int, num_devices: int
) -> Iterator[tuple[int, list[int], int]]:
  """Batches of rows of one length: that length, numbers of rows, and rows of the batch.

  The longest come first: what does not fit in memory then fails at once.

  Args:
    lengths: of every row, padding included.
    max_length: of a row.
    rows: of `max_length` tokens in a batch; of shorter ones as many more.
    num_devices: that divide a batch among themselves, whole rows each.
  """
  groups: dict[int, list[int]] = {}
  for number, length in enumerate(lengths):
    groups.setdefault(int(length), []).append(number)
  for length, numbers in sorted(groups.items(), reverse=True):
    most = -(-(rows * max_length // length) // num_devices) * num_devices
    for start in range(0, len(numbers), most):
      picked = numbers[start : start + most]
      # Few rows are padded to a power of two of rows per device, not to a whole batch.
      each = 1 << (-(-len(picked) // num_devices) - 1).bit_length()
      yield length, picked, min(each * num_devices, most)
