"""What text perplexity is of, and how much of it is read at a time."""

from collections.abc import Sequence
import dataclasses

from sparsejax import errors
from sparsejax.data import documents
from sparsejax.evaluation.protocols import held_out

PROTOCOLS = ("rows", "sliding", "documents", "pg19", "wikitext")
# Protocols whose windows may overlap.
WITH_STRIDE = ("sliding", "documents", "pg19")

# Of SSA's evaluation on PG19 (arXiv:2511.20102, appendix E, table A8).
_PG19_LENGTHS, _PG19_STRIDE = (4096, 8192, 16384, 32768), 256
# Of its evaluation on WikiText: `max_length` of lm-evaluation-harness.
_WIKITEXT_LENGTH = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What text is read, and how much of it at a time.

  Attributes:
    protocol: `rows`: packed rows, documents apart from each other, every token once.
      `sliding`: overlapping windows over all documents end to end.
      `documents`: each document by itself, in rolling windows.
      `pg19`: SSA's evaluation on PG19 (arXiv:2511.20102, appendix E): 1000 windows of 4k, 8k,
      16k and 32k tokens each, drawn with seed 42 from those that begin 256 tokens apart, of
      which the last 256 targets count. What the paper leaves open is chosen here: a window is
      of one document, and all lengths score the same targets. `max_rows` is another number.
      `wikitext`: `documents` by pages and 8192 tokens, mended and with words and bytes counted
      as the task `wikitext` of lm-evaluation-harness does it.
    corpus: files and folders of text, or prepared directories; () takes the validation splits
      of the checkpoint's data.
    reading: how files become documents.
    stride: tokens between windows; None is half a window of `sliding`, a window of
      `documents`, and 256 of `pg19`.
    decode: whether tokens are scored by decoding, from the first that counts in a row on, and
      not by a forward pass (see `by_decode`).
  """

  protocol: str = "rows"
  corpus: tuple[str, ...] = ()
  reading: documents.Options = dataclasses.field(default_factory=documents.Options)
  stride: int | None = None
  decode: bool = False

  def __post_init__(self):
    if self.protocol not in PROTOCOLS:
      raise errors.ConfigError(errors.one_of("--protocol", self.protocol, PROTOCOLS))
    if self.reading.on_bad_utf8 not in documents.ON_BAD_UTF8:
      raise errors.ConfigError(
        errors.one_of("--on_bad_utf8", self.reading.on_bad_utf8, documents.ON_BAD_UTF8)
      )
    if self.stride is not None:
      if self.protocol not in WITH_STRIDE:
        raise errors.ConfigError(
          f"--stride={self.stride} is of windows that overlap, and --protocol={self.protocol} "
          f"has none; leave it out, or take {', '.join(WITH_STRIDE)}."
        )
      if self.stride < 1:
        raise errors.ConfigError(f"--stride={self.stride} must be at least 1.")
    if len(set(self.corpus)) < len(self.corpus):
      raise errors.ConfigError(f"--corpus={','.join(self.corpus)} names a text twice.")
    if self.protocol == "wikitext" and not self.corpus:
      raise errors.ConfigError(
        "--protocol=wikitext reads pages of WikiText; name the file of its test split in "
        "--corpus."
      )

  def check(self) -> None:
    """Checks what can be checked before anything is loaded.

    Raises:
      DataError: a text that is not there.
    """
    for path in self.corpus:
      held_out.check_path(path)


def choose_lengths(protocol: str, lengths: Sequence[int], row_length: int) -> tuple[int, ...]:
  """Tokens of windows: those asked for, or else the protocol's own.

  Raises:
    ConfigError: they exceed the model's rows.
  """
  for length in lengths:
    if length > row_length:
      raise errors.ConfigError(
        f"--lengths={length} exceeds the model's rows of {row_length} tokens; take at most "
        f"that, or --sequence_length={length} to ask beyond what it was trained on."
      )
  if lengths:
    return tuple(dict.fromkeys(lengths))
  usual = dict(pg19=_PG19_LENGTHS, wikitext=(_WIKITEXT_LENGTH,)).get(protocol, (row_length,))
  fits = tuple(length for length in usual if length <= row_length)
  if not fits:
    shorter = f"--lengths={row_length}"
    if protocol == "pg19" and row_length < _PG19_STRIDE:
      shorter += f" --stride={row_length}"
    raise errors.ConfigError(
      f"--protocol={protocol} reads windows of {usual[0]} tokens, and the model's rows have "
      f"{row_length}; take {shorter}, or --sequence_length={usual[0]} to ask "
      "beyond what it was trained on."
    )
  return fits


def choose_stride(protocol: str, stride: int | None, length: int) -> int | None:
  """Tokens between windows of a length: what was asked for, or else the protocol's own.

  Raises:
    ConfigError: it exceeds the window.
  """
  if protocol == "rows":
    return None
  usual = dict(sliding=max(1, length // 2), pg19=_PG19_STRIDE).get(protocol, length)
  chosen = usual if stride is None else stride
  if chosen > length:
    raise errors.ConfigError(
      f"a stride of {chosen} exceeds windows of {length} tokens, and would leave tokens out; "
      f"take --stride={length} or less, or longer --lengths."
    )
  return chosen
