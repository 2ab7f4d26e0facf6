"""Associative recall: pairs of ids, hidden in others, one of which is asked for by its first.

Multi-query associative recall (Zoology, arXiv:2312.04927), a query at a time, in the format
of the built-in data `recall` (`sparsejax.data.recall`): the same parts of the vocabulary are
noise, keys and values, whatever they mean to a tokenizer.
"""

import numpy as np

from sparsejax import errors
from sparsejax.evaluation.needles import haystacks, questions

KIND = "mqar"
NUM_PAIRS = 8
_NUM_REPEATED = 32  # ids of a repeated passage


class Maker:
  """Makes such questions for one vocabulary."""

  def __init__(self, vocab_size: int, haystack: str, corpus_ids: np.ndarray | None = None):
    """Divides the vocabulary.

    Args:
      vocab_size: ids of the model.
      haystack: of `haystacks.NAMES`: random ids, a few of them repeated, or text.
      corpus_ids: the text, where that is the haystack.

    Raises:
      ConfigError: the vocabulary is too small.
    """
    self._quarter = vocab_size // 4
    if self._quarter < NUM_PAIRS:
      raise errors.ConfigError(
        f"{KIND} questions need a vocabulary of at least {4 * NUM_PAIRS} ids, and the model "
        f"has {vocab_size}; leave {KIND} out of --needle_kinds."
      )
    self._vocab_size = vocab_size
    draw = dict(noise=self._noise, repeated=self._repeated)
    if corpus_ids is not None:
      draw["corpus"] = haystacks.passages(corpus_ids)
    self._haystack = draw[haystack]

  def make(self, *, length: int, depth: int, seed: int, number: int) -> questions.Question:
    """Returns a question; see `questions.Maker.make`."""
    rng = questions.generator(seed, KIND, length, number)
    hay = self._haystack(rng, length - 2 * NUM_PAIRS - 2)
    keys = self._draw(rng, hay, self._quarter, 2 * self._quarter)
    # Distinct, so that no other pair has the answer.
    values = self._draw(rng, hay, 2 * self._quarter, 4 * self._quarter)
    depths = (depth / 100, *rng.random(NUM_PAIRS - 1))
    prompt, spans, places = questions.hide(
      hay, list(np.stack([keys, values], axis=1)), (round(d * len(hay)) for d in depths)
    )
    return questions.Question(
      kind=KIND,
      prompt=np.append(prompt, keys[0]).astype(np.int32),
      continuation=values[:1].astype(np.int32),
      answers=(),
      pattern="",
      needles=tuple(spans),
      depths=tuple(place / len(hay) for place in places),
    )

  def _draw(self, rng, hay: np.ndarray, first: int, end: int) -> np.ndarray:
    free = np.setdiff1d(np.arange(first, end), hay)
    if len(free) < NUM_PAIRS:
      raise errors.DataError(
        f"a haystack of {len(hay)} ids leaves {len(free)} of {first} to {end - 1} for "
        f"{NUM_PAIRS} pairs of {KIND}; take --haystack=noise, or shorter --lengths."
      )
    return rng.choice(free, NUM_PAIRS, replace=False)

  def _noise(self, rng, count: int) -> np.ndarray:
    return rng.integers(self._quarter, size=count)

  def _repeated(self, rng, count: int) -> np.ndarray:
    return haystacks.tile(rng.integers(self._quarter, size=_NUM_REPEATED), count)
