"""Packs documents into rows of equal length; any row can be made on its own.

Documents are laid end to end in an order drawn from a seed, and row `r` is tokens
`[r T, r T + T]` of that stream. Only the lengths are needed to find a row, so nothing is
packed ahead of time and every row is a pure function of `(shards, T, seed, r)`.

Letters: `T` tokens of a row, `R` records, `M` documents.
"""

import numpy as np

from sparsejax.data import batch, shards


class PackedRows:
  """The rows of a split, as a random-access sequence.

  Attributes:
    records: what is packed.
    max_documents: documents in the row that has the most.
  """

  def __init__(
    self,
    records: shards.Records,
    *,
    sequence_length: int,
    seed: int | None,
    ignore_first_tokens: bool,
    lengths: tuple[int, int] | None = None,
  ):
    """Finds where rows begin.

    Args:
      records: what to pack.
      sequence_length: T.
      seed: of the order of the documents; None keeps the order on disk.
      ignore_first_tokens: whether to give weight 0 to targets that open a document.
      lengths: of the documents that are packed, in tokens: from the first number on and below
        the second; None takes all. There must be such documents.
    """
    self.records = records
    self._length = sequence_length
    self._ignore_first_tokens = ignore_first_tokens
    # Records in stream order: documents are permuted, the records of one stay together.
    starts_M = np.flatnonzero(np.diff(records.document_R, prepend=-1))
    num_records_M = np.diff(starts_M, append=len(records))
    order_M = np.arange(len(starts_M))
    if lengths is not None:
      tokens_M = document_lengths(records)
      order_M = np.flatnonzero((tokens_M >= lengths[0]) & (tokens_M < lengths[1]))
    if seed is not None:
      order_M = np.random.default_rng(seed).permutation(order_M)
    self._record_R = _ranges(starts_M[order_M], num_records_M[order_M])
    self._opens_R = np.diff(records.document_R[self._record_R], prepend=-1) != 0
    self._end_R = np.cumsum(records.tokens_R[self._record_R])
    self.max_documents = self._count_documents()

  @property
  def num_tokens(self) -> int:
    return int(self._end_R[-1])

  def borders(self) -> np.ndarray:
    """Where documents begin in the stream, and behind them where it ends, [M + 1]."""
    begin_R = self._end_R - self.records.tokens_R[self._record_R]
    return np.append(begin_R[self._opens_R], self._end_R[-1])

  def __len__(self) -> int:
    # Every token but the first of the stream is a target once.
    return max(1, -(-(self.num_tokens - 1) // self._length))

  def __getitem__(self, row: int) -> batch.Batch:
    if not 0 <= row < len(self):
      raise IndexError(row)
    start = row * self._length
    # One token more than a row, to be the last target.
    tokens, opens = self.read(start, min(start + self._length + 1, self.num_tokens))
    return make_row(tokens, opens, self._length, self._ignore_first_tokens)

  def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[start, stop)` of the stream, and which of them open a document."""
    tokens, opens = [], []
    place = int(np.searchsorted(self._end_R, start, side="right"))
    while start < stop:
      record_end = int(self._end_R[place])
      record = self.records[self._record_R[place]]
      record_start = record_end - len(record)
      piece = record[start - record_start : stop - record_start]
      is_open = np.zeros(len(piece), bool)
      is_open[0] = self._opens_R[place] and start == record_start
      tokens.append(piece)
      opens.append(is_open)
      start += len(piece)
      place += 1
    return np.concatenate(tokens), np.concatenate(opens)

  def _count_documents(self) -> int:
    opens_at = (self._end_R - self.records.tokens_R[self._record_R])[self._opens_R]
    # The last token of the stream is a target only, and opens no row.
    opens_at = opens_at[opens_at < self.num_tokens - 1]
    per_row = np.bincount(opens_at // self._length, minlength=len(self))
    # A row that does not open a document on its first token also holds the rest of one.
    begins_inside = np.ones(len(per_row), bool)
    begins_inside[opens_at[opens_at % self._length == 0] // self._length] = False
    return int((per_row + begins_inside).max())


def document_lengths(records: shards.Records) -> np.ndarray:
  """Tokens of every document of a split, [M]."""
  starts_M = np.flatnonzero(np.diff(records.document_R, prepend=-1))
  return np.add.reduceat(records.tokens_R.astype(np.int64), starts_M)


def make_row(
  tokens: np.ndarray, opens: np.ndarray, length: int, ignore_first_tokens: bool
) -> batch.Batch:
  """A row of up to `length + 1` tokens, padded at its end.

  Args:
    tokens: ids; the last one is a target only.
    opens: which tokens open a document.
    length: T.
    ignore_first_tokens: whether targets that open a document weigh 0.
  """
  inputs, targets = tokens[:-1], tokens[1:]
  index = np.arange(len(inputs))
  segments = 1 + np.cumsum(opens[:-1]) - int(opens[0])
  opened_at = np.maximum.accumulate(np.where(opens[:-1], index, 0))
  weights = np.ones(len(inputs), np.float32)
  if ignore_first_tokens:
    weights[opens[1:]] = 0.0
  return batch.Batch(
    inputs=_pad(inputs, length, np.int32),
    targets=_pad(targets, length, np.int32),
    weights=_pad(weights, length, np.float32),
    segments=_pad(segments, length, np.int32),
    positions=_pad(index - opened_at, length, np.int32),
  )


def _pad(values: np.ndarray, length: int, dtype) -> np.ndarray:
  padded = np.zeros(length, dtype)
  padded[: len(values)] = values
  return padded


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """The numbers `starts[i], ..., starts[i] + lengths[i] - 1` for every i, end to end."""
  ends = np.cumsum(lengths)
  return np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
