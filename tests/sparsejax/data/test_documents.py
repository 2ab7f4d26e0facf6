"""Every kind of file gives the documents that were put into it, or says why it cannot."""

import gzip
import json
import sys

import hypothesis
from hypothesis import strategies
import pyarrow as pa
from pyarrow import parquet
import pytest
import zstandard

from sparsejax import errors
from sparsejax.data import documents

TEXTS = ["first\nwith two lines", "", " \n", "für Ünïcode 漢字 🙂", 'quotes " and \\', "last"]
# Shows up as an error only in the middle of the second document of three.
BROKEN = [b"good", b"one\nb\xffd", b"fine"]
MENDED = ["good", "one\nb\ufffdd", "fine"]


def read(*paths, **options):
  """The documents of files, and the counts."""
  counts = documents.Counts()
  options = documents.Options(**options)
  parts = [part for path in paths for part in documents.split_file(str(path))]
  read = ["".join(pieces) for part in parts for pieces in documents.read(part, options, counts)]
  return read, counts


def as_lines(texts, key="text"):
  return "".join(json.dumps({"id": 1, key: text}) + "\n" for text in texts).encode()


def write(folder, name, data):
  path = folder / name
  path.write_bytes(data)
  return path


def write_table(path, texts, kind=None, **options):
  table = pa.table(
    {"id": list(range(len(texts))), "text": pa.array(texts, kind or pa.string())}
  )
  parquet.write_table(table, path, **options)
  return path


def write_broken(folder, kind):
  """The documents of BROKEN as a file of some kind, and the options that read them."""
  if kind == "text":
    return write(folder, "a.txt", b"---\n".join(BROKEN)), dict(separator="---\n")
  if kind == "table":
    column = pa.array(BROKEN, pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": column}), folder / "a.parquet", row_group_size=1)
    return folder / "a.parquet", {}
  if kind == "surrogate":
    lines = [b'{"text": "good"}', b'{"text": "one\\nb\\udc00d"}', b'{"text": "fine"}']
  else:
    lines = [b'{"text": "' + text.replace(b"\n", b"\\n") + b'"}' for text in BROKEN]
  return write(folder, "a.jsonl", b"\n".join(lines)), {}


def test_a_text_file_is_one_document(tmp_path):
  for number, text in enumerate(TEXTS):
    path = write(tmp_path, f"{number}.txt", text.encode())
    assert read(path) == ([text], documents.Counts())


def test_a_text_file_comes_in_bounded_pieces_that_keep_characters_whole(tmp_path, monkeypatch):
  monkeypatch.setattr(documents, "READ_BYTES", 5)
  text = "漢字 für 🙂🙂🙂 the end"
  path = write(tmp_path, "a.txt", text.encode())
  options, counts = documents.Options(), documents.Counts()
  [pieces] = documents.read(documents.Part(str(path)), options, counts)
  pieces = list(pieces)
  assert "".join(pieces) == text
  assert max(len(piece.encode()) for piece in pieces) < 2 * 5


@hypothesis.settings(deadline=None)
@hypothesis.given(
  strategies.lists(strategies.text(alphabet="ab#\n漢", max_size=12), min_size=1, max_size=6),
  strategies.integers(1, 9),
)
def test_a_separator_divides_a_text_file(tmp_path_factory, texts, size):
  """Wherever the borders of what is read at once fall."""
  text = "##\n".join(texts)
  path = write(tmp_path_factory.getbasetemp(), "separated.txt", text.encode())
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(documents, "READ_BYTES", size)
    actual, _ = read(path, separator="##\n")
  expected = text.split("##\n")
  assert actual == (expected if expected[-1].strip() else expected[:-1])


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".JSONL.GZ"])
def test_json_lines_are_documents_in_order(tmp_path, ending):
  compress = {".gz": gzip.compress, ".zst": zstandard.compress}
  compress = compress.get("." + ending.lower().split(".")[-1], bytes)
  # Empty lines are no documents; the last line needs no end.
  data = as_lines(TEXTS[:2]) + b"\n  \n" + as_lines(TEXTS[2:]).rstrip()
  path = write(tmp_path, "a" + ending, compress(data))
  assert read(path) == (TEXTS, documents.Counts())
  path = write(tmp_path, "b" + ending, compress(as_lines(TEXTS, key="body")))
  assert read(path, text_key="body")[0] == TEXTS


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_compressed_files_put_end_to_end_are_read_to_the_end(tmp_path, compress):
  many = ["x" * 1000 + str(number) for number in range(1000)]
  data = compress(as_lines(TEXTS)) + compress(as_lines(many)) + compress(as_lines(TEXTS))
  ending = "gz" if compress is gzip.compress else "zst"
  assert read(write(tmp_path, f"a.jsonl.{ending}", data))[0] == [*TEXTS, *many, *TEXTS]


@hypothesis.settings(deadline=None)
@hypothesis.given(
  strategies.lists(strategies.text(max_size=20), min_size=1, max_size=12),
  strategies.integers(1, 60),
)
def test_parts_of_a_json_file_give_each_line_once(tmp_path_factory, texts, size):
  data = as_lines(texts)
  path = write(tmp_path_factory.getbasetemp(), "parts.jsonl", data)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(documents, "SPLIT_BYTES", size)
    parts = documents.split_file(str(path))
    assert len(parts) == max(1, -(-len(data) // size))
    assert sum(part.num_bytes for part in parts) == len(data)
    assert read(path)[0] == texts


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_a_table_gives_its_rows_and_null_is_empty(tmp_path, kind):
  path = write_table(tmp_path / "a.parquet", [*TEXTS, None], kind, row_group_size=2)
  assert read(path) == ([*TEXTS, ""], documents.Counts())


def test_a_table_is_divided_by_row_groups(tmp_path):
  path = write_table(tmp_path / "a.parquet", list("abcde"), row_group_size=2)
  parts = documents.split_file(str(path))
  assert [(part.start, part.stop) for part in parts] == [(0, 1), (1, 2), (2, 3)]
  middle = documents.read(parts[1], documents.Options(), documents.Counts())
  assert ["".join(pieces) for pieces in middle] == ["c", "d"]


def test_a_table_may_be_named_in_capitals(tmp_path):
  assert read(write_table(tmp_path / "A.PARQUET", TEXTS))[0] == TEXTS


@pytest.mark.parametrize("kind", ["text", "lines", "surrogate", "table"])
def test_a_document_that_is_not_utf8_is_skipped_or_mended_and_counted(tmp_path, kind):
  """The documents around it stay, whatever is read at once."""
  path, options = write_broken(tmp_path, kind)
  skipped = read(path, on_bad_utf8="skip", **options)
  assert skipped == ([MENDED[0], MENDED[2]], documents.Counts(bad_utf8=1))
  mended = read(path, on_bad_utf8="replace", **options)
  assert mended == (MENDED, documents.Counts(bad_utf8=1))


@pytest.mark.parametrize(
  ("kind", "where"),
  [
    ("text", r"a\.txt:3"),
    ("lines", r"a\.jsonl:2"),
    ("surrogate", r"a\.jsonl:2"),
    ("table", r"row 1 of .*a\.parquet"),
  ],
)
def test_a_document_that_is_not_utf8_is_refused_with_its_place(tmp_path, kind, where):
  path, options = write_broken(tmp_path, kind)
  message = rf"{where} is not UTF-8.*--on_bad_utf8=skip.*=replace"
  with pytest.raises(errors.DataError, match=message):
    read(path, **options)


@pytest.mark.parametrize("size", [1, 3, 2**20])
def test_a_whole_file_that_is_not_utf8(tmp_path, monkeypatch, size):
  monkeypatch.setattr(documents, "READ_BYTES", size)
  # A character that is cut short, which may fall on the border of what is read at once.
  bad = write(tmp_path, "bad.txt", "ä\nb\n".encode() + b"\xe6\xbcc\xff\n\xc3")
  good = write(tmp_path, "good.txt", b"good")
  with pytest.raises(errors.DataError, match=r"bad\.txt:3 is not UTF-8"):
    read(bad)
  skipped = read(bad, good, on_bad_utf8="skip")
  assert skipped == (["good"], documents.Counts(bad_utf8=1))
  mended = read(bad, good, on_bad_utf8="replace")
  assert mended == (["ä\nb\n\ufffdc\ufffd\n\ufffd", "good"], documents.Counts(bad_utf8=1))


def test_pairs_of_surrogates_are_characters(tmp_path):
  path = write(tmp_path, "a.jsonl", b'{"text": "\\ud83d\\ude42"}')
  assert read(path) == (["🙂"], documents.Counts())


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (b"text", r"a\.jsonl:2 is not JSON: Expecting value"),
    (b"[" * 100_000, r"a\.jsonl:2 is not JSON: "),
    (b'{"text": "\xff"', r"a\.jsonl:2 is not JSON: "),
    (b'["text"]', r"a\.jsonl:2 has no text field 'text' \(no object\)"),
    (b'{"b": "c", "a": "c"}', r"'text' \(it has a, b\); name it with --text_key"),
    (b'{"text": null}', r"no text field 'text' \(it is null\); name it with --text_key"),
  ],
)
def test_a_line_without_text_is_refused(tmp_path, line, message):
  path = write(tmp_path, "a.jsonl", as_lines(["good"]) + line + b"\n")
  with pytest.raises(errors.DataError, match=message):
    read(path, on_bad_utf8="replace")


def test_a_line_in_a_later_part_is_named_by_its_byte(tmp_path, monkeypatch):
  monkeypatch.setattr(documents, "SPLIT_BYTES", 10)
  path = write(tmp_path, "a.jsonl", as_lines(["good"]) + b"bad")
  place = len(as_lines(["good"]))
  with pytest.raises(errors.DataError, match=rf"a\.jsonl at byte {place} is not JSON"):
    read(path)


@pytest.mark.parametrize("keep", [0.5, 0.9])
@pytest.mark.parametrize(
  ("ending", "compress"), [("gz", gzip.compress), ("zst", zstandard.compress)]
)
def test_a_truncated_file_is_refused(tmp_path, ending, compress, keep):
  """Where its end is missing, so is text: that is no file to go on with."""
  data = compress(as_lines(str(number) * 9 for number in range(1000)))
  path = write(tmp_path, f"a.jsonl.{ending}", data[: int(keep * len(data))])
  with pytest.raises(errors.DataError, match=rf"a\.jsonl\.{ending} cannot be read: .* end"):
    read(path)


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_file_of_another_format_is_refused(tmp_path, ending):
  path = write(tmp_path, f"a.jsonl.{ending}", as_lines(TEXTS))
  with pytest.raises(errors.DataError, match=rf"a\.jsonl\.{ending} cannot be read: "):
    read(path)


def test_damaged_content_is_refused(tmp_path):
  data = bytearray(gzip.compress(as_lines(str(number) for number in range(1000))))
  data[100:200] = b"\xff" * 100
  with pytest.raises(errors.DataError, match=r"a\.jsonl\.gz cannot be read: "):
    read(write(tmp_path, "a.jsonl.gz", data))
  table = write_table(tmp_path / "a.parquet", [str(number) * 9 for number in range(1000)])
  data = bytearray(table.read_bytes())
  data[len(data) // 4 : len(data) // 2] = b"\xff" * (len(data) // 2 - len(data) // 4)
  with pytest.raises(errors.DataError, match=r"a\.parquet cannot be read as Parquet: "):
    read(write(tmp_path, "a.parquet", data))


def test_a_file_that_went_away_is_refused(tmp_path):
  for name in ("a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
    part = documents.Part(str(tmp_path / name))
    for options in (documents.Options(), documents.Options(separator="#")):
      with pytest.raises(errors.DataError, match=rf"{name} cannot be read: .*No such file"):
        [list(d) for d in documents.read(part, options, documents.Counts())]


def test_what_is_no_table_is_refused(tmp_path):
  with pytest.raises(errors.DataError, match=r"a\.parquet cannot be read as Parquet: "):
    read(write(tmp_path, "a.parquet", b"not a table"))


@pytest.mark.parametrize(
  ("key", "message"),
  [
    ("words", r"has no columns 'words' \(it has text, id, two, two\); name .* --text_key"),
    ("two", r"has 2 columns 'two'"),
    ("id", r"column 'id' of .*a\.parquet holds int64, not text; name another with --text_key"),
  ],
)
def test_a_table_without_the_column_is_refused(tmp_path, key, message):
  table = pa.table([["a"], [1], ["b"], ["c"]], names=["text", "id", "two", "two"])
  parquet.write_table(table, tmp_path / "a.parquet")
  with pytest.raises(errors.DataError, match=message):
    read(tmp_path / "a.parquet", text_key=key)


@pytest.mark.parametrize(
  ("ending", "package"), [("jsonl.zst", "zstandard"), ("parquet", "pyarrow")]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, ending, package):
  path = write(tmp_path, f"a.{ending}", b"")
  monkeypatch.setitem(sys.modules, package, None)
  message = rf"needs the package {package}; pip install -e '\.\[data\]'"
  with pytest.raises(errors.DataError, match=message):
    read(path)


@pytest.fixture
def tree(tmp_path):
  """A folder with what a working copy of some program may hold."""
  known = ["b.py", "a/deep/c.TXT", "a/d.jsonl.zst", "a/e.md", "f.parquet", "g.py"]
  for name in [
    *known,
    ".hidden.py",
    ".git/config.py",
    "__pycache__/h.py",
    "i.png",
    "j",
    "k.gz",
  ]:
    path = tmp_path / "tree" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("text")
  return tmp_path / "tree"


def found(inputs, extensions=()):
  return documents.find_files([str(name) for name in inputs], extensions)


def test_a_folder_gives_its_known_files_sorted(tree):
  names = ["a/d.jsonl.zst", "a/deep/c.TXT", "a/e.md", "b.py", "f.parquet", "g.py"]
  assert found([tree]) == [str(tree / name) for name in names]
  assert found([tree], (".py", ".md")) == [
    str(tree / name) for name in ["a/e.md", "b.py", "g.py"]
  ]


def test_inputs_are_joined_and_a_file_counts_once(tree):
  expected = [str(tree / name) for name in ["a/d.jsonl.zst", "a/deep/c.TXT", "a/e.md", "g.py"]]
  assert found([tree / "g.py", tree / "a"]) == expected
  assert found([tree / "a", tree / "g.py", tree / "a" / "deep"]) == expected
  (tree / "a" / "link.md").symlink_to(tree / "a" / "e.md")
  assert found([tree / "a", tree / "g.py"]) == expected


def test_a_file_that_is_named_twice_is_refused(tree):
  for again in (tree / "b.py", tree / "a" / ".." / "b.py"):
    with pytest.raises(errors.DataError, match=r"b\.py are the same file; .* count twice"):
      found([tree / "b.py", again])


@pytest.mark.parametrize(
  ("name", "extensions", "message"),
  [
    ("none", (), r"input '.*none' does not exist"),
    ("i.png", (), r"i\.png: unknown kind of file; there are \.jsonl, .*\.parquet, \.txt"),
    (".", (".rs", ".go"), r"no files in .*; looked for \.rs, \.go"),
  ],
)
def test_inputs_without_text_are_refused(tree, name, extensions, message):
  with pytest.raises(errors.DataError, match=message):
    found([tree / name], extensions)


def test_a_folder_of_empty_files_is_refused(tmp_path):
  for name in ("a.txt", "b.jsonl"):
    (tmp_path / name).touch()
  with pytest.raises(errors.DataError, match=r"every file of .* is empty"):
    found([tmp_path])
  (tmp_path / "c.txt").write_text("text")
  assert len(found([tmp_path])) == 3
