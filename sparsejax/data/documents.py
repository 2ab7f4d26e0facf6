"""Documents of text files, JSON lines, Parquet tables and folders of source files."""

import codecs
from collections.abc import Iterator
import contextlib
import dataclasses
import gzip
import io
import json
import os
import pathlib
import zlib

from sparsejax import errors

TABLES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
# fmt: off
TEXT = (
  ".txt", ".md", ".rst", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh",
  ".java", ".js", ".jsx", ".ts", ".tsx", ".go", ".rs", ".rb", ".php", ".cs", ".swift", ".kt",
  ".scala", ".lua", ".r", ".jl", ".hs", ".ml", ".ex", ".erl", ".pl", ".sh", ".sql", ".html",
  ".css", ".tex", ".toml", ".yaml", ".yml", ".json", ".xml", ".cfg", ".ini",
)
# fmt: on

ON_BAD_UTF8 = ("fail", "skip", "replace")

# A text file is read, split and tokenized in pieces of this many bytes.
READ_BYTES = 2**20
# A plain .jsonl file is divided among processes at this size.
SPLIT_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Part:
  """A piece of an input file that one process reads: all of it, or a range.

  Attributes:
    path: the file.
    start, stop: a range of bytes (.jsonl) or of row groups (.parquet); stop=None is the
      whole file.
    num_bytes: size on disk, to balance work and to show progress.
  """

  path: str
  start: int = 0
  stop: int | None = None
  num_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Options:
  """How files become documents.

  Attributes:
    text_key: field of a JSON line, or column of a Parquet table, that holds the text.
    separator: string between the documents of one text file; "" makes the file one document.
    on_bad_utf8: what to do with a document that is not UTF-8: `fail`, `skip` it (counted),
      or `replace` the broken bytes by U+FFFD (counted).
  """

  text_key: str = "text"
  separator: str = ""
  on_bad_utf8: str = "fail"


@dataclasses.dataclass
class Counts:
  """What happened to the documents of an input."""

  documents: int = 0
  empty: int = 0
  bad_utf8: int = 0
  text_bytes: int = 0


class _BadUtf8Error(Exception):
  """A document that is not UTF-8 and is to be skipped."""


def find_files(inputs: list[str], extensions: tuple[str, ...] = ()) -> list[str]:
  """The files meant by paths of files and folders, sorted, each once.

  Hidden files and folders are left out, and so is what no reader here knows.

  Args:
    inputs: files or folders, searched to any depth.
    extensions: endings to take from folders, e.g. (".py",); () takes every known one.

  Raises:
    DataError: an input is missing, unknown or named twice, or nothing is found.
  """
  found: dict[str, str] = {}
  for name in inputs:
    path = pathlib.Path(name)
    if path.is_file():
      if not _is_known(path, ()):
        raise errors.DataError(f"{name}: unknown kind of file; there are {_known_kinds()}.")
      files = [path]
    elif path.is_dir():
      files = list(_walk(path, extensions))
    else:
      raise errors.DataError(f"input {name!r} does not exist.")
    for file in files:
      real = os.path.realpath(file)
      if real in found and path.is_file():
        raise errors.DataError(
          f"{file} and {found[real]} are the same file; its text would count twice."
        )
      found.setdefault(real, str(file))
  if not found:
    wanted = ", ".join(extensions) or _known_kinds()
    raise errors.DataError(f"no files in {', '.join(inputs)}; looked for {wanted}.")
  empty = all(os.path.getsize(real) == 0 for real in found)
  if empty:
    raise errors.DataError(f"every file of {', '.join(inputs)} is empty.")
  return sorted(found.values())


def split_file(path: str) -> list[Part]:
  """The parts of a file that can be read independently."""
  size = os.path.getsize(path)
  if _ends(path, ".jsonl") and size > SPLIT_BYTES:
    starts = range(0, size, SPLIT_BYTES)
    return [
      Part(path, at, min(at + SPLIT_BYTES, size), min(SPLIT_BYTES, size - at)) for at in starts
    ]
  if _ends(path, ".parquet"):
    groups = _parquet(path).num_row_groups
    share = size // max(1, groups)
    return [Part(path, at, at + 1, share) for at in range(groups)]
  return [Part(path, num_bytes=size)]


def read(part: Part, options: Options, counts: Counts) -> Iterator[Iterator[str]]:
  """Yields each document as an iterator over pieces of its text, counting as it goes.

  Pieces keep memory bounded however long a document is. Empty documents are left to the
  caller to notice, since only the pieces tell.

  Raises:
    DataError: text that is not UTF-8 under `fail`, or a line that is not JSON with the text
      field, naming the file and line; a file that is damaged or ends too early.
  """
  if _ends(part.path, ".parquet"):
    yield from _read_parquet(part, options, counts)
  elif _ends(part.path, ".jsonl", ".jsonl.gz", ".jsonl.zst"):
    yield from _read_json_lines(part, options, counts)
  else:
    yield from _read_text(part, options, counts)


def _walk(folder: pathlib.Path, extensions: tuple[str, ...]) -> Iterator[pathlib.Path]:
  for where, folders, files in os.walk(folder):
    folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
    for file in sorted(files):
      path = pathlib.Path(where, file)
      if not file.startswith(".") and _is_known(path, extensions) and path.is_file():
        yield path


def _is_known(path: pathlib.Path, extensions: tuple[str, ...]) -> bool:
  return _ends(path.name, *(extensions or (*TABLES, *TEXT)))


def _ends(path: str, *extensions: str) -> bool:
  return path.lower().endswith(extensions)


def _known_kinds() -> str:
  return ", ".join((*TABLES, *TEXT))


def _read_text(part: Part, options: Options, counts: Counts) -> Iterator[Iterator[str]]:
  """One file as one document, or as many as its separators make of it."""
  if options.separator:
    for text in _separate(part.path, options, counts):
      yield iter([text])
    return
  try:
    # Whether the file is UTF-8 must be known before its first piece is used.
    if options.on_bad_utf8 == "skip":
      for _ in _decode_file(part.path, options, counts):
        pass
  except _BadUtf8Error:
    return
  yield _decode_file(part.path, options, counts)


def _separate(path: str, options: Options, counts: Counts) -> Iterator[str]:
  """The documents of a text file, each decoded by itself: a broken one spares the others."""
  separator = options.separator.encode("utf-8")
  line = 1
  for data in _split(path, separator):
    try:
      text = data.decode("utf-8")
    except UnicodeDecodeError as error:
      bad_line = line + data[: error.start].count(b"\n")
      text = _mend(data, f"{path}:{bad_line}", options, counts)
    line += data.count(b"\n") + separator.count(b"\n")
    if text is not None:
      yield text


def _split(path: str, separator: bytes) -> Iterator[bytes]:
  rest = b""
  with _reading(path), open(path, "rb") as file:
    while data := file.read(READ_BYTES):
      *complete, rest = (rest + data).split(separator)
      yield from complete
  if rest.strip():
    yield rest


def _decode_file(path: str, options: Options, counts: Counts) -> Iterator[str]:
  decoder = codecs.getincrementaldecoder("utf-8")("strict")
  num_lines = 1
  with _reading(path), open(path, "rb") as file:
    while True:
      data = file.read(READ_BYTES)
      try:
        piece = decoder.decode(data, final=not data)
      except UnicodeDecodeError as error:
        line = num_lines + error.object[: error.start].count(b"\n")
        if _mend(error.object, f"{path}:{line}", options, counts) is None:
          raise _BadUtf8Error from None
        # From here on nothing fails, so the file counts once.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        piece = decoder.decode(error.object, final=not data)
      num_lines += piece.count("\n")
      if piece:
        yield piece
      if not data:
        return


def _mend(data: bytes, where: str, options: Options, counts: Counts) -> str | None:
  """What becomes of a document that is not UTF-8: None to skip it, or text with U+FFFD."""
  if options.on_bad_utf8 == "fail":
    raise errors.DataError(
      f"{where} is not UTF-8. Convert the file, or pass --on_bad_utf8=skip to leave "
      "such documents out (counted) or =replace to keep them with U+FFFD (counted)."
    )
  counts.bad_utf8 += 1
  return data.decode("utf-8", errors="replace") if options.on_bad_utf8 == "replace" else None


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
  try:
    yield
  except (OSError, EOFError, zlib.error) as error:
    raise errors.DataError(f"{path} cannot be read: {error}.") from error


def _read_json_lines(part: Part, options: Options, counts: Counts) -> Iterator[Iterator[str]]:
  for number, line in _lines(part):
    if not line.strip():
      continue
    where = f"{part.path}:{number}" if part.start == 0 else f"{part.path} at byte {number}"
    try:
      # UTF-8 may be broken in the line itself, or by an escaped half of a surrogate pair.
      text = _json_text(line.decode("utf-8"), where, options)
      text.encode("utf-8")
    except UnicodeError:
      mended = _mend(line, where, options, counts)
      if mended is None:
        continue
      text = _json_text(mended, where, options)
      text = text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")
    yield _in_pieces(text)


def _json_text(line: str, where: str, options: Options) -> str:
  try:
    record = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise errors.DataError(f"{where} is not JSON: {error}.") from error
  if not isinstance(record, dict) or not isinstance(record.get(options.text_key), str):
    if not isinstance(record, dict):
      has = "no object"
    elif options.text_key in record:
      has = f"it is {json.dumps(record[options.text_key])[:40]}"
    else:
      has = f"it has {', '.join(sorted(record))}"
    raise errors.DataError(
      f"{where} has no text field {options.text_key!r} ({has}); name it with --text_key."
    )
  return record[options.text_key]


def _lines(part: Part) -> Iterator[tuple[int, bytes]]:
  """The lines that begin inside the part, each with its number (its offset in a range)."""
  if part.stop is None:
    with _reading(part.path), _open_binary(part.path) as file:
      yield from enumerate(file, start=1)
    return
  with _reading(part.path), open(part.path, "rb") as file:
    if part.start:
      # A line that begins before the range belongs to the part before this one.
      file.seek(part.start - 1)
      file.readline()
    number = 0
    while file.tell() < part.stop:
      number = number + 1 if part.start == 0 else file.tell()
      yield number, file.readline()


def _open_binary(path: str) -> io.BufferedIOBase:
  if _ends(path, ".gz"):
    return gzip.open(path, "rb")
  if _ends(path, ".zst"):
    return io.BufferedReader(_ZstdFile(path), READ_BYTES)
  return open(path, "rb")


class _ZstdFile(io.RawIOBase):
  """The content of a .zst file; unlike zstandard's own reader it notices a missing end."""

  def __init__(self, path: str):
    try:
      import zstandard
    except ImportError:
      raise errors.DataError(
        f"{path} needs the package zstandard; {errors.install('data')}."
      ) from None
    self._zstandard = zstandard
    self._file = open(path, "rb")
    self._frame = None
    self._compressed = b""
    self._content = b""

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    while not self._content:
      # Little at a time, because it may unpack to very much.
      self._compressed = self._compressed or self._file.read(2**14)
      if not self._compressed:
        if self._frame is not None:
          raise EOFError("it ends in the middle of a Zstandard frame")
        return 0
      self._content = self._decompress()
    taken = self._content[: len(buffer)]
    buffer[: len(taken)] = taken
    self._content = self._content[len(taken) :]
    return len(taken)

  def _decompress(self) -> bytes:
    self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
    try:
      content = self._frame.decompress(self._compressed)
    except self._zstandard.ZstdError as error:
      raise OSError(str(error)) from error
    self._compressed = b""
    # One file may be several frames, end to end.
    if self._frame.eof:
      self._compressed, self._frame = self._frame.unused_data, None
    return content

  def close(self) -> None:
    if not self.closed:
      self._file.close()
    super().close()


def _parquet(path: str):
  try:
    from pyarrow import parquet
  except ImportError:
    raise errors.DataError(
      f"{path} needs the package pyarrow; {errors.install('data')}."
    ) from None
  try:
    return parquet.ParquetFile(path)
  except Exception as error:  # pyarrow raises a family of its own
    raise errors.DataError(f"{path} cannot be read as Parquet: {error}") from error


def _read_parquet(part: Part, options: Options, counts: Counts) -> Iterator[Iterator[str]]:
  table = _parquet(part.path)
  names = table.schema_arrow.names
  if names.count(options.text_key) != 1:
    raise errors.DataError(
      f"{part.path} has {names.count(options.text_key) or 'no'} columns {options.text_key!r} "
      f"(it has {', '.join(names)}); name it with --text_key."
    )
  kind = table.schema_arrow.field(options.text_key).type
  if str(kind) not in ("string", "large_string", "string_view"):
    raise errors.DataError(
      f"column {options.text_key!r} of {part.path} holds {kind}, not text; name another "
      "with --text_key."
    )
  groups = range(part.start, table.num_row_groups if part.stop is None else part.stop)
  first_row = sum(table.metadata.row_group(group).num_rows for group in range(part.start))
  for row, data in enumerate(_rows(part.path, table, groups, options.text_key), first_row):
    try:
      text = data.decode("utf-8")
    except UnicodeDecodeError:
      text = _mend(data, f"row {row} of {part.path}", options, counts)
    if text is not None:
      yield _in_pieces(text)


def _rows(path: str, table, groups: range, column: str) -> Iterator[bytes]:
  """The bytes of a column, which Parquet files do not always keep to UTF-8; null is empty."""
  try:
    for batch in table.iter_batches(row_groups=list(groups), columns=[column]):
      for value in batch.column(0):
        buffer = value.as_buffer()
        yield b"" if buffer is None else buffer.to_pybytes()
  except Exception as error:  # pyarrow raises a family of its own
    raise errors.DataError(f"{path} cannot be read as Parquet: {error}") from error


def _in_pieces(text: str) -> Iterator[str]:
  for start in range(0, len(text), READ_BYTES):
    yield text[start : start + READ_BYTES]
