"""The sources of a run, mixed into one endless, reproducible sequence of batches.

Batch `n` of the global order is a pure function of the sources, the seed and `n`: it does
not depend on the number of hosts, devices, worker processes or threads. What a checkpoint
has to remember is one number, the next row, and the fingerprint of the corpus.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import hashlib
import itertools
import pathlib
import sys
from typing import Protocol

from absl import flags
import grain
import numpy as np

from sparsejax import errors
from sparsejax.data import batch, recall, rows, shards, stdlib, tokenizers

STDLIB = "stdlib"
RECALL = "recall"
_RECALL_VALIDATION_ROWS = 256


class Rows(Protocol):
  """A random-access sequence of rows (see `rows.PackedRows`)."""

  max_documents: int
  num_tokens: int

  def __len__(self) -> int: ...

  def __getitem__(self, row: int) -> batch.Batch: ...


@dataclasses.dataclass(frozen=True)
class Source:
  """One part of a corpus.

  Attributes:
    name: as the configuration calls it.
    train, validation: rows of each split; None where the split is empty.
    buckets: rows to train on by the length of their documents; `train` alone where all
      lengths are mixed, and where rows are synthetic.
    fingerprint: of its tokens.
    tokenizer: of its text; None for synthetic ids.
    bytes_per_id: UTF-8 bytes that each id stands for, [vocab_size]; None for synthetic ids.
      Where the tokenizer cannot tell (it is not byte-level), the mean over the split.
  """

  name: str
  train: Rows
  validation: Rows | None
  buckets: tuple[Rows, ...]
  fingerprint: str
  tokenizer: tokenizers.Tokenizer | None
  bytes_per_id: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class RowFormat:
  """What a row looks like.

  Attributes:
    sequence_length: tokens per row.
    vocab_size: of the model; every id must be below it.
    seed: of every shuffle and of the synthetic source.
    ignore_first_tokens: whether targets that open a document weigh 0.
    recall_pairs, recall_queries: of the synthetic source (see `recall.RecallRows`).
  """

  sequence_length: int
  vocab_size: int
  seed: int
  ignore_first_tokens: bool
  recall_pairs: int
  recall_queries: int


@dataclasses.dataclass(frozen=True)
class LengthBuckets:
  """In which shares documents of different lengths are read (InfLLM-V2, arXiv:2509.24663).

  Attributes:
    bounds: ascending; bucket i is of documents of `bounds[i]` to `bounds[i + 1] - 1` tokens.
    weights: share of a source's rows that each bucket gives.
  """

  bounds: tuple[int, ...]
  weights: tuple[float, ...]

  @property
  def ranges(self) -> list[tuple[int, int]]:
    return list(itertools.pairwise(self.bounds))


class Corpus:
  """All sources of a run.

  Attributes:
    sources: the parts, in the order of the configuration.
    tokenizer: shared by every source of text; bytes where there is only synthetic data.
    fingerprint: equal for equal sequences of batches.
    max_documents: documents in the row that has the most, over all sources and splits.
  """

  def __init__(
    self,
    sources: Sequence[Source],
    weights: Sequence[float],
    form: RowFormat,
    buckets: LengthBuckets | None = None,
  ):
    """Mixes sources.

    Args:
      sources: at least one; all text must share one tokenizer.
      weights: share of the rows that each source gives; () is by size.
      form: what rows look like.
      buckets: shares by length within each source; None takes documents as they come.

    Raises:
      DataError: tokenizers differ, or have more ids than the model.
    """
    self.sources = tuple(sources)
    self._form = form
    self._weights = tuple(weights) or tuple(len(source.train) for source in sources)
    self.tokenizer = self._shared_tokenizer()
    if self.tokenizer.vocab_size > form.vocab_size:
      raise errors.DataError(
        f"model.vocab_size={form.vocab_size} is smaller than the tokenizer's "
        f"{self.tokenizer.vocab_size} ids; set it to at least that (a multiple of 128 is fast)."
      )
    splits = [s for source in sources for s in (*source.buckets, source.validation) if s]
    self.max_documents = max(split.max_documents for split in splits)
    described = [*(source.fingerprint for source in sources), self._weights, form]
    if buckets is not None:
      described.append(buckets)
    self._bucket_weights = None if buckets is None else buckets.weights
    self.fingerprint = hashlib.sha256(repr(described).encode()).hexdigest()[:16]
    self._rows = self._mix()

  @contextlib.contextmanager
  def batches(
    self,
    *,
    first_row: int,
    batch_size: int,
    host: int = 0,
    num_hosts: int = 1,
    num_workers: int = 0,
    num_threads: int = 4,
  ) -> Iterator[Iterator[batch.Batch]]:
    """A context whose value yields one host's part of every global batch, without end.

    Args:
      first_row: position in the global order to start at (rows already consumed).
      batch_size: rows of a global batch; host `h` gets the h-th of `num_hosts` equal parts.
      host, num_hosts: which part.
      num_workers: processes that read ahead; 0 reads in threads of this one.
      num_threads: reading threads of each process.
    """
    source = _Batches(self._rows, first_row, batch_size, host, num_hosts, self._form.vocab_size)
    reading = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    dataset = grain.MapDataset.source(source).to_iter_dataset(reading)
    if num_workers:
      # grain reads absl flags when it starts processes; notebooks and tests parse none.
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
      dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    iterator = iter(dataset)
    try:
      # Copies, because what worker processes send lives in shared memory until it is freed.
      yield (batch.Batch(*map(np.array, item)) for item in iterator)
    finally:
      iterator.close()

  def batch_at(self, first_row: int, batch_size: int) -> batch.Batch:
    """The global batch that starts at a row, read here and now."""
    source = _Batches(self._rows, first_row, batch_size, 0, 1, self._form.vocab_size)
    return source[0]

  def _shared_tokenizer(self) -> tokenizers.Tokenizer:
    with_text = [source for source in self.sources if source.tokenizer is not None]
    for source in with_text[1:]:
      first = with_text[0]
      if source.tokenizer.fingerprint != first.tokenizer.fingerprint:
        raise errors.DataError(
          f"sources {first.name!r} and {source.name!r} have different tokenizers "
          f"({first.tokenizer.fingerprint}, {source.tokenizer.fingerprint}); prepare both "
          "with the same --tokenizer."
        )
    return with_text[0].tokenizer if with_text else tokenizers.ByteTokenizer()

  def _mix(self) -> grain.MapDataset:
    shuffled, weights = [], []
    for place, (source, weight) in enumerate(zip(self.sources, self._weights, strict=True)):
      shares = (1.0,) if len(source.buckets) == 1 else self._bucket_weights
      for number, (rows_, share) in enumerate(zip(source.buckets, shares, strict=True)):
        # Each its own order, so that equal sources do not move in step.
        seed = (self._form.seed + 7919 * place + 104_729 * number) % 2**32
        shuffled.append(grain.MapDataset.source(rows_).shuffle(seed=seed).repeat())
        weights.append(weight if len(shares) == 1 else weight * share / sum(shares))
    if len(shuffled) == 1:
      return shuffled[0]
    return grain.MapDataset.mix(shuffled, weights=weights)


class _Batches:
  """One host's parts of the global batches, by their number."""

  def __init__(self, rows, first_row, batch_size, host, num_hosts, vocab_size):
    if batch_size % num_hosts:
      raise errors.DataError(
        f"data.batch_size={batch_size} does not divide among {num_hosts} hosts; take a "
        f"multiple of {num_hosts}."
      )
    self._rows = rows
    self._batch_size = batch_size
    self._share = batch_size // num_hosts
    self._first_row = first_row + host * self._share
    self._vocab_size = vocab_size

  def __len__(self) -> int:
    return sys.maxsize // self._batch_size - self._first_row

  def __getitem__(self, number: int) -> batch.Batch:
    start = self._first_row + number * self._batch_size
    picked = [self._rows[row] for row in range(start, start + self._share)]
    stacked = batch.Batch(*(np.stack(field) for field in zip(*picked, strict=True)))
    largest = max(stacked.inputs.max(), stacked.targets.max())
    if largest >= self._vocab_size:
      raise errors.DataError(
        f"token id {largest} in rows {start} to {start + self._share - 1} is outside of "
        f"model.vocab_size={self._vocab_size}; the shards do not fit this model."
      )
    return stacked


def open_corpus(
  names: Sequence[str],
  weights: Sequence[float],
  form: RowFormat,
  *,
  builtin_directory: str | pathlib.Path,
  buckets: LengthBuckets | None = None,
) -> Corpus:
  """Opens sources by name: prepared directories, `stdlib` and `recall`.

  Args:
    names: what to open.
    weights: share of each, or ().
    form: what rows look like.
    builtin_directory: where `stdlib` is prepared when it is not there yet.
    buckets: shares by length within each source; None takes documents as they come.

  Raises:
    DataError: a source is missing, damaged, named twice or does not fit, or has no documents
      for a bucket.
  """
  if len(set(names)) != len(names):
    raise errors.DataError(
      f"data.sources={tuple(names)} names a source twice; use data.weights."
    )
  sources = [_open(name, form, pathlib.Path(builtin_directory), buckets) for name in names]
  return Corpus(sources, weights, form, buckets)


def _open(
  name: str,
  form: RowFormat,
  builtin_directory: pathlib.Path,
  buckets: LengthBuckets | None,
) -> Source:
  if name == RECALL:
    return _open_recall(form)
  if name == STDLIB:
    directory = builtin_directory / STDLIB
    stdlib.prepare_stdlib(directory)
  else:
    directory = pathlib.Path(name)
  manifest = shards.load(directory)
  tokenizer = shards.load_tokenizer(directory, manifest)
  train = _pack(directory, manifest, "train", form, seed=form.seed)
  return Source(
    name=name,
    train=train,
    validation=_pack(directory, manifest, "validation", form, seed=None),
    buckets=(train,) if buckets is None else _sort(name, directory, manifest, form, buckets),
    fingerprint=manifest.fingerprint,
    tokenizer=tokenizer,
    bytes_per_id=bytes_per_id(tokenizer, manifest),
  )


def _pack(directory, manifest, split: str, form: RowFormat, seed) -> rows.PackedRows | None:
  if not manifest.splits[split]:
    return None
  return rows.PackedRows(
    shards.Records(directory, manifest, split),
    sequence_length=form.sequence_length,
    seed=seed,
    ignore_first_tokens=form.ignore_first_tokens,
  )


def _sort(
  name: str, directory, manifest, form: RowFormat, buckets: LengthBuckets
) -> tuple[rows.PackedRows, ...]:
  """The documents to train on in rows of their own for every bucket."""
  records = shards.Records(directory, manifest, "train")
  tokens_M = rows.document_lengths(records)
  for least, end in buckets.ranges:
    if not ((tokens_M >= least) & (tokens_M < end)).any():
      raise errors.DataError(
        f"source {name!r} has no document of {least} to {end - 1} tokens for a bucket of "
        f"data.length_buckets={buckets.bounds}; its documents have {tokens_M.min()} to "
        f"{tokens_M.max()}, so leave the bucket out."
      )
  return tuple(
    rows.PackedRows(
      records,
      sequence_length=form.sequence_length,
      seed=form.seed,
      ignore_first_tokens=form.ignore_first_tokens,
      lengths=lengths,
    )
    for lengths in buckets.ranges
  )


def bytes_per_id(tokenizer: tokenizers.Tokenizer, manifest: shards.Manifest) -> np.ndarray:
  """UTF-8 bytes that each id of prepared text stands for; see `Source`."""
  table = tokenizer.bytes_per_id()
  if table is None:
    files = manifest.splits["validation"] or manifest.splits["train"]
    mean = sum(s.text_bytes for s in files) / sum(s.tokens for s in files)
    table = np.full(tokenizer.vocab_size, mean)
  return table


def _open_recall(form: RowFormat) -> Source:
  def make(seed):
    return recall.RecallRows(
      sequence_length=form.sequence_length,
      vocab_size=form.vocab_size,
      num_pairs=form.recall_pairs,
      num_queries=form.recall_queries,
      seed=seed,
    )

  train = make(form.seed)
  return Source(
    name=RECALL,
    train=train,
    buckets=(train,),
    # Rows of another seed are other examples: there is no text to set aside.
    validation=_First(make(form.seed + 1), _RECALL_VALIDATION_ROWS),
    fingerprint="recall-1",
    tokenizer=None,
    bytes_per_id=None,
  )


class _First:
  """The first rows of a longer sequence."""

  def __init__(self, longer: Rows, count: int):
    self._longer = longer
    self._count = count
    self.max_documents = longer.max_documents

  @property
  def num_tokens(self) -> int:
    return self._longer.num_tokens * self._count // len(self._longer)

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, row: int) -> batch.Batch:
    if not 0 <= row < self._count:
      raise IndexError(row)
    return self._longer[row]
