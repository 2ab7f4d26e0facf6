"""Packed rows against the stream of tokens built one by one."""

import hypothesis
from hypothesis import strategies
import numpy as np
import pytest

from sparsejax.data import rows, shards

FIELDS = ("inputs", "targets", "weights", "segments", "positions")

documents = strategies.lists(
  strategies.lists(strategies.integers(1, 257), min_size=1, max_size=11), min_size=1, max_size=9
)


def open_rows(directory, length, *, seed=None, ignore_first_tokens=True):
  records = shards.Records(directory, shards.load(directory), "train")
  return rows.PackedRows(
    records, sequence_length=length, seed=seed, ignore_first_tokens=ignore_first_tokens
  )


def pack(documents, length, ignore_first_tokens):
  """The rows of documents end to end, token by token."""
  stream = [(token, place == 0) for ids in documents for place, token in enumerate(ids)]
  packed = []
  for start in range(0, max(1, len(stream) - 1), length):
    row = {name: [] for name in FIELDS}
    segment, position = 0, 0
    pairs = zip(stream[start : start + length], stream[start + 1 :], strict=False)
    for (token, opens), (target, next_opens) in pairs:
      if opens or not row["inputs"]:
        segment, position = segment + 1, 0
      row["inputs"].append(token)
      row["targets"].append(target)
      row["weights"].append(float(not (ignore_first_tokens and next_opens)))
      row["segments"].append(segment)
      row["positions"].append(position)
      position += 1
    packed.append({n: v + [0] * (length - len(v)) for n, v in row.items()})
  return packed


def as_lists(row):
  return {name: value.tolist() for name, value in row._asdict().items()}


def order_of(documents, packed):
  """The order of documents in rows, told from their first tokens, which are unique."""
  number_of = {ids[0]: number for number, ids in enumerate(documents)}
  tokens = [packed[0].inputs[0], *(token for row in packed for token in row.targets)]
  return [number_of[token] for token in tokens if token in number_of]


@hypothesis.settings(deadline=None)
@hypothesis.given(
  documents, strategies.integers(1, 14), strategies.booleans(), strategies.integers(1, 4),
  strategies.integers(1, 12),
)  # fmt: skip
def test_rows_are_the_stream_in_order(
  write_prepared, documents, length, ignore_first, per_shard, record_tokens
):
  """Whatever the lengths of documents, records, shards and rows."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(shards, "MAX_RECORD_TOKENS", record_tokens)
    directory = write_prepared(documents, documents_per_shard=per_shard)
  packed = open_rows(directory, length, ignore_first_tokens=ignore_first)
  expected = pack(documents, length, ignore_first)
  assert [as_lists(packed[row]) for row in range(len(packed))] == expected
  assert packed.num_tokens == sum(map(len, documents))
  assert packed.max_documents == max(1, max(max(row["segments"]) for row in expected))


@hypothesis.settings(deadline=None)
@hypothesis.given(
  strategies.integers(2, 9), strategies.integers(0, 2**32), strategies.integers(3, 9)
)
def test_a_seed_permutes_whole_documents(write_prepared, num_documents, seed, length):
  # Every token is another, so the rows tell which document is where.
  numbers = iter(range(1, 10_000))
  documents = [[next(numbers) for _ in range(2 + 3 * n % 7)] for n in range(num_documents)]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(shards, "MAX_RECORD_TOKENS", 3)
    directory = write_prepared(documents, documents_per_shard=2)
  packed = open_rows(directory, length, seed=seed)
  shuffled = [packed[row] for row in range(len(packed))]
  order = order_of(documents, shuffled)
  assert sorted(order) == list(range(num_documents))
  expected = pack([documents[number] for number in order], length, True)
  assert [as_lists(row) for row in shuffled] == expected


def test_another_seed_is_another_order(write_prepared):
  documents = [[2 * n + 1, 2 * n + 2] for n in range(30)]
  directory = write_prepared(documents)
  orders = [
    order_of(documents, list(map(open_rows(directory, 6, seed=seed).__getitem__, range(10))))
    for seed in (None, 0, 1, 0)
  ]
  assert orders[0] == list(range(30))
  assert orders[1] == orders[3]
  assert orders[1] != orders[2]
  assert orders[0] not in orders[1:]


@pytest.mark.parametrize("seed", [None, 3])
def test_every_token_but_the_first_is_a_target_once(write_prepared, seed):
  documents = [list(range(n * 20, n * 20 + 2 + n)) for n in range(1, 12)]
  packed = open_rows(write_prepared(documents), 7, seed=seed)
  targets = [t for row in range(len(packed)) for t in packed[row].targets if t]
  tokens = [token for ids in documents for token in ids]
  assert sorted([packed[0].inputs[0], *targets]) == tokens


def test_any_row_can_be_read_on_its_own(write_prepared):
  rng = np.random.default_rng(0)
  documents = [rng.integers(1, 257, size=size).tolist() for size in rng.integers(1, 50, 40)]
  directory = write_prepared(documents, documents_per_shard=7)
  packed = open_rows(directory, 16, seed=5)
  in_order = [as_lists(packed[row]) for row in range(len(packed))]
  for row in rng.permutation(len(packed)).tolist():
    assert as_lists(open_rows(directory, 16, seed=5)[row]) == in_order[row]


@pytest.mark.parametrize("row", [-1, 3, 2**40])
def test_there_are_no_other_rows(write_prepared, row):
  packed = open_rows(write_prepared([[1] * 13]), 5)
  assert len(packed) == 3
  with pytest.raises(IndexError):
    packed[row]


def test_types_and_shapes_are_those_of_a_batch(write_prepared):
  row = open_rows(write_prepared([[1, 2]]), 5)[0]
  assert {value.shape for value in row} == {(5,)}
  assert [str(value.dtype) for value in row] == ["int32", "int32", "float32", "int32", "int32"]


def test_a_row_by_hand(write_prepared):
  row = open_rows(write_prepared([[1, 2, 3], [4, 5], [6]]), 8)[0]
  assert as_lists(row) == dict(
    inputs=[1, 2, 3, 4, 5, 0, 0, 0],
    targets=[2, 3, 4, 5, 6, 0, 0, 0],
    weights=[1, 1, 0, 1, 0, 0, 0, 0],
    segments=[1, 1, 1, 2, 2, 0, 0, 0],
    positions=[0, 1, 2, 0, 1, 0, 0, 0],
  )


def test_a_row_that_continues_a_document_counts_its_positions_from_there(write_prepared):
  row = open_rows(write_prepared([[1, 2, 3, 4, 5], [6, 7]]), 4, ignore_first_tokens=False)[1]
  assert as_lists(row) == dict(
    inputs=[5, 6, 0, 0],
    targets=[6, 7, 0, 0],
    weights=[1, 1, 0, 0],
    segments=[1, 2, 0, 0],
    positions=[0, 0, 0, 0],
  )
