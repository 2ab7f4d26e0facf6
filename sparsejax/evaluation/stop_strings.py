"""Texts that continue prompts until one of some strings appears in them."""

from collections.abc import Sequence

import jax

from sparsejax import errors, model
from sparsejax.attention import method
from sparsejax.data import tokenizers
from sparsejax.decoding import generate, sampling


def continue_until(
  transformer: model.Transformer,
  params: dict,
  prompts: Sequence[Sequence[int]],
  *,
  tokenizer: tokenizers.Tokenizer,
  stops: Sequence[str],
  max_new_tokens: int,
  max_length: int,
  stream: method.Stream,
  mesh: jax.sharding.Mesh,
  draw: sampling.Sampling,
  seed: int = 0,
  rows: int = 8,
  prefill_stream: method.Stream | None = None,
) -> list[str]:
  """Returns the text behind each prompt, up to the first stop string and without it.

  Args:
    transformer, params: the model.
    prompts: ids, at least one each; they lose ids on the left if there is no room for
      `max_new_tokens` behind them in `max_length`.
    tokenizer: whose end-of-text id ends a text as well.
    stops: strings that end a text; an empty one ends none.
    max_new_tokens: after which a text ends at the latest.
    max_length: tokens that the model was made for.
    stream: `full` or `sparse`.
    mesh: where the parameters are.
    draw: how ids are drawn.
    seed: of the draws.
    rows: prompts that are decoded together.
    prefill_stream: by which prompts are read; None is `stream`.

  Raises:
    ConfigError: `max_new_tokens` leaves no room for a prompt, or streams do not go together.
  """
  room = room_for_prompts(max_new_tokens, max_length)
  stops = [stop for stop in stops if stop]

  def is_over(ids: Sequence[int]) -> bool:
    text = tokenizer.decode(ids)
    return any(stop in text for stop in stops)

  texts = generate.generate(
    transformer,
    params,
    [list(prompt)[-room:] for prompt in prompts],
    max_new_tokens=max_new_tokens,
    stream=stream,
    mesh=mesh,
    sampling=draw,
    seed=seed,
    num_ids=min(tokenizer.vocab_size, transformer.shape.vocab_size),
    stop_ids=() if tokenizer.eos_id is None else (tokenizer.eos_id,),
    is_over=is_over if stops else None,
    rows=rows,
    prefill_stream=prefill_stream,
  )
  return [cut(tokenizer.decode(ids), stops) for ids in texts]


def room_for_prompts(max_new_tokens: int, max_length: int) -> int:
  """Tokens that a prompt may have before texts of `max_new_tokens`.

  Raises:
    ConfigError: none at all.
  """
  if max_new_tokens >= max_length:
    raise errors.ConfigError(
      f"texts of up to {max_new_tokens} tokens leave no room for a prompt in rows of "
      f"{max_length}; take longer rows with --sequence_length, or fewer tokens (max_gen_toks "
      "in the task's generation_kwargs)."
    )
  return max_length - max_new_tokens


def cut(text: str, stops: Sequence[str]) -> str:
  """A text up to the first of the strings that it has; an empty one cuts nothing."""
  for stop in stops:
    if stop:
      text = text.partition(stop)[0]
  return text
