"""What needles are hidden in: a repeated sentence, repeated random words, or held-out text."""

from collections.abc import Callable

import numpy as np

from sparsejax import errors
from sparsejax.data import corpus as corpora
from sparsejax.data import tokenizers
from sparsejax.evaluation.needles import words

NAMES = ("noise", "repeated", "corpus")

# RULER's filler (arXiv:2404.06654), which is that of passkey retrieval (arXiv:2305.16300).
NOISE = (
  "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)
_NUM_WORDS = 48  # of a repeated passage
# Enough for many rows that differ; more would only be read for nothing.
_MOST_CORPUS_TOKENS = 2**22

# Called with a generator and a number of ids; returns as many, int32.
type Haystack = Callable[[np.random.Generator, int], np.ndarray]


def noise(tokenizer: tokenizers.Tokenizer) -> Haystack:
  """One sentence after another, over and over: the same for every question."""
  unit = np.array(tokenizer.encode(NOISE), np.int32)
  return lambda rng, count: tile(unit, count)


def repeated(tokenizer: tokenizers.Tokenizer) -> Haystack:
  """Sentences of random words, over and over: others for every question."""

  def draw(rng, count):
    chosen = rng.choice(words.FILLER, _NUM_WORDS, replace=False).reshape(-1, 8)
    text = " ".join(f"{' '.join(sentence).capitalize()}." for sentence in chosen)
    return tile(np.array(tokenizer.encode(f"{text}\n"), np.int32), count)

  return draw


def passages(ids: np.ndarray) -> Haystack:
  """Pieces of a longer text, from a random place of it for every question.

  Args:
    ids: of the text, at least as many as will be asked for at once.
  """

  def draw(rng, count):
    start = rng.integers(len(ids) - count + 1)
    return ids[start : start + count]

  return draw


def corpus_ids(corpus: corpora.Corpus, least: int) -> np.ndarray:
  """Held-out text of the first source that has any, int32, documents end to end.

  Ids that open and close documents are left out: a question is one document.

  Args:
    corpus: the checkpoint's.
    least: ids that are needed.

  Raises:
    DataError: no source has held-out text, or it is too short.
  """
  splits = [
    source.validation
    for source in corpus.sources
    if source.validation and source.tokenizer is not None
  ]
  if not splits:
    raise errors.DataError(
      "--haystack=corpus needs held-out text, and none of the data has a validation split of "
      "text; prepare it with --validation_fraction above 0, name other data with --sources, "
      "or take --haystack=noise."
    )
  tokenizer, pieces, found = corpus.tokenizer, [], 0
  marks = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
  for number in range(len(splits[0])):
    row = splits[0][number]
    # Segment 0 is padding.
    ids = row.inputs[(row.segments > 0) & ~np.isin(row.inputs, marks)]
    pieces.append(ids)
    found += len(ids)
    if found >= max(least, _MOST_CORPUS_TOKENS):
      break
  if found < least:
    raise errors.DataError(
      f"--haystack=corpus has {found} tokens of held-out text, fewer than the {least} of "
      "--lengths; take shorter ones, prepare more text, or take --haystack=noise."
    )
  return np.concatenate(pieces).astype(np.int32)


def tile(unit: np.ndarray, count: int) -> np.ndarray:
  """The last `count` ids of a unit repeated without end: what is cut is its beginning."""
  repeats = -(-count // len(unit))
  return np.tile(unit, repeats)[repeats * len(unit) - count :]
