"""Text to prepare, and documents of ids as the prepared directories that readers open."""

import itertools
import json
import pathlib

import numpy as np
import pyarrow as pa
from pyarrow import parquet
import pytest

from sparsejax.data import prepare, shards, tokenizers
from tests.sparsejax.data import texts


@pytest.fixture
def corpus(tmp_path):
  """Documents in several files of several kinds."""
  folder = tmp_path / "corpus"
  folder.mkdir()
  for number in range(4):
    lines = [json.dumps(dict(text=text)) for text in texts.TEXTS[number::4]]
    (folder / f"{number}.jsonl").write_text("\n".join(lines))
  (folder / "code.py").write_text("def f(x):\n  return x\n")
  table = pa.table({"text": ["a table", "of", "three rows"]})
  parquet.write_table(table, folder / "table.parquet", row_group_size=1)
  return folder


@pytest.fixture
def small_units(monkeypatch):
  """So that even little text is the work of several processes."""
  monkeypatch.setattr(prepare, "UNIT_BYTES", 500)


@pytest.fixture
def bpe(tmp_path):
  folder = tmp_path / "tokenizer"
  folder.mkdir()
  tokenizer = tokenizers.train_bpe(["other text of another corpus"] * 20, 280)
  tokenizer.save(folder)
  return folder, tokenizer


@pytest.fixture(scope="session")
def write_prepared(tmp_path_factory):
  """A function that writes lists of ids as a prepared directory and returns its path.

  It has the scope of the session, so that hypothesis may call it for every example.
  """
  root = tmp_path_factory.mktemp("prepared")
  numbers = itertools.count()

  def write(train, validation=(), *, documents_per_shard=None, dtype="uint16", tokenizer=None):
    directory = pathlib.Path(root, str(next(numbers)))
    directory.mkdir()
    tokenizer = tokenizer or tokenizers.ByteTokenizer()
    tokenizer.save(directory)
    splits = dict(train=list(train), validation=list(validation))
    shards.Manifest(
      tokenizer=dict(
        kind="byte" if isinstance(tokenizer, tokenizers.ByteTokenizer) else "json",
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
      ),
      dtype=dtype,
      splits={
        split: tuple(_write_split(directory, split, documents, documents_per_shard, dtype))
        for split, documents in splits.items()
      },
      counts=dict(documents=len(train) + len(validation), empty=0, bad_utf8=0, text_bytes=0),
      options=dict(reading=dict(on_bad_utf8="fail")),
    ).save(directory)
    return directory

  return write


def _write_split(directory, split, documents, documents_per_shard, dtype):
  size = documents_per_shard or max(1, len(documents))
  for number, start in enumerate(range(0, len(documents), size)):
    file = f"{split}-{number:05d}.array_record"
    writer = shards.ShardWriter(directory, file, np.dtype(dtype))
    for ids in documents[start : start + size]:
      writer.extend(list(ids))
      writer.end_document(text_bytes=len(ids))
    yield writer.close()
