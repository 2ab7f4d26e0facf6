"""What a protocol reads of a text: rows of tokens, and the sums that their scores go into.

Letters: R rows, T tokens of a row, U units, M documents.
"""

import bisect
from collections.abc import Iterable, Sequence
import dataclasses
import itertools

import numpy as np

from sparsejax import errors
from sparsejax.data import batch as data
from sparsejax.data import corpus as corpora
from sparsejax.evaluation import plans, row_batches
from sparsejax.evaluation.protocols import held_out, windows


@dataclasses.dataclass(frozen=True)
class Reading:
  """Rows that are scored.

  Attributes:
    rows: of tokens, weights saying which targets count.
    lengths_R: tokens of each row, padding included.
    units_R: the unit whose sums a row's scores go into: a row, a window, a document. Units
      are what standard errors take to be independent.
    max_documents: documents in the row that has the most.
    bytes_per_id: UTF-8 bytes that targets stand for; None where there is no text.
    num_bytes_U: UTF-8 bytes of each unit, in place of those; None if they are not known.
    num_words_U: words of each unit; None if they are not known, or units are no whole texts.
  """

  rows: Sequence[data.Batch]
  lengths_R: np.ndarray
  units_R: np.ndarray
  max_documents: int
  bytes_per_id: np.ndarray | None
  num_bytes_U: np.ndarray | None = None
  num_words_U: np.ndarray | None = None

  @property
  def text(self) -> str | None:
    """Of units that are whole texts, which are the same whatever the tokenizer; else None.

    Texts are told apart by their bytes and words alone, and by their names elsewhere.
    """
    if self.num_bytes_U is None or self.num_words_U is None:
      return None
    return plans.digest([self.num_bytes_U.tolist(), self.num_words_U.tolist()])


class _Windows:
  """Rows of spans of a stream of tokens, each read as one document."""

  def __init__(
    self,
    text: held_out.Text,
    spans: Sequence[windows.Span],
    lengths: Sequence[int],
    *,
    is_open_scored: bool,
  ):
    """Reads nothing yet.

    Args:
      text: the stream; a span may begin one token before it, with the id that opens texts.
      spans: in the stream.
      lengths: that rows are padded to, ascending.
      is_open_scored: whether targets that open a document count.
    """
    self._text, self._spans, self._is_open_scored = text, spans, is_open_scored
    self.lengths_R = np.array(
      [lengths[bisect.bisect_left(lengths, s.stop - s.start - 1)] for s in spans], np.int64
    )

  def __len__(self) -> int:
    return len(self._spans)

  def __getitem__(self, row: int) -> data.Batch:
    start, first, stop = self._spans[row]
    ids, opens = self._text.packed.read(max(0, start), stop)
    if start < 0:
      ids, opens = np.append(self._text.prefix_id, ids), np.append(False, opens)
    made = row_batches.make_row(ids, stop - first, int(self.lengths_R[row]))
    if not self._is_open_scored:
      made.weights[: len(ids) - 1][opens[1:]] = 0
    return made


def of_rows(
  rows: corpora.Rows, length: int, bytes_per_id: np.ndarray | None, most: int
) -> Reading:
  """Packed rows: every token once, documents apart from each other.

  Args:
    rows: of the data.
    length: of a row.
    bytes_per_id: see `Reading`.
    most: rows that are taken; 0 takes all.
  """
  count = min(most or len(rows), len(rows))
  return Reading(
    rows=_First(rows, count),
    lengths_R=np.full(count, length),
    units_R=np.arange(count),
    max_documents=rows.max_documents,
    bytes_per_id=bytes_per_id,
  )


def sliding(
  text: held_out.Text, window: int, stride: int, lengths: Sequence[int], *,
  is_open_scored: bool, most: int,
) -> Reading:  # fmt: skip
  """Windows over all documents end to end, with the marks between them; a unit is a window.

  A window does not know where documents end. See `windows.sliding`.

  Args:
    text: to read.
    window, stride: tokens.
    lengths: that rows are padded to, ascending, the last of them `window`.
    is_open_scored: whether targets that open a document count.
    most: windows that are taken; 0 takes all.
  """
  spans = list(windows.sliding(text.packed.num_tokens - 1, window, stride))[: most or None]
  found = _Windows(text, spans, lengths, is_open_scored=is_open_scored)
  return Reading(found, found.lengths_R, np.arange(len(spans)), 1, text.bytes_per_id)


def documents(
  text: held_out.Text, window: int, stride: int, lengths: Sequence[int], *, most: int
) -> Reading:
  """Each document by itself, which is a unit; its marks are not scored.

  The first token follows the id that opens texts. See `windows.rolling`.

  Args:
    text: to read.
    window, stride: tokens.
    lengths: that rows are padded to, ascending, the last of them `window`.
    most: documents that are taken; 0 takes all.

  Raises:
    DataError: documents without a token.
  """
  bounds = _texts(text)
  # There are documents that a tokenizer has no ids for.
  chosen_U = [m for m, (begin, stop) in enumerate(bounds) if stop > begin + 1][: most or None]
  spans, units = [], []
  for unit, (begin, stop) in enumerate(bounds[m] for m in chosen_U):
    for span in windows.rolling(stop - begin - 1, window, stride):
      spans.append(windows.Span(*(begin + place for place in span)))
      units.append(unit)
  if not spans:
    raise errors.DataError(f"the documents of {text.name} have no tokens to score.")
  found = _Windows(text, spans, lengths, is_open_scored=True)
  num_bytes_U, num_words_U = _measures(text, chosen_U, bounds)
  return Reading(
    rows=found,
    lengths_R=found.lengths_R,
    units_R=np.array(units),
    max_documents=1,
    bytes_per_id=text.bytes_per_id,
    num_bytes_U=num_bytes_U,
    num_words_U=num_words_U,
  )


def drawn(
  text: held_out.Text,
  window_lengths: Sequence[int],
  stride: int,
  lengths_of: Iterable[Sequence[int]],
  *,
  num_samples: int,
  seed: int,
) -> list[Reading]:
  """Windows from random places of documents, a reading for each length; see `windows.drawn`.

  A unit is a window.

  Args:
    text: to read.
    window_lengths, stride: tokens.
    lengths_of: for each of them, lengths that rows are padded to.
    num_samples, seed: of the draw.

  Raises:
    DataError: no document is so long.
  """
  bounds = _texts(text)
  sizes = [stop - begin for begin, stop in bounds]
  chosen = windows.drawn(sizes, window_lengths, stride, num_samples=num_samples, seed=seed)
  longest = max(window_lengths)
  if not chosen[longest]:
    raise errors.DataError(
      f"no document of {text.name} has the {longest + 1} tokens of a window of {longest} and "
      f"what it predicts; the longest has {max(sizes)}. Take shorter --lengths."
    )
  found = []
  for window, padded in zip(window_lengths, lengths_of, strict=True):
    spans = [
      windows.Span(*(bounds[document][0] + place for place in span))
      for document, span in chosen[window]
    ]
    rows = _Windows(text, spans, padded, is_open_scored=True)
    found.append(Reading(rows, rows.lengths_R, np.arange(len(spans)), 1, text.bytes_per_id))
  return found


def _texts(text: held_out.Text) -> list[tuple[int, int]]:
  """Where the text of each document begins, with the token that opens it, and where it ends.

  Where documents do not open with a mark, that is the token before, the mark that closes the
  document before it.
  """
  borders = text.packed.borders().tolist()
  ahead = int(text.tokenizer.bos_id is None)
  return [(a - ahead, b - 1) for a, b in itertools.pairwise(borders)]


def _measures(text: held_out.Text, chosen_U, bounds):
  """Bytes and words of chosen documents; None each where ids do not tell."""
  if text.num_bytes_M is not None:
    return text.num_bytes_M[chosen_U], text.num_words_M[chosen_U]
  # Ids of other tokenizers do not give the same text again.
  if text.tokenizer.bytes_per_id() is None:
    return None, None
  spelled = [
    text.tokenizer.decode(text.packed.read(bounds[m][0] + 1, bounds[m][1])[0]) for m in chosen_U
  ]
  num_words = [held_out.count_words(document) for document in spelled]
  return np.array([len(x.encode("utf-8")) for x in spelled]), np.array(num_words)


class _First:
  """The first rows of a sequence."""

  def __init__(self, rows: Sequence[data.Batch], count: int):
    self._rows, self._count = rows, count

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, row: int) -> data.Batch:
    if not 0 <= row < self._count:
      raise IndexError(row)
    return self._rows[row]
