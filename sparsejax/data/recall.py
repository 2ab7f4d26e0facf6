"""Associative recall: key-value pairs hidden in noise, asked for at the end of the row.

A row reads `noise k1 v1 noise noise k2 v2 noise ... k2 v2 k1 v1`: pairs at random depths of
a haystack of noise, then queries. Only the values after the queried keys count in the loss.
It is the multi-query recall task of Zoology (arXiv:2312.04927) with needles spread over the
whole context, which is what block selection has to find.
"""

import numpy as np

from sparsejax import errors
from sparsejax.data import batch, rows

# Rows of one epoch; each is made when it is read.
NUM_ROWS = 2**20


class RecallRows:
  """A random-access sequence of recall examples; row `r` depends on `(seed, r)` alone.

  Attributes:
    max_documents: 1, a row is one document.
  """

  max_documents = 1

  def __init__(
    self,
    *,
    sequence_length: int,
    vocab_size: int,
    num_pairs: int,
    num_queries: int,
    seed: int,
  ):
    """Divides the vocabulary into noise, keys and values.

    Args:
      sequence_length: T.
      vocab_size: ids of the model; the tokenizer's meaning of them plays no part.
      num_pairs: pairs in the haystack.
      num_queries: of those, how many are asked for.
      seed: of everything.

    Raises:
      DataError: the row is too short, or the vocabulary too small, for so many pairs.
    """
    quarter = vocab_size // 4
    if num_pairs > quarter:
      raise errors.DataError(
        f"data.recall_pairs={num_pairs} needs as many distinct keys; a vocabulary of "
        f"{vocab_size} has {quarter}."
      )
    if not 1 <= num_queries <= num_pairs:
      raise errors.DataError(
        f"data.recall_queries={num_queries} must be from 1 to data.recall_pairs={num_pairs}."
      )
    needed = 2 * (num_pairs + num_queries)
    if sequence_length + 1 < needed:
      raise errors.DataError(
        f"data.sequence_length={sequence_length} is too short for {num_pairs} pairs and "
        f"{num_queries} queries; it must be at least {needed - 1}."
      )
    self._length = sequence_length
    self._keys = np.arange(quarter, 2 * quarter)
    self._values = np.arange(2 * quarter, 4 * quarter)
    self._num_noise = quarter
    self._num_pairs = num_pairs
    self._num_queries = num_queries
    self._seed = seed

  @property
  def num_tokens(self) -> int:
    return NUM_ROWS * self._length

  def __len__(self) -> int:
    return NUM_ROWS

  def __getitem__(self, row: int) -> batch.Batch:
    if not 0 <= row < NUM_ROWS:
      raise IndexError(row)
    rng = np.random.default_rng((self._seed, row))
    keys = rng.choice(self._keys, self._num_pairs, replace=False)
    values = rng.choice(self._values, self._num_pairs)
    num_hay = self._length + 1 - 2 * self._num_queries
    hay = rng.integers(self._num_noise, size=num_hay)
    # Slots of two tokens, so that pairs never overlap.
    places = 2 * rng.choice(num_hay // 2, self._num_pairs, replace=False)
    hay[places], hay[places + 1] = keys, values
    asked = rng.choice(self._num_pairs, self._num_queries, replace=False)
    questions = np.stack([keys[asked], values[asked]], axis=1).ravel()
    tokens = np.concatenate([hay, questions])
    example = rows.make_row(
      tokens, np.arange(len(tokens)) == 0, self._length, ignore_first_tokens=True
    )
    weights = np.zeros(self._length, np.float32)
    # The target of a queried key is its value.
    weights[num_hay::2] = 1.0
    return example._replace(weights=weights)
