"""Preparing that was interrupted is carried on, and only with the same text and settings."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from sparsejax import errors
from sparsejax.data import documents, prepare, shards
from tests.sparsejax.data import texts

ROOT = pathlib.Path(__file__).parents[3]
pytestmark = pytest.mark.usefixtures("small_units")


class Interrupt(BaseException):
  pass


def interrupt(patch, file, *, after=False):
  """Stops the work before, or after, a file gets its name."""
  replace = os.replace

  def replacing(source, target):
    if pathlib.Path(target).name != file:
      return replace(source, target)
    if after:
      replace(source, target)
    raise Interrupt

  patch.setattr(os, "replace", replacing)


def interrupted(corpus, out, monkeypatch):
  """Leaves `out` with three units done and the others not."""
  with monkeypatch.context() as patch:
    interrupt(patch, "00002.json", after=True)
    with pytest.raises(Interrupt):
      prepare.prepare([str(corpus)], out, texts.HALF)


@pytest.mark.parametrize(
  ("file", "num_done"),
  [
    ("prepare.json", 0),
    ("tokenizer.json", 0),
    ("00000.json", 0),
    ("train-00003.array_record", 3),
    ("validation-00003.array_record", 3),
    ("00003.json", 3),
    ("manifest.json", 7),
  ],
)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_interrupt_at_any_file_changes_no_byte(
  corpus, tmp_path, monkeypatch, file, num_done, after
):
  settings = dataclasses.replace(texts.HALF, tokenizer="train:300")
  whole, out = tmp_path / "whole", tmp_path / "out"
  expected = prepare.prepare([str(corpus)], whole, settings)
  with monkeypatch.context() as patch:
    interrupt(patch, file, after=after)
    with pytest.raises(Interrupt):
      prepare.prepare([str(corpus)], out, settings)
  is_record = after and file.startswith("0")
  assert len(list(out.glob("units/0*.json"))) == num_done + is_record
  assert prepare.prepare([str(corpus)], out, settings) == expected
  assert texts.contents(out) == texts.contents(whole)


def test_finished_units_are_not_read_again(corpus, tmp_path, monkeypatch):
  interrupted(corpus, tmp_path / "out", monkeypatch)
  numbers = []
  write_document = prepare._write_document

  def note(pieces, *arguments):
    numbers.append(len(numbers))
    write_document(pieces, *arguments)

  monkeypatch.setattr(prepare, "_write_document", note)
  manifest = prepare.prepare([str(corpus)], tmp_path / "out", texts.HALF)
  first_three = sum(len(texts.TEXTS[number::4]) for number in range(3))
  assert len(numbers) == manifest.counts["documents"] - first_three


# Dies without a chance to clean up, in the middle of a shard.
KILLED = """
import os, signal, sys
from sparsejax.data import prepare, shards
prepare.UNIT_BYTES = 500
write = shards.ShardWriter._write
def dying(self, ids):
  write(self, ids)
  if self._path.name == "train-00004.array_record":
    os.kill(os.getpid(), signal.SIGKILL)
shards.ShardWriter._write = dying
prepare.prepare([sys.argv[1]], sys.argv[2], prepare.Settings(validation_fraction=0.5))
"""


def test_a_killed_process_is_carried_on_from(corpus, tmp_path):
  whole, out = tmp_path / "whole", tmp_path / "out"
  command = [sys.executable, "-c", KILLED, str(corpus), str(out)]
  killed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert len(list((out / "units").iterdir())) == 4
  assert list(out.glob("*.tmp"))
  with pytest.raises(errors.DataError, match="is not a prepared directory"):
    shards.load(out)
  expected = prepare.prepare([str(corpus)], whole, texts.HALF)
  assert prepare.prepare([str(corpus)], out, texts.HALF) == expected
  assert texts.contents(out) == texts.contents(whole)


@pytest.mark.parametrize(
  "change",
  [
    dict(tokenizer="train:300"),
    dict(validation_fraction=0.4),
    dict(reading=documents.Options(text_key="body")),
    dict(reading=documents.Options(separator="x")),
    dict(reading=documents.Options(on_bad_utf8="skip")),
    dict(eos="<eos>"),
  ],
  ids=lambda change: "-".join(change),
)
@pytest.mark.parametrize("is_finished", [False, True], ids=["interrupted", "finished"])
def test_other_settings_are_refused(corpus, tmp_path, monkeypatch, change, is_finished):
  out = tmp_path / "out"
  if is_finished:
    prepare.prepare([str(corpus)], out, texts.HALF)
  else:
    interrupted(corpus, out, monkeypatch)
  before = texts.contents(out)
  message = r"out was made from other text or settings .*choose another --out, or delete it"
  with pytest.raises(errors.DataError, match=message):
    prepare.prepare([str(corpus)], out, dataclasses.replace(texts.HALF, **change))
  assert texts.contents(out) == before


def test_other_text_is_refused(corpus, tmp_path, monkeypatch):
  for out in (tmp_path / "finished", tmp_path / "interrupted"):
    if out.name == "finished":
      prepare.prepare([str(corpus)], out, texts.HALF)
    else:
      interrupted(corpus, out, monkeypatch)
    with pytest.raises(errors.DataError, match="other text or settings"):
      prepare.prepare([str(corpus / "0.jsonl")], out, texts.HALF)
    stat = (corpus / "1.jsonl").stat()
    os.utime(corpus / "1.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(errors.DataError, match="other text or settings"):
      prepare.prepare([str(corpus)], out, texts.HALF)
    os.utime(corpus / "1.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    prepare.prepare([str(corpus)], out, texts.HALF)


def test_a_finished_directory_is_left_as_it_is(corpus, tmp_path):
  first = prepare.prepare([str(corpus)], tmp_path / "out", texts.HALF)
  times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
  assert prepare.prepare([str(corpus)], tmp_path / "out", texts.HALF) == first
  assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == times


def test_settings_that_were_refused_may_be_mended(corpus, tmp_path):
  """The remedy that an error names works, with the same --out."""
  (corpus / "0.txt").write_bytes(b"\xff")
  out = tmp_path / "out"
  for settings in (
    dataclasses.replace(texts.HALF, tokenizer=str(tmp_path / "none.json")),
    dataclasses.replace(texts.HALF, tokenizer="train:"),
    dataclasses.replace(texts.HALF, tokenizer="train:300"),
  ):
    with pytest.raises(errors.DataError, match=r"no tokenizer|needs a number|not UTF-8"):
      prepare.prepare([str(corpus)], out, settings)
  skip = documents.Options(on_bad_utf8="skip")
  settings = prepare.Settings(tokenizer="train:290", validation_fraction=0.5, reading=skip)
  expected = prepare.prepare([str(corpus)], tmp_path / "whole", settings)
  assert prepare.prepare([str(corpus)], out, settings) == expected
  assert texts.contents(out) == texts.contents(tmp_path / "whole")


def test_leftovers_of_refused_settings_go(corpus, tmp_path, monkeypatch):
  out = tmp_path / "out"
  with monkeypatch.context() as patch:
    interrupt(patch, "00000.json")
    with pytest.raises(Interrupt):
      prepare.prepare(
        [str(corpus)], out, dataclasses.replace(texts.HALF, tokenizer="train:260")
      )
  left = set(texts.contents(out))
  assert {"tokenizer.json", "validation-00000.index.npy"} < left
  inputs = [str(corpus / "table.parquet")]
  settings = prepare.Settings(validation_fraction=0.0)
  prepare.prepare(inputs, tmp_path / "whole", settings)
  prepare.prepare(inputs, out, settings)
  assert texts.contents(out) == texts.contents(tmp_path / "whole")
