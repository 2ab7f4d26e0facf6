"""Long rows of held-out text, each read as one document."""

import itertools

import numpy as np

from sparsejax import errors
from sparsejax.evaluation import subject as subjects


def rows(subject: subjects.Subject, num_rows: int, length: int) -> np.ndarray:
  """Different rows, int32 [B, T], of the first source with a validation split.

  Its rows are put end to end, whatever documents they have.

  Raises:
    DataError: no source has such a split, or it has too few tokens.
  """
  splits = [source.validation for source in subject.corpus.sources if source.validation]
  if not splits:
    raise errors.DataError(
      "none of the data has a validation split; prepare it with --validation_fraction above 0."
    )
  split = splits[0]
  each = len(split[0].inputs)
  needed = -(-num_rows * length // each)
  if needed > len(split):
    raise errors.DataError(
      f"{num_rows} rows of {length} tokens are more than the {len(split) * each} tokens of the "
      "validation split; take fewer or shorter ones, or prepare more text for it."
    )
  ids = np.concatenate([row.inputs for row in itertools.islice(iter(split), needed)])
  return ids[: num_rows * length].reshape(num_rows, length).astype(np.int32)
