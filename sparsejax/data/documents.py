"""Documents of text files, JSON lines, Parquet tables and folders of source files."""

import codecs
from collections.abc import Iterator
import dataclasses
import gzip
import io
import json
import os
import pathlib

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
  if path.endswith(".jsonl") and size > SPLIT_BYTES:
    starts = range(0, size, SPLIT_BYTES)
    return [
      Part(path, at, min(at + SPLIT_BYTES, size), min(SPLIT_BYTES, size - at)) for at in starts
    ]
  if path.endswith(".parquet"):
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
      field, naming the file and line.
  """
  if part.path.endswith(".parquet"):
    yield from _read_parquet(part, options)
  elif part.path.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
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
  return path.name.lower().endswith(extensions or (*TABLES, *TEXT))


def _known_kinds() -> str:
  return ", ".join((*TABLES, *TEXT))


def _read_text(part: Part, options: Options, counts: Counts) -> Iterator[Iterator[str]]:
  """One file as one document, or as many as its separators make of it."""
  if options.separator:
    for text in _split_stream(_decode_file(part.path, options, counts), options.separator):
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


def _split_stream(pieces: Iterator[str], separator: str) -> Iterator[str]:
  rest = ""
  try:
    for piece in pieces:
      *complete, rest = (rest + piece).split(separator)
      yield from complete
  except _BadUtf8Error:
    return
  if rest.strip():
    yield rest


def _decode_file(path: str, options: Options, counts: Counts) -> Iterator[str]:
  decoder = codecs.getincrementaldecoder("utf-8")("strict")
  num_lines = 1
  was_replaced = False
  with open(path, "rb") as file:
    while True:
      data = file.read(READ_BYTES)
      try:
        piece = decoder.decode(data, final=not data)
      except UnicodeDecodeError as error:
        if options.on_bad_utf8 != "replace":
          line = num_lines + error.object[: error.start].count(b"\n")
          _refuse_or_skip(f"{path}:{line}", options, counts)
        if not was_replaced:
          was_replaced = True
          counts.bad_utf8 += 1
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        piece = decoder.decode(error.object, final=not data)
      num_lines += piece.count("\n")
      if piece:
        yield piece
      if not data:
        return


def _refuse_or_skip(where: str, options: Options, counts: Counts) -> None:
  if options.on_bad_utf8 == "fail":
    raise errors.DataError(
      f"{where} is not UTF-8. Convert the file, or pass --on_bad_utf8=skip to leave "
      "such documents out (counted) or =replace to keep them with U+FFFD (counted)."
    )
  counts.bad_utf8 += 1
  raise _BadUtf8Error


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
      if options.on_bad_utf8 == "replace":
        counts.bad_utf8 += 1
        text = _json_text(line.decode("utf-8", errors="replace"), where, options)
        text = text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")
      else:
        try:
          _refuse_or_skip(where, options, counts)
        except _BadUtf8Error:
          continue
    yield _in_pieces(text)


def _json_text(line: str, where: str, options: Options) -> str:
  try:
    record = json.loads(line)
  except ValueError as error:
    raise errors.DataError(f"{where} is not JSON: {error}.") from error
  if not isinstance(record, dict) or not isinstance(record.get(options.text_key), str):
    has = f"it has {', '.join(sorted(record))}" if isinstance(record, dict) else "no object"
    raise errors.DataError(
      f"{where} has no text field {options.text_key!r} ({has}); name it with --text_key."
    )
  return record[options.text_key]


def _lines(part: Part) -> Iterator[tuple[int, bytes]]:
  """The lines that begin inside the part, each with its number (its offset in a range)."""
  if part.stop is None or part.path.endswith((".gz", ".zst")):
    with _open_binary(part.path) as file:
      yield from enumerate(file, start=1)
    return
  with open(part.path, "rb") as file:
    if part.start:
      # A line that begins before the range belongs to the part before this one.
      file.seek(part.start - 1)
      file.readline()
    number = 0
    while file.tell() < part.stop:
      number = number + 1 if part.start == 0 else file.tell()
      yield number, file.readline()


def _open_binary(path: str) -> io.BufferedIOBase:
  if path.endswith(".gz"):
    return gzip.open(path, "rb")
  if path.endswith(".zst"):
    try:
      import zstandard
    except ImportError:
      raise errors.DataError(
        f"{path} needs the package zstandard; install sparsejax[data]."
      ) from None
    return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(open(path, "rb")))
  return open(path, "rb")


def _parquet(path: str):
  try:
    from pyarrow import parquet
  except ImportError:
    raise errors.DataError(
      f"{path} needs the package pyarrow; install sparsejax[data]."
    ) from None
  try:
    return parquet.ParquetFile(path)
  except Exception as error:  # pyarrow raises a family of its own
    raise errors.DataError(f"{path} cannot be read as Parquet: {error}") from error


def _read_parquet(part: Part, options: Options) -> Iterator[Iterator[str]]:
  table = _parquet(part.path)
  if options.text_key not in table.schema_arrow.names:
    raise errors.DataError(
      f"{part.path} has no column {options.text_key!r} (it has "
      f"{', '.join(table.schema_arrow.names)}); name it with --text_key."
    )
  kind = table.schema_arrow.field(options.text_key).type
  if str(kind) not in ("string", "large_string", "string_view"):
    raise errors.DataError(
      f"column {options.text_key!r} of {part.path} holds {kind}, not text; name another "
      "with --text_key."
    )
  groups = range(part.start, table.num_row_groups if part.stop is None else part.stop)
  for batch in table.iter_batches(row_groups=list(groups), columns=[options.text_key]):
    for value in batch.column(0):
      yield _in_pieces(value.as_py() or "")


def _in_pieces(text: str) -> Iterator[str]:
  for start in range(0, len(text), READ_BYTES):
    yield text[start : start + READ_BYTES]
