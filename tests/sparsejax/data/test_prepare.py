"""Text becomes the same shards by whatever way: many processes, other files, tokenizers."""

import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pyarrow as pa
from pyarrow import parquet
import pytest

from sparsejax import errors
from sparsejax.data import documents, prepare, shards, tokenizers
from tests.sparsejax.data import texts

pytestmark = pytest.mark.usefixtures("small_units")


def side(text, fraction):
  """The split of a document, counted by hand."""
  digest = hashlib.sha256(text.encode()).hexdigest()
  return "validation" if int(digest[:16], 16) / 16**16 < fraction else "train"


@pytest.mark.parametrize("tokenizer", ["byte", "train:300"])
def test_documents_are_kept_in_order_and_divided_by_their_hash(corpus, tmp_path, tokenizer):
  settings = dataclasses.replace(texts.HALF, tokenizer=tokenizer)
  prepare.prepare([str(corpus)], tmp_path / "out", settings)
  for split in shards.SPLITS:
    expected = [t for t in texts.all_texts() if t.strip() and side(t, 0.5) == split]
    assert len(expected) > 10
    assert texts.texts_of(tmp_path / "out", split) == expected


def test_equal_documents_fall_to_one_side_whatever_file_they_are_in(tmp_path):
  for number in range(20):
    # Longer than is tokenized at once, and the beginnings differ.
    text = (f"{number} " + "ü\n" * 10) * (prepare.PIECE_CHARACTERS // 8)
    (tmp_path / f"{number}.txt").write_text(text)
    line = json.dumps(dict(text=text))
    (tmp_path / f"{number}.jsonl").write_text(line + "\n" + line)
  prepare.prepare([str(tmp_path)], tmp_path / "out", texts.HALF)
  train, validation = (texts.texts_of(tmp_path / "out", split) for split in shards.SPLITS)
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
  assert texts.texts_of(tmp_path / "out", "train") == [
    t for t in texts.all_texts() if t.strip()
  ]


def test_the_manifest_counts_what_is_there(corpus, tmp_path):
  (corpus / "bad.txt").write_bytes(b"\xff")
  (corpus / "blank.txt").write_text("\n" * 70_000)
  reading = documents.Options(on_bad_utf8="skip")
  out = tmp_path / "out"
  manifest = prepare.prepare(
    [str(corpus)], out, dataclasses.replace(texts.HALF, reading=reading)
  )
  kept = [text for text in texts.all_texts() if text.strip()]
  num_bytes = sum(len(text.encode()) for text in kept)
  assert manifest.counts == dict(
    documents=len(kept) + 3, empty=3, bad_utf8=1, text_bytes=num_bytes
  )
  for split in shards.SPLITS:
    own = [text for text in kept if side(text, 0.5) == split]
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
  assert texts.texts_of(tmp_path / "out", "train") == [text]


def test_pieces_end_with_lines_where_they_can():
  text = "one\ntwo\nthree\n" + "x" * 25 + "\nfour"
  for size in range(1, len(text) + 1):
    given = [text[i : i + size] for i in range(0, len(text), size)]
    pieces = list(prepare.at_line_ends(given, 10))
    assert pieces == ["one\ntwo\n", "three\n", "x" * 10, "x" * 10, "xxxxx\nfour"]


@pytest.mark.parametrize("tokenizer", ["byte", "train:300"])
def test_processes_change_no_byte(corpus, tmp_path, tokenizer):
  settings = dataclasses.replace(texts.HALF, tokenizer=tokenizer)
  manifests = [
    prepare.prepare([str(corpus)], tmp_path / str(n), settings, num_workers=n) for n in (1, 2)
  ]
  assert manifests[0] == manifests[1]
  assert texts.contents(tmp_path / "1") == texts.contents(tmp_path / "2")
  assert len(manifests[0].splits["train"]) > 3


def test_a_tokenizer_is_trained_on_the_text_and_kept(corpus, tmp_path):
  settings = dataclasses.replace(texts.HALF, tokenizer="train:320")
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


def test_a_given_tokenizer_is_used_and_copied(corpus, tmp_path, bpe):
  folder, tokenizer = bpe
  settings = dataclasses.replace(texts.HALF, tokenizer=str(folder))
  manifest = prepare.prepare([str(corpus)], tmp_path / "out", settings)
  shutil.rmtree(folder)
  loaded = shards.load_tokenizer(tmp_path / "out", manifest)
  assert loaded.fingerprint == tokenizer.fingerprint == manifest.tokenizer["fingerprint"]
  expected = [text for text in texts.all_texts() if text.strip() and side(text, 0.5) == "train"]
  assert texts.texts_of(tmp_path / "out", "train") == expected


def test_named_document_marks_are_used(corpus, tmp_path, bpe):
  folder, tokenizer = bpe
  settings = dataclasses.replace(
    texts.HALF, tokenizer=str(folder), bos="<|end_of_text|>", eos="<|begin_of_text|>"
  )
  manifest = prepare.prepare([str(corpus)], tmp_path / "out", settings)
  assert (manifest.tokenizer["bos"], manifest.tokenizer["eos"]) == (settings.bos, settings.eos)
  record = shards.Records(tmp_path / "out", manifest, "train")[0]
  assert (record[0], record[-1]) == (tokenizer.eos_id, tokenizer.bos_id)


def test_another_tokenizer_in_the_same_file_is_refused(corpus, tmp_path, bpe):
  folder, _ = bpe
  settings = dataclasses.replace(texts.HALF, tokenizer=str(folder))
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
    prepare.prepare([str(corpus)], corpus, texts.HALF)
  for out in (corpus / "code.py", corpus / "code.py" / "out"):
    with pytest.raises(errors.DataError, match=r"cannot write to .*: Not a directory"):
      prepare.prepare([str(corpus)], out, texts.HALF)


def test_an_error_of_another_process_reaches_the_caller(corpus, tmp_path):
  (corpus / "bad.txt").write_bytes(b"\n\xff")
  with pytest.raises(errors.DataError, match=r"bad\.txt:2 is not UTF-8"):
    prepare.prepare([str(corpus)], tmp_path / "out", texts.HALF, num_workers=2)
