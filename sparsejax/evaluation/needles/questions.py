"""Questions of an exact number of tokens, with needles at given depths of a haystack.

A question is a function of the seed, its kind, its length, its depth and its number alone. At
another depth it is the same question with its needle elsewhere, so that depths compare.

Texts are put together from pieces that are encoded each on its own and divide at line breaks:
any number of tokens can be met, with any tokenizer. Letters: T tokens of a question.
"""

from collections.abc import Iterable
import dataclasses
import functools
import itertools

import numpy as np

from sparsejax import errors
from sparsejax.data import tokenizers
from sparsejax.evaluation.needles import haystacks, kinds

# Tokens that a needle may lie before its depth, to follow a whole sentence.
MOST_BEFORE = 64
_MOST_DRAWS = 100
_ENDS = (".", "!", "?", "\n")


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
  """A prompt, and what should follow it; together as many tokens as were asked for.

  Attributes:
    kind: of the question.
    prompt: int32 [T - len(continuation)].
    continuation: ids of the answers as a model should write them, int32.
    answers: strings, the share of which that is found is the score; () where the score is
      the share of the continuation's ids.
    pattern: a regular expression of all that could be an answer.
    needles: first id of every needle in the prompt, and the one after its last; what is asked
      for at the depth comes first.
    depths: of the needles: how much of the haystack is before each, from 0 to 1.
  """

  kind: str
  prompt: np.ndarray
  continuation: np.ndarray
  answers: tuple[str, ...]
  pattern: str
  needles: tuple[tuple[int, int], ...]
  depths: tuple[float, ...]


def generator(seed: int, kind: str, length: int, number: int) -> np.random.Generator:
  """The randomness of one question, which no other shares."""
  return np.random.default_rng((seed, length, number, *kind.encode()))


class Maker:
  """Makes questions about text for one tokenizer."""

  def __init__(self, tokenizer: tokenizers.Tokenizer, haystack: haystacks.Haystack):
    self._tokenizer, self._haystack = tokenizer, haystack
    self._ends_sentence = functools.cache(
      lambda i: tokenizer.decode([i]).rstrip(" ").endswith(_ENDS)
    )

  def make(self, kind: str, *, length: int, depth: int, seed: int, number: int) -> Question:
    """Returns the question `number` of a kind.

    Args:
      kind: of `kinds.KINDS`.
      length: T.
      depth: of what is asked for, in percent of the haystack.
      seed: of everything.
      number: of the question.

    Raises:
      ConfigError: T is too small for it.
      DataError: the haystack has whatever is drawn as an answer.
    """
    rng = generator(seed, kind, length, number)
    for _ in range(_MOST_DRAWS):
      story = kinds.KINDS[kind](rng, depth / 100)
      question = self._fit(kind, story, rng, length)
      if question is not None:
        return question
    raise errors.DataError(
      f"{_MOST_DRAWS} draws of answers for a {kind} question of {length} tokens were all in "
      "the haystack already; take another --haystack or shorter --lengths."
    )

  def _fit(self, kind: str, story: kinds.Story, rng, length: int) -> Question | None:
    """Fills up with hay; None if that has an answer in it."""
    encode = self._tokenizer.encode
    opening = [] if self._tokenizer.bos_id is None else [self._tokenizer.bos_id]
    needles = [encode(f"\n{text}\n") for text in story.needles]
    asked = encode(f"\n{story.question}")
    whole = encode(f"\n{story.question}{story.continuation}")
    # A token may reach from the question into the answer; it is the model's to write.
    shared = _num_shared(asked, whole)
    asked, continuation = whole[:shared], whole[shared:]
    others = len(opening) + sum(map(len, needles)) + len(whole)
    if others > length:
      raise errors.ConfigError(
        f"--lengths={length} is too short for a {kind} question, which has {others} tokens "
        f"of this tokenizer before any haystack; take at least {2 * others}, or leave it out "
        "of --needle_kinds."
      )
    hay = self._haystack(rng, length - others)
    text = self._tokenizer.decode(hay)
    if any(secret in text for secret in story.secrets):
      return None
    wanted = (self._after_sentence(hay, round(depth * len(hay))) for depth in story.depths)
    prompt, spans, places = hide(hay, needles, wanted)
    start = len(opening)
    return Question(
      kind=kind,
      prompt=np.concatenate([opening, prompt, asked]).astype(np.int32),
      continuation=np.array(continuation, np.int32),
      answers=story.answers,
      pattern=story.pattern,
      needles=tuple((start + a, start + b) for a, b in spans),
      depths=tuple(place / max(1, len(hay)) for place in places),
    )

  def _after_sentence(self, hay: np.ndarray, place: int) -> int:
    """The nearest place before that follows a sentence, if it is near enough."""
    if place == len(hay):
      return place
    for before in range(place, max(0, place - MOST_BEFORE), -1):
      if self._ends_sentence(int(hay[before - 1])):
        return before
    return 0 if place <= MOST_BEFORE else place


def _num_shared(first: list[int], second: list[int]) -> int:
  """Ids that two lists begin with."""
  pairs = zip(first, second, strict=False)
  return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def hide(
  hay: np.ndarray, needles: list, places: Iterable[int]
) -> tuple[np.ndarray, list[tuple[int, int]], list[int]]:
  """Puts needles into hay.

  Args:
    hay: ids.
    needles: ids of each.
    places: for each, how many ids of the hay are before it. At one place they keep their order.

  Returns:
    All ids; for each needle its first and the one after its last; the places.
  """
  places = list(places)
  pieces, spans, at, used = [], [(0, 0)] * len(needles), 0, 0
  for i in sorted(range(len(needles)), key=places.__getitem__):
    pieces += [hay[used : places[i]], needles[i]]
    at += places[i] - used
    spans[i] = at, at + len(needles[i])
    at, used = spans[i][1], places[i]
  pieces.append(hay[used:])
  return np.concatenate(pieces).astype(np.int32), spans, places
