"""Validation during training: the same rows under full and under sparse inference."""

import pathlib

import numpy as np

from sparsejax import scoring
from sparsejax.data import corpus as corpora

STREAMS = ("full", "sparse")


class Validator:
  """Scores the validation rows of every source, under both modes of inference."""

  def __init__(self, transformer, corpus: corpora.Corpus, mesh, *, batch_size: int,
               num_batches: int, chunk_length: int):  # fmt: skip
    """Prepares the scoring functions; nothing is compiled yet.

    Args:
      transformer: the model.
      corpus: its sources with a validation split are used.
      mesh: where parameters are.
      batch_size: rows scored at once.
      num_batches: of each source; 0 takes all rows.
      chunk_length: of the loss.
    """
    self._sources = [source for source in corpus.sources if source.validation]
    self._mesh = mesh
    self._batch_size = batch_size
    self._num_batches = num_batches
    self._scores = {
      stream: scoring.make_score(transformer, stream, chunk_length) for stream in STREAMS
    }

  def __bool__(self) -> bool:
    return bool(self._sources)

  def run(self, params) -> dict[str, float]:
    """Returns losses by source and mode, and over all sources.

    `eval/full/loss` and `eval/sparse/loss` are means per token in nats; `eval/gap` is their
    difference, paired on the same rows. With several sources each also has its own. Text
    adds `bpb`, bits per byte.
    """
    values = {}
    by_stream = {stream: [] for stream in STREAMS}
    for source in self._sources:
      for stream in STREAMS:
        scores = scoring.score_rows(
          self._scores[stream],
          params,
          source.validation,
          bytes_per_id=source.bytes_per_id,
          batch_size=self._batch_size,
          num_rows=self._num_batches * self._batch_size or len(source.validation),
          mesh=self._mesh,
        )
        by_stream[stream].append(scores)
        if len(self._sources) > 1:
          values |= _named(f"eval/{pathlib.Path(source.name).name}/{stream}", scores)
    for stream, parts in by_stream.items():
      joined = scoring.RowScores(*(np.concatenate(f) for f in zip(*parts, strict=True)))
      values |= _named(f"eval/{stream}", joined)
    values["eval/gap"] = values["eval/sparse/loss"] - values["eval/full/loss"]
    return values


def _named(prefix: str, scores: scoring.RowScores) -> dict[str, float]:
  summary = scoring.summarize(scores)
  named = {f"{prefix}/loss": summary.loss, f"{prefix}/accuracy": summary.accuracy}
  if summary.bits_per_byte is not None:
    named[f"{prefix}/bpb"] = summary.bits_per_byte
  return named


def line(step: int, values: dict[str, float]) -> str:
  """One line for people."""
  text = (
    f"eval step {step}: loss full {values['eval/full/loss']:.4f} sparse "
    f"{values['eval/sparse/loss']:.4f} (gap {values['eval/gap']:+.4f})"
  )
  if "eval/full/bpb" in values:
    text += f", bits/byte {values['eval/full/bpb']:.3f} {values['eval/sparse/bpb']:.3f}"
  return text
