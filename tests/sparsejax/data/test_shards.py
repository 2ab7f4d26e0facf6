"""Token ids come back from disk as they were written, or not at all."""

import dataclasses
import json

import hypothesis
from hypothesis import strategies
import numpy as np
import pytest

from sparsejax import errors
from sparsejax.data import shards, tokenizers

TRAIN = [list(range(n, n + 40)) for n in range(7)]
VALIDATION = [[5, 6, 7], [8], list(range(30))]

ids = strategies.lists(strategies.integers(0, 257), min_size=1, max_size=30)


def read(directory, split):
  """The documents of a split, joined from their records."""
  manifest = shards.load(directory)
  records = shards.Records(directory, manifest, split)
  assert len(records) == len(records.tokens_R) == len(records.document_R)
  found = {}
  for record, (document, size) in enumerate(
    zip(records.document_R, records.tokens_R, strict=True)
  ):
    assert len(records[record]) == size
    found[int(document)] = found.get(int(document), []) + records[record].tolist()
  assert list(found) == list(range(len(found)))
  return list(found.values())


@pytest.fixture
def prepared(write_prepared):
  return write_prepared(TRAIN, VALIDATION, documents_per_shard=3)


def first_shard(directory, split="train"):
  return directory / shards.load(directory).splits[split][0].file


@hypothesis.settings(deadline=None)
@hypothesis.given(
  strategies.lists(ids, min_size=1, max_size=12),
  strategies.lists(ids, max_size=4),
  strategies.integers(1, 5),
  strategies.integers(1, 40),
)
def test_documents_come_back(write_prepared, train, validation, per_shard, record_tokens):
  """Whatever their lengths, and however they divide into shards and records."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(shards, "MAX_RECORD_TOKENS", record_tokens)
    directory = write_prepared(train, validation, documents_per_shard=per_shard)
  assert read(directory, "train") == train
  if validation:
    assert read(directory, "validation") == validation
  records = shards.Records(directory, shards.load(directory), "train")
  assert records.tokens_R.max() <= record_tokens


@pytest.mark.parametrize(("dtype", "largest"), [("uint16", 2**16 - 1), ("uint32", 2**31 - 1)])
def test_the_largest_ids_come_back(write_prepared, dtype, largest):
  directory = write_prepared([[0, largest, 1]], dtype=dtype)
  records = shards.Records(directory, shards.load(directory), "train")
  assert records[0].tolist() == [0, largest, 1]
  assert records[0].dtype == np.int32


def test_a_document_may_be_written_in_pieces(tmp_path):
  writer = shards.ShardWriter(tmp_path, "train-0.array_record", np.dtype("uint16"))
  for piece in ([1, 2], [], [3]):
    writer.extend(piece)
  writer.end_document(text_bytes=5)
  writer.extend([4])
  writer.end_document(text_bytes=6)
  assert not (tmp_path / "train-0.array_record").exists()
  shard = writer.close()
  assert (shard.documents, shard.records, shard.tokens, shard.text_bytes) == (2, 2, 4, 11)
  assert shard.file_bytes == (tmp_path / shard.file).stat().st_size
  assert shard.sha256 == shards.sha256_of(tmp_path / shard.file)
  index = np.load(tmp_path / "train-0.index.npy")
  assert index.tolist() == [[3, 0], [1, 1]]
  assert {path.name for path in tmp_path.iterdir()} == {shard.file, "train-0.index.npy"}


def test_a_shard_without_documents_leaves_nothing(tmp_path):
  writer = shards.ShardWriter(tmp_path, "train-0.array_record", np.dtype("uint16"))
  assert writer.close() is None
  assert not list(tmp_path.iterdir())


def test_the_manifest_comes_back(prepared):
  manifest = shards.load(prepared)
  assert [len(manifest.splits[split]) for split in shards.SPLITS] == [3, 1]
  assert manifest.num_tokens("train") == 7 * 40
  assert manifest.num_tokens("validation") == 34
  (prepared / "copy").mkdir()
  manifest.save(prepared / "copy")
  copy = (prepared / "copy" / "manifest.json").read_bytes()
  assert copy == (prepared / "manifest.json").read_bytes()


def test_the_fingerprint_is_that_of_the_ids(write_prepared):
  changed = [[*TRAIN[0][:-1], 99], *TRAIN[1:]]
  other = tokenizers.train_bpe(["text"], 258)
  fingerprints = [
    shards.load(write_prepared(*arguments, **options)).fingerprint
    for arguments, options in [
      ([TRAIN, VALIDATION], {}),
      ([TRAIN, VALIDATION[:2]], {}),
      ([VALIDATION, TRAIN], {}),
      ([changed, VALIDATION], {}),
      ([TRAIN[::-1], VALIDATION], {}),
      # The same tokens in the same order, but divided into other documents.
      ([[TRAIN[0] + TRAIN[1], *TRAIN[2:]], VALIDATION], {}),
      ([TRAIN, VALIDATION], dict(dtype="uint32")),
      ([TRAIN, VALIDATION], dict(tokenizer=other)),
    ]
  ]
  assert len(set(fingerprints)) == len(fingerprints)
  assert shards.load(write_prepared(TRAIN, VALIDATION)).fingerprint == fingerprints[0]


def test_the_fingerprint_ignores_how_it_was_made(prepared):
  manifest = shards.load(prepared)
  same = dataclasses.replace(manifest, options=dict(note="other"), counts={})
  assert same.fingerprint == manifest.fingerprint


def test_what_is_not_prepared_names_the_command(tmp_path):
  with pytest.raises(errors.DataError, match=r"is not a prepared directory; .*data\.prepare"):
    shards.load(tmp_path)
  with pytest.raises(errors.DataError, match=r"none does not exist; .*--out=.*none"):
    shards.load(tmp_path / "none")


def remove(file):
  file.unlink()


def truncate(file):
  file.write_bytes(file.read_bytes()[:-1])


def empty(file):
  file.write_bytes(b"")


@pytest.mark.parametrize("split", shards.SPLITS)
@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (remove, r"array_record is missing; prepare the directory again"),
    (truncate, r"array_record has \d+ bytes, its manifest says \d+: it was truncated"),
    (empty, r"array_record has 0 bytes, its manifest says \d+"),
  ],
)
def test_a_missing_or_truncated_shard_is_refused(prepared, split, damage, message):
  damage(first_shard(prepared, split))
  with pytest.raises(errors.DataError, match=message):
    shards.load(prepared)


def test_a_missing_index_is_refused(prepared):
  shards.index_of(first_shard(prepared)).unlink()
  with pytest.raises(errors.DataError, match=r"train-00000\.index\.npy is missing"):
    shards.load(prepared)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", r"index\.npy is damaged"),
    (b"not an array", r"index\.npy is damaged"),
    (np.array([[40, 0], [40, 1]]), r"index\.npy does not fit its shard"),
    (np.array([[40, 0], [40, 1], [41, 2]]), r"index\.npy does not fit its shard"),
    (np.array([120, 0, 0]), r"index\.npy (is damaged|does not fit)"),
    (np.array(3), r"index\.npy (is damaged|does not fit)"),
    (np.array([[{}, 0]] * 3, object), r"index\.npy is damaged"),
  ],
  ids=["empty", "text", "short", "sum", "flat", "scalar", "objects"],
)
def test_a_damaged_index_is_refused(prepared, content, message):
  path = shards.index_of(first_shard(prepared))
  if isinstance(content, bytes):
    path.write_bytes(content)
  else:
    np.save(path, content)
  with pytest.raises(errors.DataError, match=rf"train-00000\.{message}"):
    shards.Records(prepared, shards.load(prepared), "train")


def test_a_truncated_index_is_refused(prepared):
  truncate(shards.index_of(first_shard(prepared)))
  with pytest.raises(errors.DataError, match=r"index\.npy is damaged"):
    shards.Records(prepared, shards.load(prepared), "train")


def test_a_damaged_record_is_refused_by_its_name(write_prepared):
  """The others are read."""
  documents = [np.random.default_rng(n).integers(258, size=5000) for n in range(6)]
  directory = write_prepared(documents, documents_per_shard=3)
  file = directory / "train-00001.array_record"
  data = bytearray(file.read_bytes())
  # A record takes between 5000 and 6000 bytes.
  data[8000:8100] = bytes(100)
  file.write_bytes(data)
  records = shards.Records(directory, shards.load(directory), "train")
  with pytest.raises(errors.DataError, match=r"record 1 of .*train-00001\.array_record is dam"):
    records[4]
  for intact in (0, 1, 2, 3, 5):
    assert records[intact].tolist() == documents[intact].tolist()


def test_a_record_of_another_length_is_refused(prepared):
  """As when a shard was exchanged for one of the same size."""
  index = shards.index_of(first_shard(prepared))
  np.save(index, np.load(index) + np.array([[1, 0], [-1, 0], [0, 0]]))
  records = shards.Records(prepared, shards.load(prepared), "train")
  with pytest.raises(errors.DataError, match=r"record 0 of .* \(80 bytes for 41 tokens\)"):
    records[0]
  with pytest.raises(IndexError):
    records[len(records)]


def edit(directory, **changes):
  """Writes a manifest with other content than was recorded."""
  path = directory / "manifest.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(schema=2), r"manifest\.json has schema 2, this version reads 1; prepare again"),
    (dict(fingerprint="0" * 16), r"manifest\.json was changed after it was written"),
    (dict(dtype="uint32"), r"manifest\.json was changed"),
    (dict(dtype="int32"), r"manifest\.json was changed"),
    (dict(splits=dict(train=[], validation=[])), r"manifest\.json was changed"),
    (dict(splits=dict(train=[])), r"manifest\.json is damaged \('validation'\)"),
    (dict(splits=dict(train=[dict(file="a")], validation=[])), r"manifest\.json is damaged"),
    (dict(splits=3), r"manifest\.json is damaged"),
    (dict(counts=3), r"manifest\.json is damaged"),
    (dict(tokenizer={}), r"manifest\.json is damaged \('fingerprint'\)"),
  ],
  ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_changed_manifest_is_refused(prepared, changes, message):
  edit(prepared, **changes)
  with pytest.raises(errors.DataError, match=message):
    shards.load(prepared)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff", b"{}"])
def test_a_damaged_manifest_is_refused(prepared, content):
  (prepared / "manifest.json").write_bytes(content)
  with pytest.raises(errors.DataError, match=r"manifest\.json is damaged .*prepare again"):
    shards.load(prepared)


def test_a_manifest_may_not_lead_outside(prepared, tmp_path):
  splits = json.loads((prepared / "manifest.json").read_text())["splits"]
  splits["train"][0]["file"] = "../" + splits["train"][0]["file"]
  edit(prepared, splits=splits)
  with pytest.raises(errors.DataError, match=r"names '\.\./train-00000.* outside of it"):
    shards.load(prepared)


def test_verifying_reads_every_byte(prepared):
  assert shards.verify(prepared) == 8
  for split in shards.SPLITS:
    for file in (first_shard(prepared, split), shards.index_of(first_shard(prepared, split))):
      data = file.read_bytes()
      file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
      with pytest.raises(
        errors.DataError, match=rf"{file.name} differs from its recorded hash"
      ):
        shards.verify(prepared)
      file.write_bytes(data)


@pytest.fixture
def with_bpe(write_prepared):
  tokenizer = tokenizers.train_bpe(["some text"] * 9, 270)
  return write_prepared(TRAIN, tokenizer=tokenizer), tokenizer


def test_the_tokenizer_comes_back(prepared, with_bpe):
  directory, tokenizer = with_bpe
  loaded = shards.load_tokenizer(directory, shards.load(directory))
  assert loaded.fingerprint == tokenizer.fingerprint
  assert loaded.encode("some text") == tokenizer.encode("some text")
  of_bytes = shards.load_tokenizer(prepared, shards.load(prepared))
  assert isinstance(of_bytes, tokenizers.ByteTokenizer)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (None, r"tokenizer\.json is missing; prepare the directory again"),
    (b"{}", r"not a tokenizer\.json"),
    (b"\xff", r"tokenizer\.json is not UTF-8"),
    (
      b"another",
      r"the tokenizer in .* is not the one its shards were made with \(json-.*json-",
    ),
  ],
)
def test_another_tokenizer_is_refused(with_bpe, text, message):
  directory, _ = with_bpe
  if text == b"another":
    tokenizers.train_bpe(["another text"] * 9, 270).save(directory)
  elif text is None:
    (directory / "tokenizer.json").unlink()
  else:
    (directory / "tokenizer.json").write_bytes(text)
  with pytest.raises(errors.DataError, match=message):
    shards.load_tokenizer(directory, shards.load(directory))


def test_a_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / "a.json"
  shards.write_atomically(path, "old")

  def fail(*_):
    raise OSError

  monkeypatch.setattr(shards.os, "replace", fail)
  with pytest.raises(OSError):
    shards.write_atomically(path, "new")
  assert path.read_text() == "old"
