"""What is hidden and asked for, as text: the kinds of questions of RULER (arXiv:2404.06654).

Wordings are short, so that a question of every kind fits in 256 bytes, and end where a base
model goes on with the answer.
"""

from collections.abc import Callable
import dataclasses

import numpy as np

from sparsejax.evaluation.needles import words

_NUM_KEYS = 4  # one asked for and three beside it, or all of them
_NUM_VALUES = 4
_NUM_CHAINS, _NUM_VARIABLES = 2, 4
_CONSONANTS = np.array(list("BCDFGHJKLMNPQRSTVWXZ"))
NUMBERS = r"\d+"
VARIABLES = r"\b(?!VAR\b)[A-Z]+\b"


@dataclasses.dataclass(frozen=True)
class Story:
  """A question before it is made as long as it shall be.

  Attributes:
    needles: sentences to hide.
    depths: where, from 0 to 1 of the haystack. Needles at one place keep their order.
    question: what follows the haystack.
    answers: strings, all of which are right.
    pattern: a regular expression of all that could be an answer.
    secrets: strings that the haystack must not contain.
  """

  needles: tuple[str, ...]
  depths: tuple[float, ...]
  question: str
  answers: tuple[str, ...]
  pattern: str
  secrets: tuple[str, ...]

  @property
  def continuation(self) -> str:
    """What a model should write after the question.

    With the full stop, without which a longer number or name would begin alike.
    """
    return f" {', '.join(self.answers)}."


def single(rng: np.random.Generator, depth: float) -> Story:
  """One needle."""
  return _codes(rng, depth, num_keys=1, num_asked=1)


def multi_key(rng: np.random.Generator, depth: float) -> Story:
  """One needle among others like it, which lie at random depths."""
  return _codes(rng, depth, num_keys=_NUM_KEYS, num_asked=1)


def multi_query(rng: np.random.Generator, depth: float) -> Story:
  """Several needles, all asked for: the first at the depth, the others at random ones."""
  return _codes(rng, depth, num_keys=_NUM_KEYS, num_asked=_NUM_KEYS)


def multi_value(rng: np.random.Generator, depth: float) -> Story:
  """Several needles of one key, all asked for: the first drawn at the depth, as above."""
  key, values = rng.choice(words.KEYS), _numbers(rng, _NUM_VALUES)
  depths = (depth, *rng.random(_NUM_VALUES - 1))
  order = np.argsort(depths, kind="stable")
  return Story(
    needles=tuple(f"One code of {key} is {value}." for value in values),
    depths=depths,
    question=f"What are the codes of {key}? The codes of {key} are",
    # By depth: as a reader would list them.
    answers=tuple(values[i] for i in order),
    pattern=NUMBERS,
    secrets=(*values, f"code of {key}"),
  )


def variable_tracking(rng: np.random.Generator, depth: float) -> Story:
  """Chains of assignments, each variable set to the one before; one chain is asked for.

  That one begins at the depth, and goes on at random ones after it. The others, which are of
  other values, lie at random depths.
  """
  values = _numbers(rng, _NUM_CHAINS)
  names = _names(rng, _NUM_CHAINS * _NUM_VARIABLES).reshape(_NUM_CHAINS, _NUM_VARIABLES)
  needles, depths = [], []
  for number, (value, chain) in enumerate(zip(values, names, strict=True)):
    needles += [f"VAR {chain[0]} = {value}."]
    needles += [f"VAR {chain[i]} = {chain[i - 1]}." for i in range(1, len(chain))]
    first = rng.random() if number else depth
    later = first + (1 - first) * np.sort(rng.random(_NUM_VARIABLES - 1))
    depths += [first, *later]
  return Story(
    needles=tuple(needles),
    depths=tuple(depths),
    question=f"Which variables are {values[0]}? They are",
    answers=tuple(map(str, names[0])),
    pattern=VARIABLES,
    secrets=(*values, *map(str, names.ravel())),
  )


KINDS: dict[str, Callable[[np.random.Generator, float], Story]] = {
  "single": single,
  "multi_key": multi_key,
  "multi_value": multi_value,
  "multi_query": multi_query,
  "variable_tracking": variable_tracking,
}


def _codes(rng, depth: float, *, num_keys: int, num_asked: int) -> Story:
  keys = rng.choice(words.KEYS, num_keys, replace=False)
  values = _numbers(rng, num_keys)
  asked = keys[:num_asked]
  listed = " and ".join(filter(None, (", ".join(asked[:-1]), asked[-1])))
  # Of one, in the words of its needle; of several, names are not repeated.
  question = f"What is the code of {listed}? The code of {listed} is"
  if num_asked > 1:
    question = f"What are the codes of {listed}? The codes are"
  return Story(
    needles=tuple(f"The code of {k} is {v}." for k, v in zip(keys, values, strict=True)),
    depths=(depth, *rng.random(num_keys - 1)),
    question=question,
    answers=values[:num_asked],
    pattern=NUMBERS,
    secrets=(*values, *(f"code of {key}" for key in keys)),
  )


def _numbers(rng, count: int) -> tuple[str, ...]:
  """Different numbers of five digits."""
  return tuple(str(10_000 + i) for i in rng.choice(90_000, count, replace=False))


def _names(rng, count: int) -> np.ndarray:
  """Different names of three capitals, no words and not `VAR`."""
  places = rng.choice(len(_CONSONANTS) ** 3, count, replace=False)
  digits = np.stack(np.unravel_index(places, (len(_CONSONANTS),) * 3), axis=1)
  return np.array(["".join(letters) for letters in _CONSONANTS[digits]])
