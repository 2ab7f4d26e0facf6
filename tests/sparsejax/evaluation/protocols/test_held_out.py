"""Any local corpus is the same documents, and what cannot be read is one line."""

import gzip
import itertools
import json

import numpy as np
import pyarrow
from pyarrow import parquet
import pytest
import zstandard

from sparsejax import errors
from sparsejax.data import documents, prepare, tokenizers
from sparsejax.evaluation.protocols import held_out

BYTES = tokenizers.ByteTokenizer()
TEXTS = ["One two.\n", "drei  vier fünf", "six\nseven\n"]


def lines(key="text"):
  return "".join(json.dumps({key: text}) + "\n" for text in [*TEXTS[:1], " \n", *TEXTS[1:]])


def write_folder(path):
  path.mkdir()
  for number, text in enumerate(TEXTS):
    (path / f"{number}.txt").write_text(text)


def write_prepared(path, **settings):
  write_folder(path.with_name("raw"))
  settings = prepare.Settings(**dict(validation_fraction=0.0) | settings)
  prepare.prepare([str(path.with_name("raw"))], path, settings)


WRITERS = {
  "a.jsonl": lambda path: path.write_text(lines()),
  "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines().encode())),
  "a.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(lines().encode())),
  "a.parquet": lambda path: parquet.write_table(pyarrow.table(dict(text=TEXTS)), path),
  "folder": write_folder,
  "prepared": write_prepared,
}


def open_path(path, tokenizer=BYTES, reading=None, **options):
  options = dict(sequence_length=16, ignore_first_tokens=True) | options
  reading = reading or documents.Options()
  return held_out.of_path(str(path), tokenizer, reading=reading, **options)


def documents_of(text):
  borders = text.packed.borders()
  return [text.packed.read(a, b)[0].tolist() for a, b in itertools.pairwise(borders)]


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_corpus_holds_the_same_documents(tmp_path, name):
  path = tmp_path / name
  WRITERS[name](path)
  held_out.check_path(str(path))
  text = open_path(path)
  assert documents_of(text) == [[256, *t.encode(), 257] for t in TEXTS]
  assert text.name == (f"{path} (train)" if name == "prepared" else str(path))
  assert text.prefix_id == 256
  np.testing.assert_array_equal(text.bytes_per_id, [1] * 256 + [0, 0])
  if name != "prepared":
    assert text.num_bytes_M.tolist() == [9, 16, 10]
    # White space at an end has an empty piece behind it.
    assert text.num_words_M.tolist() == [3, 3, 3]


def test_of_prepared_text_the_validation_split_is_taken(tmp_path):
  path = tmp_path / "prepared"
  write_prepared(path, validation_fraction=0.5)
  text = open_path(path)
  assert text.name == f"{path} (validation)"
  assert 0 < len(documents_of(text)) < 3


def test_no_more_is_read_than_will_be_scored(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text(lines() + "no JSON at all")
  assert len(documents_of(open_path(path, most_documents=2))) == 2
  assert len(documents_of(open_path(path, most_tokens=12))) == 2
  with pytest.raises(errors.DataError, match=r"a\.jsonl:5 is not JSON"):
    open_path(path)


def test_pages_are_mended_and_measured_as_they_were(tmp_path):
  path = tmp_path / "wiki.txt"
  path.write_text(" \n = A = \n 1 @,@ 2 \n = B = \n x , y \n")
  text = open_path(path, by_pages=True)
  assert [BYTES.decode(ids) for ids in documents_of(text)] == [
    " = A =\n1,2 ",
    " = B =\nx, y\n",
  ]
  assert text.num_bytes_M.tolist() == [len(" = A = \n 1 @,@ 2 "), len(" = B = \n x , y \n")]
  assert text.num_words_M.tolist() == [8, 8]


def test_bytes_of_an_id_may_be_a_mean(tmp_path, monkeypatch):
  path = tmp_path / "a.jsonl"
  path.write_text(lines())
  monkeypatch.setattr(tokenizers.ByteTokenizer, "bytes_per_id", lambda self: None)
  text = open_path(path)
  assert text.bytes_per_id.tolist() == [35 / 41] * 258


def test_long_documents_are_tokenized_in_pieces(monkeypatch):
  monkeypatch.setattr(held_out, "_PIECE_CHARACTERS", 7)
  pieces = []

  class Tokenizer(tokenizers.ByteTokenizer):
    bos_id = None

    def encode(self, text):
      pieces.append(text)
      return super().encode(text)

  ids = held_out.tokenize("abc\ndefg\nh", Tokenizer())
  assert pieces == ["abc\n", "defg\nh"]
  assert ids.tolist() == [*b"abc\ndefg\nh", 257]


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("none.txt", None, r"input '.*none\.txt' does not exist"),
    ("a.bin", "x", r"a\.bin: unknown kind of file; there are \.jsonl"),
    ("a.txt", "", r"every file of .*a\.txt is empty"),
  ],
)
def test_a_corpus_that_is_not_there_is_refused_at_once(tmp_path, name, content, message):
  if content is not None:
    (tmp_path / name).write_text(content)
  with pytest.raises(errors.DataError, match=message):
    held_out.check_path(str(tmp_path / name))


def test_what_cannot_be_read_is_refused(tmp_path):
  (tmp_path / "blank.txt").write_text(" \n ")
  with pytest.raises(errors.DataError, match=r"--corpus=.*blank\.txt has no text, only empty"):
    open_path(tmp_path / "blank.txt")
  (tmp_path / "a.jsonl").write_text(lines("body"))
  with pytest.raises(errors.DataError, match=r"has no text field 'text' \(it has body\); name"):
    open_path(tmp_path / "a.jsonl")
  named = open_path(tmp_path / "a.jsonl", reading=documents.Options(text_key="body"))
  assert len(documents_of(named)) == 3
  (tmp_path / "bad.txt").write_bytes(b"a\xff")
  with pytest.raises(errors.DataError, match=r"bad\.txt:1 is not UTF-8"):
    open_path(tmp_path / "bad.txt")


def test_prepared_text_of_another_tokenizer_is_refused(tmp_path):
  write_prepared(tmp_path / "prepared")
  other = tokenizers.train_bpe(TEXTS, 258)
  with pytest.raises(
    errors.DataError,
    match=r"prepared holds ids of tokenizer byte-1, and the checkpoint was trained with json-",
  ):
    open_path(tmp_path / "prepared", other)
  with pytest.raises(errors.DataError, match=r"prepared holds token ids, and --protocol=wiki"):
    open_path(tmp_path / "prepared", by_pages=True)
