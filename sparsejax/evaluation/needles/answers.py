"""What a model answers, and how much of it is right.

Letters: Q questions, T tokens.
"""

from collections.abc import Callable, Sequence
import re

import jax
import numpy as np

from sparsejax import model, scoring
from sparsejax.attention import method
from sparsejax.data import batch, rows, tokenizers
from sparsejax.decoding import generate as generation
from sparsejax.decoding import sampling
from sparsejax.evaluation.needles import questions as asked

# Called as `sparsejax.decoding.generate.generate` is.
type Generate = Callable[..., list[list[int]]]


def share_found(question: asked.Question, ids: Sequence[int], decode) -> float:
  """The share of the answers that a text gives, from 0 to 1; of one answer, 0 or 1.

  Of all that could be an answer, only as much counts as there are answers, the first of it: to
  list everything does not help. The order is free. Questions about ids are answered id by id.

  Args:
    question: that was asked.
    ids: what was written after it.
    decode: ids to text.
  """
  if not question.answers:
    n = len(question.continuation)
    given = np.resize(np.array([*ids, *[-1] * n]), n)
    return float((given == question.continuation).mean())
  given = re.findall(question.pattern, decode(ids))[: len(question.answers)]
  return len(set(given) & set(question.answers)) / len(question.answers)


def greedy(
  questions: Sequence[asked.Question],
  transformer: model.Transformer,
  params: dict,
  *,
  stream: method.Stream,
  mesh: jax.sharding.Mesh,
  tokenizer: tokenizers.Tokenizer,
  num_rows: int,
  generate: Generate = generation.generate,
) -> np.ndarray:
  """Scores what the model writes, the likeliest id at a time, [Q].

  Args:
    questions: of any kinds.
    transformer, params: the model.
    stream: `full` or `sparse`.
    mesh: where the parameters are.
    tokenizer: of the questions' text.
    num_rows: questions at once.
    generate: continues prompts.
  """
  scores_Q = np.zeros(len(questions))
  is_text_Q = np.array([bool(question.answers) for question in questions])
  stop_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
  # Ids that are no text are written without regard to the tokenizer.
  for is_text, own in ((True, (tokenizer.vocab_size, stop_ids)), (False, (None, ()))):
    chosen = np.flatnonzero(is_text_Q == is_text)
    if not len(chosen):
      continue
    room = [num_new_tokens(questions[q]) for q in chosen]
    texts = generate(
      transformer,
      params,
      [questions[q].prompt.tolist() for q in chosen],
      max_new_tokens=max(room),
      stream=stream,
      mesh=mesh,
      sampling=sampling.Sampling(temperature=0),
      num_ids=own[0],
      stop_ids=own[1],
      rows=num_rows,
    )
    for q, text, most in zip(chosen, texts, room, strict=True):
      # Whatever else is asked at the same time.
      scores_Q[q] = share_found(questions[q], text[:most], tokenizer.decode)
  return scores_Q


def num_new_tokens(question: asked.Question) -> int:
  """Ids that a model may write: for several answers, which it may list in its own way, more."""
  return len(question.continuation) * (2 if len(question.answers) > 1 else 1)


def forced(
  questions: Sequence[asked.Question],
  transformer: model.Transformer,
  params: dict,
  *,
  stream: method.Stream,
  mesh: jax.sharding.Mesh,
  chunk_length: int,
  num_rows: int,
) -> scoring.RowScores:
  """How likely the right continuations are, each id after the right ones before it.

  Args:
    questions: all of one length.
    transformer, params: the model.
    stream: `full` or `sparse`.
    mesh: where the parameters are.
    chunk_length: see `losses.next_token`.
    num_rows: questions at once; as many as divide among the devices, if it does not.

  Returns:
    `scoring.RowScores` of the continuations' ids alone, each [Q].
  """
  return scoring.score_rows(
    scoring.make_score(transformer, stream, chunk_length),
    params,
    [_row(question, transformer.options.block_size) for question in questions],
    bytes_per_id=None,
    batch_size=-(-num_rows // mesh.size) * mesh.size,
    num_rows=len(questions),
    mesh=mesh,
  )


def _row(question: asked.Question, block_size: int) -> batch.Batch:
  """A question and its continuation, as one document, padded to whole blocks."""
  tokens = np.concatenate([question.prompt, question.continuation])
  opens = np.arange(len(tokens)) == 0
  length = -(-(len(tokens) - 1) // block_size) * block_size
  row = rows.make_row(tokens, opens, length, ignore_first_tokens=False)
  weights = np.zeros(length, np.float32)
  # The first target is the second token.
  weights[len(question.prompt) - 1 : len(tokens) - 1] = 1.0
  return row._replace(weights=weights)
