"""Shards of token ids on disk: ArrayRecord files, their index, and the manifest over them.

A prepared directory holds, for each split, shards `SPLIT-00000.array_record` whose records
are little-endian token ids (uint16 or uint32), beside each an index
`SPLIT-00000.index.npy` with one row `(tokens, document)` per record, and `manifest.json`.
A document is one record, or several in a row when it is long.
"""

import dataclasses
import hashlib
import json
import os
import pathlib

from array_record.python import array_record_data_source, array_record_module
import numpy as np

from sparsejax import errors
from sparsejax.data import tokenizers

SCHEMA = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
# Longer documents take several records, so that reading a row stays cheap.
MAX_RECORD_TOKENS = 16_384


@dataclasses.dataclass(frozen=True)
class Shard:
  """One file of token ids.

  Attributes:
    file: name within the prepared directory.
    records, documents, tokens: what it holds.
    text_bytes: UTF-8 bytes of the text those tokens spell.
    file_bytes: size of the file.
    sha256: of the file and of its index.
  """

  file: str
  records: int
  documents: int
  tokens: int
  text_bytes: int
  file_bytes: int
  sha256: str
  index_sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a prepared directory holds.

  Attributes:
    tokenizer: its `kind` (byte or json), `fingerprint`, `vocab_size`, and the names `bos`
      and `eos` of the tokens around a document.
    dtype: of the token ids.
    splits: shards of each split.
    counts: documents read, empty, not UTF-8, and bytes of text.
    options: how it was made, for the record.
  """

  tokenizer: dict
  dtype: str
  splits: dict[str, tuple[Shard, ...]]
  counts: dict[str, int]
  options: dict

  @property
  def fingerprint(self) -> str:
    """Equal exactly for equal token ids in equal order."""
    parts = [self.tokenizer["fingerprint"], self.dtype]
    for split in sorted(self.splits):
      parts += [split, *(shard.sha256 for shard in self.splits[split])]
      parts += [shard.index_sha256 for shard in self.splits[split]]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

  def num_tokens(self, split: str) -> int:
    return sum(shard.tokens for shard in self.splits[split])

  def save(self, directory: pathlib.Path) -> None:
    """Writes `manifest.json` in one step: it is whole or not there."""
    content = dict(schema=SCHEMA, fingerprint=self.fingerprint, **dataclasses.asdict(self))
    write_atomically(directory / MANIFEST, json.dumps(content, indent=2) + "\n")


class ShardWriter:
  """Writes the documents of one shard; nothing has its final name before `close`."""

  def __init__(self, directory: pathlib.Path, file: str, dtype: np.dtype):
    self._path = directory / file
    self._unfinished = self._path.with_suffix(".tmp")
    self._dtype = dtype
    self._writer = None
    self._index: list[tuple[int, int]] = []
    self._documents = 0
    self._text_bytes = 0
    self._pending: list[int] = []

  def extend(self, ids: list[int]) -> None:
    """Adds tokens to the document under way."""
    self._pending += ids
    while len(self._pending) >= MAX_RECORD_TOKENS:
      self._write(self._pending[:MAX_RECORD_TOKENS])
      self._pending = self._pending[MAX_RECORD_TOKENS:]

  def end_document(self, text_bytes: int) -> None:
    if self._pending:
      self._write(self._pending)
      self._pending = []
    self._documents += 1
    self._text_bytes += text_bytes

  def close(self) -> Shard | None:
    """Finishes the files; returns None, leaving nothing, if there was no document."""
    if self._writer is None:
      return None
    self._writer.close()
    index_path = index_of(self._path)
    np.save(index_path, np.array(self._index, np.int64))
    os.replace(self._unfinished, self._path)
    return Shard(
      file=self._path.name,
      records=len(self._index),
      documents=self._documents,
      tokens=sum(tokens for tokens, _ in self._index),
      text_bytes=self._text_bytes,
      file_bytes=self._path.stat().st_size,
      sha256=sha256_of(self._path),
      index_sha256=sha256_of(index_path),
    )

  def _write(self, ids: list[int]) -> None:
    if self._writer is None:
      # One record a group: rows are read at random.
      self._writer = array_record_module.ArrayRecordWriter(
        str(self._unfinished), "group_size:1,zstd:1"
      )
    self._writer.write(np.array(ids, self._dtype).tobytes())
    self._index.append((len(ids), self._documents))


class Records:
  """The records of one split, readable at random from any process.

  Attributes:
    tokens_R: number of tokens of each record.
    document_R: document each record belongs to, counted over the whole split.
  """

  def __init__(self, directory: pathlib.Path, manifest: Manifest, split: str):
    self._directory = directory
    self._shards = manifest.splits[split]
    self._dtype = np.dtype(manifest.dtype)
    self._source = array_record_data_source.ArrayRecordDataSource(
      # The range spares opening every file to count its records.
      [f"{directory / shard.file}[0:{shard.records}]" for shard in self._shards]
    )
    indices = [_load_index(directory, shard) for shard in self._shards]
    first_document = np.cumsum([0, *(shard.documents for shard in self._shards)])
    self.tokens_R = np.concatenate([index[:, 0] for index in indices])
    self.document_R = np.concatenate(
      [index[:, 1] + first for index, first in zip(indices, first_document, strict=False)]
    )

  def __len__(self) -> int:
    return len(self.tokens_R)

  def __getitem__(self, record: int) -> np.ndarray:
    """Token ids of one record, int32.

    Raises:
      DataError: the record is damaged, naming the file and the record.
    """
    try:
      data = self._source[record]
    except Exception as error:  # the reader raises whatever its C++ side says
      raise self._damaged(record, str(error)) from error
    if len(data) != self.tokens_R[record] * self._dtype.itemsize:
      raise self._damaged(record, f"{len(data)} bytes for {self.tokens_R[record]} tokens")
    return np.frombuffer(data, self._dtype).astype(np.int32)

  def _damaged(self, record: int, why: str) -> errors.DataError:
    for shard in self._shards:
      if record < shard.records:
        return errors.DataError(
          f"record {record} of {self._directory / shard.file} is damaged ({why.strip()}); "
          "prepare the directory again."
        )
      record -= shard.records
    raise IndexError(record)


def load(directory: str | pathlib.Path) -> Manifest:
  """Reads a manifest and checks that every file it names is there and has its size.

  Raises:
    DataError: not a prepared directory, or files missing, truncated or outside of it.
  """
  directory = pathlib.Path(directory)
  path = directory / MANIFEST
  if not path.is_file():
    made = "is not a prepared directory" if directory.is_dir() else "does not exist"
    raise errors.DataError(
      f"{directory} {made}; make one with: python -m sparsejax.data.prepare TEXT... "
      f"--out={directory}"
    )
  try:
    content = json.loads(path.read_text())
    if content["schema"] != SCHEMA:
      raise errors.DataError(
        f"{path} has schema {content['schema']}, this version reads {SCHEMA}; prepare again."
      )
    splits = {
      split: tuple(Shard(**shard) for shard in content["splits"][split]) for split in SPLITS
    }
    manifest = Manifest(
      tokenizer=dict(content["tokenizer"]),
      dtype=content["dtype"],
      splits=splits,
      counts=dict(content["counts"]),
      options=dict(content["options"]),
    )
    stated = content["fingerprint"]
    is_sound = manifest.dtype in ("uint16", "uint32") and stated == manifest.fingerprint
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise errors.DataError(f"{path} is damaged ({error}); prepare again.") from error
  if not is_sound:
    raise errors.DataError(f"{path} was changed after it was written; prepare again.")
  for split in SPLITS:
    for shard in splits[split]:
      _check_files(directory, shard)
  return manifest


def load_tokenizer(directory: str | pathlib.Path, manifest: Manifest) -> tokenizers.Tokenizer:
  """The tokenizer whose ids a prepared directory holds.

  Raises:
    DataError: its file is missing, or is another one than the manifest says.
  """
  directory = pathlib.Path(directory)
  if manifest.tokenizer["kind"] == tokenizers.BYTE:
    tokenizer = tokenizers.ByteTokenizer()
  else:
    path = directory / "tokenizer.json"
    if not path.is_file():
      raise errors.DataError(f"{path} is missing; prepare the directory again.")
    tokenizer = tokenizers.load(
      str(path), bos=manifest.tokenizer["bos"], eos=manifest.tokenizer["eos"]
    )
  if tokenizer.fingerprint != manifest.tokenizer["fingerprint"]:
    raise errors.DataError(
      f"the tokenizer in {directory} is not the one its shards were made with "
      f"({tokenizer.fingerprint} against {manifest.tokenizer['fingerprint']})."
    )
  return tokenizer


def verify(directory: str | pathlib.Path) -> int:
  """Reads every byte of every shard again; returns the number of files.

  Raises:
    DataError: a file differs from its recorded hash.
  """
  directory = pathlib.Path(directory)
  manifest = load(directory)
  shards = [shard for split in SPLITS for shard in manifest.splits[split]]
  for shard in shards:
    path = directory / shard.file
    for file, expected in ((path, shard.sha256), (index_of(path), shard.index_sha256)):
      if sha256_of(file) != expected:
        raise errors.DataError(f"{file} differs from its recorded hash; prepare again.")
  return 2 * len(shards)


def index_of(path: pathlib.Path) -> pathlib.Path:
  return path.with_suffix(".index.npy")


def sha256_of(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: pathlib.Path, text: str) -> None:
  unfinished = path.with_name(path.name + ".tmp")
  unfinished.write_text(text)
  os.replace(unfinished, path)


def _check_files(directory: pathlib.Path, shard: Shard) -> None:
  path = directory / shard.file
  if path.resolve().parent != directory.resolve():
    raise errors.DataError(f"{directory / MANIFEST} names {shard.file!r} outside of it.")
  for file in (path, index_of(path)):
    if not file.is_file():
      raise errors.DataError(f"{file} is missing; prepare the directory again.")
  if path.stat().st_size != shard.file_bytes:
    raise errors.DataError(
      f"{path} has {path.stat().st_size} bytes, its manifest says {shard.file_bytes}: it was "
      "truncated or changed; prepare the directory again."
    )


def _load_index(directory: pathlib.Path, shard: Shard) -> np.ndarray:
  path = index_of(directory / shard.file)
  try:
    index = np.load(path, allow_pickle=False)
    is_sound = index.shape == (shard.records, 2) and index[:, 0].sum() == shard.tokens
  except (ValueError, OSError, EOFError) as error:
    raise errors.DataError(f"{path} is damaged ({error}); prepare again.") from error
  if not is_sound:
    raise errors.DataError(f"{path} does not fit its shard; prepare again.")
  return index
