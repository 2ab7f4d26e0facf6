"""Text to token ids and back: bytes, or any Hugging Face `tokenizer.json`."""

from collections.abc import Iterable
import hashlib
import json
import pathlib
from typing import Protocol

import numpy as np
import tokenizers as hf

from sparsejax import errors

BYTE = "byte"
MAX_TOKENIZER_BYTES = 256 * 2**20

_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>")
_EOS_NAMES = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]", "<|im_end|>")

# Words with their leading space, numbers in threes, runs of punctuation, line breaks and
# indentation each on their own: the split that current byte-level tokenizers share.
_SPLIT = (
  r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer(Protocol):
  """What the rest of the house asks of a tokenizer.

  Attributes:
    vocab_size: one more than the largest id.
    bos, eos: names of the tokens that open and close a document; None where there is none.
    bos_id, eos_id: their ids.
    fingerprint: equal for equal tokenizers, different for different ones.
  """

  vocab_size: int
  bos: str | None
  eos: str | None
  bos_id: int | None
  eos_id: int | None
  fingerprint: str

  def encode(self, text: str) -> list[int]:
    """Ids of the text alone, without special tokens."""

  def decode(self, ids: Iterable[int]) -> str:
    """Text of ids; special tokens vanish, broken bytes become U+FFFD."""

  def bytes_per_id(self) -> np.ndarray | None:
    """UTF-8 bytes each id stands for, [vocab_size]; None where that cannot be known."""

  def save(self, directory: pathlib.Path) -> None:
    """Writes what `load` needs, if anything, into a directory."""


class ByteTokenizer:
  """Every UTF-8 byte is its own id; 256 opens a document and 257 closes it."""

  vocab_size = 258
  bos = "<bos>"
  eos = "<eos>"
  bos_id = 256
  eos_id = 257
  fingerprint = "byte-1"

  def encode(self, text: str) -> list[int]:
    return list(text.encode("utf-8"))

  def decode(self, ids: Iterable[int]) -> str:
    return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")

  def bytes_per_id(self) -> np.ndarray:
    return np.array([1] * 256 + [0, 0])

  def save(self, directory: pathlib.Path) -> None:
    del directory  # nothing to remember


class JsonTokenizer:
  """A tokenizer in the `tokenizers` library's JSON format: data only, no code is run."""

  def __init__(self, text: str, *, bos: str | None = None, eos: str | None = None):
    """Reads the JSON.

    Args:
      text: content of a `tokenizer.json`.
      bos, eos: the special tokens around a document; None looks for the usual names.

    Raises:
      DataError: the JSON is none, or names no such special token.
    """
    try:
      self._tokenizer = hf.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
      raise errors.DataError(f"not a tokenizer.json: {error}") from error
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    # A document that spells a special token, as text about tokenizers does, must not end there.
    self._tokenizer.encode_special_tokens = True
    self._text = text
    # Ids may have holes, so the count of entries is not the size.
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
      raise errors.DataError("not a tokenizer.json: its vocabulary is empty.")
    self.vocab_size = max(vocabulary.values()) + 1
    self.bos = _special_token("bos", bos, _BOS_NAMES, vocabulary)
    self.eos = _special_token("eos", eos, _EOS_NAMES, vocabulary)
    if self.eos is None:
      raise errors.DataError(
        "the tokenizer has none of the usual end-of-text tokens "
        f"({', '.join(_EOS_NAMES)}); name its own with --eos."
      )
    self.bos_id = vocabulary.get(self.bos)
    self.eos_id = vocabulary[self.eos]
    digest = hashlib.sha256(text.encode())
    digest.update(f"{self.bos_id},{self.eos_id}".encode())
    self.fingerprint = f"json-{digest.hexdigest()[:16]}"

  def encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Iterable[int]) -> str:
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

  def bytes_per_id(self) -> np.ndarray | None:
    if not _is_byte_level(json.loads(self._text)):
      return None
    counts = np.zeros(self.vocab_size, np.int64)
    for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
      # In a byte-level vocabulary one character stands for one byte.
      counts[i] = len(token)
    for i, added in self._tokenizer.get_added_tokens_decoder().items():
      # Added tokens are spelled as they are; those that are not special are text, too.
      counts[i] = 0 if added.special else len(added.content.encode("utf-8"))
    return counts

  def save(self, directory: pathlib.Path) -> None:
    (directory / "tokenizer.json").write_text(self._text, encoding="utf-8")


def _special_token(role: str, name: str | None, usual, vocabulary) -> str | None:
  if name is not None and name not in vocabulary:
    raise errors.DataError(f"--{role}={name!r} is not a token of this tokenizer.")
  return name or next((known for known in usual if known in vocabulary), None)


def _is_byte_level(spec: dict) -> bool:
  decoder = spec.get("decoder") or {}
  stages = decoder.get("decoders", [decoder])
  return any(stage.get("type") == "ByteLevel" for stage in stages)


def load(name: str, *, bos: str | None = None, eos: str | None = None) -> Tokenizer:
  """Returns the tokenizer called `byte`, or that of a `tokenizer.json` file.

  Raises:
    DataError: no such file, too large a file, or not a tokenizer.
  """
  if name == BYTE:
    return ByteTokenizer()
  path = pathlib.Path(name)
  if path.is_dir():
    path /= "tokenizer.json"
  if not path.is_file():
    raise errors.DataError(
      f"no tokenizer {name!r}: give 'byte', a tokenizer.json, or train:SIZE to train one."
    )
  if path.stat().st_size > MAX_TOKENIZER_BYTES:
    raise errors.DataError(
      f"{path} has {path.stat().st_size} bytes; a tokenizer.json has at most "
      f"{MAX_TOKENIZER_BYTES}."
    )
  try:
    text = path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise errors.DataError(f"{path} is not UTF-8, so no tokenizer.json.") from error
  return JsonTokenizer(text, bos=bos, eos=eos)


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
  """Returns a byte-level BPE tokenizer trained on the texts.

  Args:
    texts: the corpus, or a sample of it.
    vocab_size: number of ids, at least 258: the 256 bytes and the two document marks.

  Raises:
    DataError: `vocab_size` is too small.
  """
  if vocab_size < 258:
    raise errors.DataError(
      f"train:{vocab_size} is too small a vocabulary; 256 bytes and 2 marks need 258."
    )
  tokenizer = hf.Tokenizer(hf.models.BPE())
  tokenizer.pre_tokenizer = hf.pre_tokenizers.Sequence(
    [
      hf.pre_tokenizers.Split(hf.Regex(_SPLIT), behavior="isolated"),
      hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = hf.decoders.ByteLevel()
  trainer = hf.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
    initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  return JsonTokenizer(tokenizer.to_str())
