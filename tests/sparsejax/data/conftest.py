"""Documents of token ids, written as the prepared directories that readers open."""

import itertools
import pathlib

import numpy as np
import pytest

from sparsejax.data import shards, tokenizers


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
