"""A protocol's readings of all texts and at all lengths."""

from collections.abc import Sequence
import copy
import dataclasses

from sparsejax import attention, errors
from sparsejax.configuration import build
from sparsejax.data import corpus as corpora
from sparsejax.evaluation import plans, row_batches
from sparsejax.evaluation import subject as subjects
from sparsejax.evaluation.protocols import held_out, reading
from sparsejax.evaluation.protocols import settings as asked

# Of SSA's evaluation on PG19 (arXiv:2511.20102, appendix E).
_PG19_SAMPLES, _PG19_SEED = 1000, 42


@dataclasses.dataclass(frozen=True)
class Part:
  """One reading of one text.

  Attributes:
    source: name of the text.
    length: tokens of a row or a window.
    stride: between windows; None for packed rows.
    reading: what is read.
    fingerprint: of the tokens that are scored, and how.
  """

  source: str
  length: int
  stride: int | None
  reading: reading.Reading
  fingerprint: str


def find(
  subject: subjects.Subject,
  settings: asked.Settings,
  *,
  lengths: Sequence[int],
  most: int,
) -> list[Part]:
  """Readings of every text, by length.

  Args:
    subject: the checkpoint.
    settings: what is read.
    lengths: of windows, as `settings.choose_lengths` returns them.
    most: rows, windows or documents of each text; 0 takes all. Of pg19, samples.

  Raises:
    ConfigError: see `settings.choose_stride`.
    DataError: no text, or none that is long enough.
  """
  protocol = settings.protocol
  strides = {
    length: asked.choose_stride(protocol, settings.stride, length) for length in lengths
  }
  if protocol == "rows" and not settings.corpus:
    return [part for length in lengths for part in _rows_of_data(subject, length, most)]
  texts = _texts(subject, settings, lengths, strides, most)
  is_open_scored = not subject.config.loss.ignore_first_tokens
  padded = {length: _padded(subject, length) for length in lengths}
  found: list[Part] = []
  for text in texts:
    if protocol == "pg19":
      drawn = reading.drawn(
        text,
        lengths,
        strides[lengths[0]],
        [padded[length] for length in lengths],
        num_samples=most or _PG19_SAMPLES,
        seed=_PG19_SEED,
      )
      # The longest decides which tokens are scored.
      fingerprint = plans.digest([text.fingerprint, max(lengths)])
      found += [
        Part(text.name, length, strides[length], own, fingerprint)
        for length, own in zip(lengths, drawn, strict=True)
      ]
      continue
    # Documents are scored from their first token on, whatever training did.
    fingerprint = text.fingerprint
    if protocol in ("rows", "sliding"):
      fingerprint = plans.digest([text.fingerprint, is_open_scored])
    for length in lengths:
      if protocol == "rows":
        rows = held_out.pack(text.packed.records, length, not is_open_scored)
        own = reading.of_rows(rows, length, text.bytes_per_id, most)
      elif protocol == "sliding":
        own = reading.sliding(
          *(text, length, strides[length], padded[length]),
          is_open_scored=is_open_scored,
          most=most,
        )
      else:
        own = reading.documents(text, length, strides[length], padded[length], most=most)
      found.append(Part(text.name, length, strides[length], own, fingerprint))
  return sorted(found, key=lambda part: lengths.index(part.length))


def _padded(subject: subjects.Subject, length: int) -> list[int]:
  options = subject.transformer.options
  return row_batches.row_lengths(length, options.block_size, attention.dense_length(options))


def _rows_of_data(subject: subjects.Subject, length: int, most: int) -> list[Part]:
  """Validation rows of the checkpoint's own data, text or not."""
  config, corpus = subject.config, subject.corpus
  if length != config.data.sequence_length:
    config = copy.deepcopy(config)
    config.data.sequence_length = length
    # WORKDIR/checkpoints/STEP, as in `subject.load`.
    corpus = build.make_corpus(config, subject.path.parent.parent / "data")
  return [
    Part(
      source.name,
      length,
      None,
      reading.of_rows(source.validation, length, source.bytes_per_id, most),
      _identity(source),
    )
    for source in with_validation(corpus)
  ]


def _identity(source: corpora.Source) -> str:
  """Of the rows that are scored: a fingerprint says nothing of how rows are made."""
  rows = source.validation
  return plans.digest([source.fingerprint, len(rows), [x.tolist() for x in rows[0]]])


def with_validation(corpus) -> list:
  """The sources of a corpus that have a validation split.

  Raises:
    DataError: there is none.
  """
  sources = [source for source in corpus.sources if source.validation]
  if not sources:
    raise errors.DataError(
      "none of the data has a validation split; prepare it with --validation_fraction above 0, "
      "or name a text in --corpus."
    )
  return sources


def _texts(
  subject, settings: asked.Settings, lengths, strides, most: int
) -> list[held_out.Text]:
  ignore_first, longest = subject.config.loss.ignore_first_tokens, max(lengths)
  protocol = settings.protocol
  if not settings.corpus:
    sources = [s for s in with_validation(subject.corpus) if s.tokenizer is not None]
    if not sources:
      names = ", ".join(source.name for source in subject.corpus.sources)
      raise errors.DataError(
        f"--protocol={protocol} reads text, and there is none in {names}; name one in --corpus."
      )
    return [held_out.of_source(source, longest, ignore_first) for source in sources]
  # Reads no more of a text than will be scored.
  needed = dict(
    rows=most * longest + 1,
    sliding=max(length + (most - 1) * (strides[length] or 0) + 1 for length in lengths),
  )
  return [
    held_out.of_path(
      path,
      subject.corpus.tokenizer,
      sequence_length=longest,
      ignore_first_tokens=ignore_first,
      reading=settings.reading,
      by_pages=protocol == "wikitext",
      most_documents=most if most and protocol in ("documents", "wikitext") else None,
      most_tokens=needed.get(protocol) if most else None,
    )
    for path in settings.corpus
  ]
