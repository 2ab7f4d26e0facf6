"""Plain statistics of a corpus, to hold a model's loss against."""

import math

import numpy as np

from sparsejax.data import corpus


def unigram_loss(source: corpus.Source, vocab_size: int, *, max_rows: int = 2048) -> float:
  """Nats per validation token of the best model that ignores all context.

  That model knows the frequency of every id in the training split. Rows are taken evenly
  from each split, up to `max_rows`; ids never seen in training count as seen once.
  NaN where no token counts.
  """
  known = _count(source.train, vocab_size, max_rows) + 1
  seen = _count(source.validation or source.train, vocab_size, max_rows)
  log_share = np.log(known / known.sum())
  return float(-(seen * log_share).sum() / (seen.sum() or math.nan))


def _count(rows: corpus.Rows, vocab_size: int, max_rows: int) -> np.ndarray:
  counts = np.zeros(vocab_size, np.int64)
  step = max(1, math.ceil(len(rows) / max_rows))
  for row in range(0, len(rows), step):
    example = rows[row]
    counts += np.bincount(example.targets[example.weights > 0], minlength=vocab_size)
  return counts
