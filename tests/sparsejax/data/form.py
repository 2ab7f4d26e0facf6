"""What rows of small corpora look like."""

from sparsejax.data import corpus

FORM = corpus.RowFormat(
  sequence_length=8,
  vocab_size=320,
  seed=3,
  ignore_first_tokens=True,
  recall_pairs=2,
  recall_queries=1,
)
