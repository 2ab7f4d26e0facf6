"""Text becomes the same shards by whatever way: many processes, interrupts, other files."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
from pyarrow import parquet
import pytest

from sparsejax import errors
from sparsejax.data import documents, prepare, shards, tokenizers

ROOT = pathlib.Path(__file__).parents[3]
HALF = prepare.Settings(validation_fraction=0.5)
# Long ones, short ones, empty ones, and some that are there twice.
TEXTS = [f"document {n % 35}\n" * (1 + n % 7) for n in range(40)] + ["", " \n\t"]


@pytest.fixture
def corpus(tmp_path):
  """Documents in several files of several kinds."""
  folder = tmp_path / "corpus"
  folder.mkdir()
  for number in range(4):
    lines = [json.dumps(dict(text=text)) for text in TEXTS[number::4]]
    (folder / f"{number}.jsonl").write_text("\n".join(lines))
  (folder / "code.py").write_text("def f(x):\n  return x\n")
  table = pa.table({"text": ["a table", "of", "three rows"]})
  parquet.write_table(table, folder / "table.parquet", row_group_size=1)
  return folder


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
  """So that even little text is the work of several processes."""
  monkeypatch.setattr(prepare, "UNIT_BYTES", 500)


def contents(folder):
  """Every file of a folder and what is in it."""
  paths = [path for path in folder.rglob("*") if path.is_file()]
  return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def texts_of(directory, split):
  """The documents of a split, decoded, in the order on disk."""
  manifest = shards.load(directory)
  tokenizer = shards.load_tokenizer(directory, manifest)
  if not manifest.splits[split]:
    return []
  records = shards.Records(directory, manifest, split)
  ids = [[] for _ in range(records.document_R[-1] + 1)]
  for record, document in enumerate(records.document_R):
    ids[document] += records[record].tolist()
  for document in ids:
    assert (document[0], document[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
  return [tokenizer.decode(document) for document in ids]


def side(text, fraction):
  """The split of a document, counted by hand."""
  digest = hashlib.sha256(text.encode()).hexdigest()
  return "validation" if int(digest[:16], 16) / 16**16 < fraction else "train"


def all_texts():
  return [*(t for n in range(4) for t in TEXTS[n::4]), "def f(x):\n  return x\n", "a table",
          "of", "three rows"]  # fmt: skip


@pytest.mark.parametrize("tokenizer", ["byte", "train:300"])
def test_documents_are_kept_in_order_and_divided_by_their_hash(corpus, tmp_path, tokenizer):
  settings = dataclasses.replace(HALF, tokenizer=tokenizer)
  prepare.prepare([str(corpus)], tmp_path / "out", settings)
  for split in shards.SPLITS:
    expected = [t for t in all_texts() if t.strip() and side(t, 0.5) == split]
    assert len(expected) > 10
    assert texts_of(tmp_path / "out", split) == expected


def test_equal_documents_fall_to_one_side_whatever_file_they_are_in(tmp_path):
  for number in range(20):
    # Longer than is tokenized at once, and the beginnings differ.
    text = (f"{number} " + "ü\n" * 10) * (prepare.PIECE_CHARACTERS // 8)
    (tmp_path / f"{number}.txt").write_text(text)
    line = json.dumps(dict(text=text))
    (tmp_path / f"{number}.jsonl").write_text(line + "\n" + line)
  prepare.prepare([str(tmp_path)], tmp_path / "out", HALF)
  train, validation = (texts_of(tmp_path / "out", split) for split in shards.SPLITS)
  assert len(train) + len(validation) == 60
  assert not set(train) & set(validation)
  assert len(set(train)) > 3
  assert len(set(validation)) > 3


def test_the_validation_split_has_about_its_share(tmp_path):
  (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(4000)))
  settings = prepare.Settings(validation_fraction=0.1)
  manifest = prepare.prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", settings)
  documents_in = [sum(s.documents for s in manifest.splits[split]) for split in shards.SPLITS]
  assert sum(documents_in) == 4000
  # Four standard deviations of 19.
  assert abs(documents_in[1] - 400) < 76


def test_nothing_is_set_aside_at_fraction_zero(corpus, tmp_path):
  settings = prepare.Settings(validation_fraction=0.0)
  manifest = prepare.prepare([str(corpus)], tmp_path / "out", settings)
  assert manifest.splits["validation"] == ()
  assert texts_of(tmp_path / "out", "train") == [t for t in all_texts() if t.strip()]


def test_the_manifest_counts_what_is_there(corpus, tmp_path):
  (corpus / "bad.txt").write_bytes(b"\xff")
  (corpus / "blank.txt").write_text("\n" * 70_000)
  reading = documents.Options(on_bad_utf8="skip")
  out = tmp_path / "out"
  manifest = prepare.prepare([str(corpus)], out, dataclasses.replace(HALF, reading=reading))
  texts = [text for text in all_texts() if text.strip()]
  num_bytes = sum(len(text.encode()) for text in texts)
  assert manifest.counts == dict(
    documents=len(texts) + 3, empty=3, bad_utf8=1, text_bytes=num_bytes
  )
  for split in shards.SPLITS:
    own = [text for text in texts if side(text, 0.5) == split]
    files = manifest.splits[split]
    assert sum(shard.documents for shard in files) == len(own)
    assert sum(shard.text_bytes for shard in files) == sum(len(t.encode()) for t in own)
    # Every byte is a token; one opens and one closes each document.
    assert manifest.num_tokens(split) == sum(len(t.encode()) + 2 for t in own)
    records = shards.Records(out, manifest, split)
    assert records.tokens_R.sum() == manifest.num_tokens(split)
    assert sum(shard.records for shard in files) == len(records)
  assert manifest == shards.load(out)
  assert not (out / "units").exists()
  text = prepare.summary(manifest)
  assert "read 47 documents; 3 empty ones left out; 1 not UTF-8 (skip)" in text
  assert f"tokenizer byte-1 with 258 ids; dataset {manifest.fingerprint}" in text


def test_a_document_that_begins_with_much_white_space_keeps_it(tmp_path):
  text = "\n" * 200_000 + "end"
  (tmp_path / "a.txt").write_text(text)
  settings = prepare.Settings(validation_fraction=0.0)
  prepare.prepare([str(tmp_path / "a.txt")], tmp_path / "out", settings)
  assert texts_of(tmp_path / "out", "train") == [text]


def test_pieces_end_with_lines_where_they_can(monkeypatch):
  monkeypatch.setattr(prepare, "PIECE_CHARACTERS", 10)
  text = "one\ntwo\nthree\n" + "x" * 25 + "\nfour"
  for size in range(1, len(text) + 1):
    pieces = list(prepare._at_line_ends(text[i : i + size] for i in range(0, len(text), size)))
    assert pieces == ["one\ntwo\n", "three\n", "x" * 10, "x" * 10, "xxxxx\nfour"]


@pytest.mark.parametrize("tokenizer", ["byte", "train:300"])
def test_processes_change_no_byte(corpus, tmp_path, tokenizer):
  settings = dataclasses.replace(HALF, tokenizer=tokenizer)
  manifests = [
    prepare.prepare([str(corpus)], tmp_path / str(n), settings, num_workers=n) for n in (1, 2)
  ]
  assert manifests[0] == manifests[1]
  assert contents(tmp_path / "1") == contents(tmp_path / "2")
  assert len(manifests[0].splits["train"]) > 3


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
      prepare.prepare([str(corpus)], out, HALF)


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
  settings = dataclasses.replace(HALF, tokenizer="train:300")
  whole, out = tmp_path / "whole", tmp_path / "out"
  expected = prepare.prepare([str(corpus)], whole, settings)
  with monkeypatch.context() as patch:
    interrupt(patch, file, after=after)
    with pytest.raises(Interrupt):
      prepare.prepare([str(corpus)], out, settings)
  is_record = after and file.startswith("0")
  assert len(list(out.glob("units/0*.json"))) == num_done + is_record
  assert prepare.prepare([str(corpus)], out, settings) == expected
  assert contents(out) == contents(whole)


def test_finished_units_are_not_read_again(corpus, tmp_path, monkeypatch):
  interrupted(corpus, tmp_path / "out", monkeypatch)
  numbers = []
  write_document = prepare._write_document

  def note(pieces, *arguments):
    numbers.append(len(numbers))
    write_document(pieces, *arguments)

  monkeypatch.setattr(prepare, "_write_document", note)
  manifest = prepare.prepare([str(corpus)], tmp_path / "out", HALF)
  first_three = sum(len(TEXTS[number::4]) for number in range(3))
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
  expected = prepare.prepare([str(corpus)], whole, HALF)
  assert prepare.prepare([str(corpus)], out, HALF) == expected
  assert contents(out) == contents(whole)


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
    prepare.prepare([str(corpus)], out, HALF)
  else:
    interrupted(corpus, out, monkeypatch)
  before = contents(out)
  message = r"out was made from other text or settings .*choose another --out, or delete it"
  with pytest.raises(errors.DataError, match=message):
    prepare.prepare([str(corpus)], out, dataclasses.replace(HALF, **change))
  assert contents(out) == before


def test_other_text_is_refused(corpus, tmp_path, monkeypatch):
  for out in (tmp_path / "finished", tmp_path / "interrupted"):
    if out.name == "finished":
      prepare.prepare([str(corpus)], out, HALF)
    else:
      interrupted(corpus, out, monkeypatch)
    with pytest.raises(errors.DataError, match="other text or settings"):
      prepare.prepare([str(corpus / "0.jsonl")], out, HALF)
    stat = (corpus / "1.jsonl").stat()
    os.utime(corpus / "1.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(errors.DataError, match="other text or settings"):
      prepare.prepare([str(corpus)], out, HALF)
    os.utime(corpus / "1.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    prepare.prepare([str(corpus)], out, HALF)


def test_a_finished_directory_is_left_as_it_is(corpus, tmp_path):
  first = prepare.prepare([str(corpus)], tmp_path / "out", HALF)
  times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
  assert prepare.prepare([str(corpus)], tmp_path / "out", HALF) == first
  assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == times


def test_settings_that_were_refused_may_be_mended(corpus, tmp_path):
  """The remedy that an error names works, with the same --out."""
  (corpus / "0.txt").write_bytes(b"\xff")
  out = tmp_path / "out"
  for settings in (
    dataclasses.replace(HALF, tokenizer=str(tmp_path / "none.json")),
    dataclasses.replace(HALF, tokenizer="train:"),
    dataclasses.replace(HALF, tokenizer="train:300"),
  ):
    with pytest.raises(errors.DataError, match=r"no tokenizer|needs a number|not UTF-8"):
      prepare.prepare([str(corpus)], out, settings)
  skip = documents.Options(on_bad_utf8="skip")
  settings = prepare.Settings(tokenizer="train:290", validation_fraction=0.5, reading=skip)
  expected = prepare.prepare([str(corpus)], tmp_path / "whole", settings)
  assert prepare.prepare([str(corpus)], out, settings) == expected
  assert contents(out) == contents(tmp_path / "whole")


def test_leftovers_of_refused_settings_go(corpus, tmp_path, monkeypatch):
  out = tmp_path / "out"
  with monkeypatch.context() as patch:
    interrupt(patch, "00000.json")
    with pytest.raises(Interrupt):
      prepare.prepare([str(corpus)], out, dataclasses.replace(HALF, tokenizer="train:260"))
  left = set(contents(out))
  assert {"tokenizer.json", "validation-00000.index.npy"} < left
  inputs = [str(corpus / "table.parquet")]
  settings = prepare.Settings(validation_fraction=0.0)
  prepare.prepare(inputs, tmp_path / "whole", settings)
  prepare.prepare(inputs, out, settings)
  assert contents(out) == contents(tmp_path / "whole")


def test_a_tokenizer_is_trained_on_the_text_and_kept(corpus, tmp_path):
  settings = dataclasses.replace(HALF, tokenizer="train:320")
  manifest = prepare.prepare([str(corpus)], tmp_path / "out", settings)
  tokenizer = shards.load_tokenizer(tmp_path / "out", manifest)
  assert manifest.tokenizer == dict(
    kind="json",
    fingerprint=tokenizer.fingerprint,
    vocab_size=tokenizer.vocab_size,
    bos="<|begin_of_text|>",
    eos="<|end_of_text|>",
  )
  assert 258 < tokenizer.vocab_size <= 320
  assert len(tokenizer.encode("document ")) <= 3


def test_every_part_of_the_text_gives_its_share_of_the_sample(tmp_path, monkeypatch):
  """Most of the text says one thing; the rest shapes the vocabulary all the same."""
  monkeypatch.setattr(prepare, "UNIT_BYTES", 2**18)
  for number, word in enumerate(["aaab", "aaab", "zzzy"]):
    (tmp_path / f"{number}.jsonl").write_text(
      "".join(json.dumps(dict(text=word * 100)) + "\n" for _ in range(600))
    )
  settings = prepare.Settings(validation_fraction=0.0, tokenizer_sample_bytes=0)
  inputs = documents.find_files([str(tmp_path)])
  units = prepare._plan([part for file in inputs for part in documents.split_file(file)])
  sample = "".join(prepare._sample(units, settings))
  # 64 KiB of each, and the document under way.
  assert 3 * 2**16 <= len(sample) < 3 * (2**16 + 400)
  assert abs(sample.count("zzzy") - sample.count("aaab") / 2) < 101
  settings = dataclasses.replace(settings, tokenizer_sample_bytes=2**40)
  assert len("".join(prepare._sample(units, settings))) == 3 * 600 * 400


@pytest.fixture
def bpe(tmp_path):
  folder = tmp_path / "tokenizer"
  folder.mkdir()
  tokenizer = tokenizers.train_bpe(["other text of another corpus"] * 20, 280)
  tokenizer.save(folder)
  return folder, tokenizer


def test_a_given_tokenizer_is_used_and_copied(corpus, tmp_path, bpe):
  folder, tokenizer = bpe
  settings = dataclasses.replace(HALF, tokenizer=str(folder))
  manifest = prepare.prepare([str(corpus)], tmp_path / "out", settings)
  shutil.rmtree(folder)
  loaded = shards.load_tokenizer(tmp_path / "out", manifest)
  assert loaded.fingerprint == tokenizer.fingerprint == manifest.tokenizer["fingerprint"]
  expected = [text for text in all_texts() if text.strip() and side(text, 0.5) == "train"]
  assert texts_of(tmp_path / "out", "train") == expected


def test_named_document_marks_are_used(corpus, tmp_path, bpe):
  folder, tokenizer = bpe
  settings = dataclasses.replace(
    HALF, tokenizer=str(folder), bos="<|end_of_text|>", eos="<|begin_of_text|>"
  )
  manifest = prepare.prepare([str(corpus)], tmp_path / "out", settings)
  assert (manifest.tokenizer["bos"], manifest.tokenizer["eos"]) == (settings.bos, settings.eos)
  record = shards.Records(tmp_path / "out", manifest, "train")[0]
  assert (record[0], record[-1]) == (tokenizer.eos_id, tokenizer.bos_id)


def test_another_tokenizer_in_the_same_file_is_refused(corpus, tmp_path, bpe):
  folder, _ = bpe
  settings = dataclasses.replace(HALF, tokenizer=str(folder))
  prepare.prepare([str(corpus)], tmp_path / "out", settings)
  tokenizers.train_bpe(["more"] * 9, 259).save(folder)
  with pytest.raises(errors.DataError, match="other text or settings"):
    prepare.prepare([str(corpus)], tmp_path / "out", settings)


def test_a_vocabulary_beyond_16_bits_takes_32(corpus, tmp_path):
  vocabulary = {"document": 2**16, "of": 2**16 - 1, "<unk>": 1, "</s>": 0}
  for size, dtype in ((2**16 + 1, "uint32"), (2**16, "uint16")):
    words = {word: i for word, i in vocabulary.items() if i < size}
    model = tokenizers.hf.models.WordLevel(words, unk_token="<unk>")
    tokenizer = tokenizers.hf.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.hf.pre_tokenizers.Whitespace()
    path, out = tmp_path / f"{size}.json", tmp_path / str(size)
    path.write_text(tokenizer.to_str())
    manifest = prepare.prepare([str(corpus)], out, prepare.Settings(str(path), 0.0))
    assert (manifest.dtype, manifest.tokenizer["vocab_size"]) == (dtype, size)
    records = shards.Records(out, manifest, "train")
    largest = max(records[record].max() for record in range(len(records)))
    assert largest == size - 1
    assert records[0].dtype == np.int32


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (
      prepare.Settings(validation_fraction=1.0),
      r"--validation_fraction=1\.0 must be in \[0, 1",
    ),
    (prepare.Settings(validation_fraction=-0.1), r"--validation_fraction=-0\.1 must be in"),
    (prepare.Settings(tokenizer="train:many"), r"train:many needs a number: train:8192"),
    (prepare.Settings(tokenizer="train:9"), r"train:9 is too small"),
    (prepare.Settings(tokenizer="none"), r"no tokenizer 'none'"),
    (prepare.Settings(validation_fraction=1e-9), r"none of 46 documents fell to .*raise it"),
    (
      prepare.Settings(validation_fraction=1 - 1e-9),
      r"no document is left .* 46 read, 2 empty",
    ),
  ],
)
def test_settings_that_cannot_be_are_refused(corpus, tmp_path, settings, message):
  with pytest.raises(errors.DataError, match=message):
    prepare.prepare([str(corpus)], tmp_path / "out", settings)
  with pytest.raises(errors.DataError):
    shards.load(tmp_path / "out")


@pytest.mark.parametrize("tokenizer", ["byte", "train:300"])
def test_text_that_is_all_blank_is_refused(tmp_path, tokenizer):
  (tmp_path / "a.txt").write_text(" \n")
  with pytest.raises(errors.DataError, match=r"no document is left .*: 1 read, 1 empty"):
    prepare.prepare([str(tmp_path)], tmp_path / "out", prepare.Settings(tokenizer, 0.0))
  table = tmp_path / "b.parquet"
  parquet.write_table(pa.table({"text": pa.array([], pa.string())}), table)
  with pytest.raises(errors.DataError, match=r"no document is left .*: 0 read, 0 empty"):
    prepare.prepare([str(table)], tmp_path / "none", prepare.Settings(tokenizer, 0.0))


def test_a_place_that_is_taken_is_refused(corpus, tmp_path):
  with pytest.raises(errors.DataError, match=r"is not empty; choose another --out"):
    prepare.prepare([str(corpus)], corpus, HALF)
  for out in (corpus / "code.py", corpus / "code.py" / "out"):
    with pytest.raises(errors.DataError, match=r"cannot write to .*: Not a directory"):
      prepare.prepare([str(corpus)], out, HALF)


def test_an_error_of_another_process_reaches_the_caller(corpus, tmp_path):
  (corpus / "bad.txt").write_bytes(b"\n\xff")
  with pytest.raises(errors.DataError, match=r"bad\.txt:2 is not UTF-8"):
    prepare.prepare([str(corpus)], tmp_path / "out", HALF, num_workers=2)


def command(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "sparsejax.data.prepare", *map(str, arguments)],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip


def test_the_command_line_prepares(corpus, tmp_path):
  out = tmp_path / "out"
  done = command(
    corpus,
    f"--out={out}",
    "--validation_fraction=0.5",
    "--extensions=.jsonl,.py",
    "--workers=2",
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == prepare.summary(shards.load(out)) + "\n"
  assert sorted(texts_of(out, "train") + texts_of(out, "validation")) == sorted(
    text for text in all_texts()[:-3] if text.strip()
  )


@pytest.mark.parametrize("kind", ["missing", "broken"])
def test_the_command_line_says_what_is_wrong_in_one_line(corpus, tmp_path, kind):
  (corpus / "z.txt").write_bytes(b"good\n\xff")
  inputs = dict(missing=[tmp_path / "none"], broken=[corpus])[kind]
  failed = command(*inputs, f"--out={tmp_path / 'out'}", "--workers=2")
  assert (failed.returncode, failed.stdout) == (2, "")
  what = dict(missing=r"does not exist.", broken="z.txt:2 is not UTF-8. ")[kind]
  assert failed.stderr.startswith("error: ")
  assert what in failed.stderr
  assert failed.stderr.count("\n") == 1
  assert "Traceback" not in failed.stderr


def test_every_option_reaches_the_settings(tmp_path, capsys, bpe):
  folder, _ = bpe
  path = tmp_path / "a.jsonl"
  path.write_bytes(b'{"body": "text"}\n{"body": "\xff"}\n')
  out = tmp_path / "out"
  arguments = [str(path), f"--out={out}", f"--tokenizer={folder}", "--validation_fraction=0",
               "--text_key=body", "--on_bad_utf8=replace", "--separator=##", "--workers=1",
               "--bos=<|end_of_text|>", "--eos=<|begin_of_text|>"]  # fmt: skip
  assert prepare.main(arguments) == 0
  assert shards.load(out).options == dict(
    tokenizer=str(folder),
    validation_fraction=0.0,
    reading=dict(text_key="body", separator="##", on_bad_utf8="replace"),
    bos="<|end_of_text|>",
    eos="<|begin_of_text|>",
    tokenizer_sample_bytes=prepare.Settings().tokenizer_sample_bytes,
  )
  assert texts_of(out, "train") == ["text", "\ufffd"]
  assert capsys.readouterr().err == ""


def test_verifying_finds_what_changed(corpus, tmp_path, capsys):
  out = tmp_path / "out"
  manifest = prepare.prepare([str(corpus)], out, HALF)
  num_files = 2 * sum(map(len, manifest.splits.values()))
  assert prepare.main([f"--verify={out}"]) == 0
  assert capsys.readouterr().out == f"{num_files} files are as they were written\n"
  file = out / manifest.splits["validation"][-1].file
  data = bytearray(file.read_bytes())
  data[100] ^= 1
  file.write_bytes(data)
  assert prepare.main([f"--verify={out}"]) == 2
  assert f"{file} differs from its recorded hash" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["a.txt"], ["--out=b"], ["a.txt", "--out"]])
def test_a_command_line_without_input_or_output_shows_its_usage(arguments, capsys):
  with pytest.raises(SystemExit) as exited:
    prepare.main(arguments)
  assert exited.value.code == 2
  assert "usage: python -m sparsejax.data.prepare" in capsys.readouterr().err


def test_an_interrupted_command_says_how_to_carry_on(corpus, tmp_path, capsys, monkeypatch):
  def press_control_c(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(prepare, "_write_document", press_control_c)
  assert prepare.main([str(corpus), f"--out={tmp_path / 'out'}", "--workers=1"]) == 130
  assert "the same command carries on" in capsys.readouterr().err
