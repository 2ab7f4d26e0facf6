"""Texts that a model is scored on: the validation splits of its data, or any local corpus.

Letters: M documents, R records.
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import hashlib
import pathlib
import re

import numpy as np

from sparsejax import errors
from sparsejax.data import corpus as corpora
from sparsejax.data import documents, prepare, rows, shards, tokenizers
from sparsejax.evaluation.protocols import wikitext

# Of a longer document, so many characters are tokenized at once.
_PIECE_CHARACTERS = 2**22


@dataclasses.dataclass(frozen=True)
class Text:
  """Documents as token ids, end to end.

  Attributes:
    name: of the source.
    packed: the documents with the marks that open and close them, as training reads them.
    tokenizer: of the ids.
    bytes_per_id: UTF-8 bytes that each id stands for.
    fingerprint: equal for equal documents.
    num_bytes_M, num_words_M: UTF-8 bytes and words of each document, as they were before they
      were tokenized; None where only ids are known.
  """

  name: str
  packed: rows.PackedRows
  tokenizer: tokenizers.Tokenizer
  bytes_per_id: np.ndarray
  fingerprint: str
  num_bytes_M: np.ndarray | None = None
  num_words_M: np.ndarray | None = None

  @property
  def prefix_id(self) -> int:
    """Id that opens a text: `bos`, or `eos` where there is none."""
    bos = self.tokenizer.bos_id
    return self.tokenizer.eos_id if bos is None else bos


class Held:
  """Documents in memory, as `shards.Records` has them on disk: a record each."""

  def __init__(self, ids_M: Sequence[np.ndarray]):
    self._ids_M = ids_M
    self.tokens_R = np.array([len(ids) for ids in ids_M], np.int64)
    self.document_R = np.arange(len(ids_M))

  def __len__(self) -> int:
    return len(self._ids_M)

  def __getitem__(self, record: int) -> np.ndarray:
    return self._ids_M[record]


def check_path(path: str) -> None:
  """Checks that a corpus is there, before anything is loaded.

  Raises:
    DataError: it is not, or of an unknown kind, or empty.
  """
  if not _is_prepared(path):
    documents.find_files([path])


def count_words(text: str) -> int:
  r"""Pieces between white space, `re.split(r"\s+", text)`, as lm-evaluation-harness counts.

  White space at an end has an empty piece beyond it, which counts as well.
  """
  return len(re.split(r"\s+", text))


def of_source(source: corpora.Source, sequence_length: int, ignore_first_tokens: bool) -> Text:
  """The validation split of a source of text."""
  packed = pack(source.validation.records, sequence_length, ignore_first_tokens)
  return Text(source.name, packed, source.tokenizer, source.bytes_per_id, source.fingerprint)


def of_path(
  path: str,
  tokenizer: tokenizers.Tokenizer,
  *,
  sequence_length: int,
  ignore_first_tokens: bool,
  reading: documents.Options,
  by_pages: bool = False,
  most_documents: int | None = None,
  most_tokens: int | None = None,
) -> Text:
  """Reads a corpus: a file or a folder of text, or a prepared directory.

  Of a prepared directory the validation split is taken, or the other where it has none.

  Args:
    path: of the corpus; see `data.documents` for what is read.
    tokenizer: the model's.
    sequence_length: tokens of a packed row.
    ignore_first_tokens: whether targets that open a document weigh 0 in packed rows.
    reading: how files become documents.
    by_pages: whether to take the text as WikiText's, mended and cut into pages.
    most_documents, most_tokens: after which no more text is read.

  Raises:
    DataError: nothing there, nothing in it, or what cannot be read or has another tokenizer.
  """
  if _is_prepared(path):
    if by_pages:
      raise errors.DataError(
        f"{path} holds token ids, and --protocol=wikitext counts words of pages; name the text."
      )
    return _of_shards(path, tokenizer, sequence_length, ignore_first_tokens)
  texts = _read_pages(path, reading) if by_pages else _read(path, reading)
  ids_M, num_bytes_M, num_words_M, num_tokens = [], [], [], 0
  # Of what was read, which need not be all of the text.
  digest = hashlib.sha256(tokenizer.fingerprint.encode())
  for text in texts:
    if not text.strip():
      continue
    ids = tokenize(wikitext.mend(text) if by_pages else text, tokenizer)
    ids_M.append(ids)
    num_bytes_M.append(len(text.encode("utf-8")))
    num_words_M.append(count_words(text))
    num_tokens += len(ids)
    digest.update(text.encode("utf-8") + b"\0")
    if len(ids_M) == most_documents or (most_tokens is not None and num_tokens >= most_tokens):
      break
  if not ids_M:
    raise errors.DataError(
      f"--corpus={path} has no text, only empty documents; name one that has some."
    )
  bytes_per_id = tokenizer.bytes_per_id()
  if bytes_per_id is None:
    bytes_per_id = np.full(tokenizer.vocab_size, sum(num_bytes_M) / num_tokens)
  return Text(
    name=path,
    packed=pack(Held(ids_M), sequence_length, ignore_first_tokens),
    tokenizer=tokenizer,
    bytes_per_id=bytes_per_id,
    fingerprint=digest.hexdigest()[:16],
    num_bytes_M=np.array(num_bytes_M),
    num_words_M=np.array(num_words_M),
  )


def tokenize(text: str, tokenizer: tokenizers.Tokenizer) -> np.ndarray:
  """Ids of a document with its marks, int32."""
  ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  for piece in prepare.at_line_ends([text], _PIECE_CHARACTERS):
    ids += tokenizer.encode(piece)
  return np.array([*ids, tokenizer.eos_id], np.int32)


def _read(path: str, reading: documents.Options) -> Iterator[str]:
  counts = documents.Counts()
  for file in documents.find_files([path]):
    for part in documents.split_file(file):
      for pieces in documents.read(part, reading, counts):
        yield "".join(pieces)


def _read_pages(path: str, reading: documents.Options) -> Iterable[str]:
  files = documents.find_files([path])
  for file in files:
    is_table = file.lower().endswith(documents.TABLES)
    yield from wikitext.pages(_read(file, reading), is_table=is_table)


def _is_prepared(path: str) -> bool:
  directory = pathlib.Path(path)
  return (directory / shards.MANIFEST).is_file() and any(directory.glob("*.array_record"))


def _of_shards(path, tokenizer, sequence_length: int, ignore_first_tokens: bool) -> Text:
  manifest = shards.load(path)
  if manifest.tokenizer["fingerprint"] != tokenizer.fingerprint:
    raise errors.DataError(
      f"--corpus={path} holds ids of tokenizer {manifest.tokenizer['fingerprint']}, and the "
      f"checkpoint was trained with {tokenizer.fingerprint}; prepare it with that, or name the "
      "text itself."
    )
  split = "validation" if manifest.splits["validation"] else "train"
  records = shards.Records(pathlib.Path(path), manifest, split)
  packed = pack(records, sequence_length, ignore_first_tokens)
  return Text(
    name=f"{path} ({split})",
    packed=packed,
    tokenizer=tokenizer,
    bytes_per_id=corpora.bytes_per_id(tokenizer, manifest),
    fingerprint=f"{manifest.fingerprint} {split}",
  )


def pack(records, sequence_length: int, ignore_first_tokens: bool) -> rows.PackedRows:
  """Documents in rows, in the order they have."""
  return rows.PackedRows(
    records,
    sequence_length=sequence_length,
    seed=None,
    ignore_first_tokens=ignore_first_tokens,
  )
