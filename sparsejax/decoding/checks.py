"""What can be refused of a request before weights are touched, or a cache is made."""

from collections.abc import Iterable, Sequence
import operator

import jax
import numpy as np

from sparsejax import errors, model
from sparsejax.attention import method
from sparsejax.decoding import cache as caches
from sparsejax.decoding import prefill

# Keys of draws are made of 32 bits.
_MOST_SEED = 2**32 - 1


def check_settings(
  transformer: model.Transformer,
  *,
  stream: method.Stream,
  prefill_stream: method.Stream | None,
  mesh: jax.sharding.Mesh,
  seed: int,
  num_ids: int | None,
  rows: int,
  length: int,
  offload: str,
  num_slots: int | None,
  prefill_chunk: int | None,
) -> None:
  """Checks how prompts are to be continued; see `generate.generate` for the settings.

  Raises:
    ConfigError: a name that there is not, a number out of range, or settings that exclude
      each other.
  """
  options = transformer.options
  prefill.check_stream(options, stream, prefill_stream or stream)
  whole("rows", rows, least=1)
  whole("length", length, least=1)
  whole("seed", seed, least=0, most=_MOST_SEED)
  if num_ids is not None:
    whole("num_ids", num_ids, least=1, most=transformer.shape.vocab_size)
  if prefill_chunk is not None:
    prefill.chunk_size(options.block_size, whole("prefill_chunk", prefill_chunk))
  caches.check_offload(offload, num_slots)
  if num_slots is not None:
    slots = whole("num_slots", num_slots)
    room = caches.room(transformer, batch=rows, length=length, num_slots=slots)
    caches.check_slots(transformer, stream, room, mesh)


def check_prompts(
  prompts: Sequence[Sequence[int]], *, max_new_tokens: int, length: int | None, vocab_size: int
) -> int:
  """The length of the longest prompt.

  Raises:
    ConfigError: a number that makes no sense, or a prompt that does not fit in `length`.
    DataError: a prompt that is empty, is no list of ids, or has one the model does not know.
  """
  whole("max_new_tokens", max_new_tokens, least=1)
  if length is not None:
    whole("length", length, least=1)
  for number, prompt in enumerate(prompts):
    try:
      ids = np.asarray(prompt)
    except ValueError:  # numbers and lists side by side
      ids = np.asarray(None)
    if ids.shape == (0,):
      raise errors.DataError(f"prompt {number} is empty; begin it with one id at least.")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
      raise errors.DataError(
        f"prompt {number} is no list of ids, which are whole numbers: {str(prompt)[:40]!r}. "
        "Encode texts with the model's tokenizer; of a single prompt, give a list of one."
      )
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
      raise errors.DataError(
        f"prompt {number} has the id {wrong[0]}; the model knows 0 to {vocab_size - 1}. Encode "
        "it with the model's own tokenizer."
      )
    if length is not None and len(ids) + max_new_tokens > length:
      raise errors.ConfigError(
        f"prompt {number} has {len(ids)} ids and {max_new_tokens=}, together more than the "
        f"{length=} of a row; shorten either, or raise length."
      )
  return max(map(len, prompts), default=0)


def check_stop_ids(stop_ids: Iterable[int], vocab_size: int) -> frozenset[int]:
  """The ids that end a text.

  Raises:
    ConfigError: one that the model does not know, or that is no id at all.
  """
  if not isinstance(stop_ids, Iterable):
    raise errors.ConfigError(f"stop_ids={stop_ids!r} is no list of ids; give a list of one.")
  return frozenset(
    whole("an id of stop_ids", x, least=0, most=vocab_size - 1) for x in stop_ids
  )


def whole(name: str, value: int, *, least: int | None = None, most: int | None = None) -> int:
  """A whole number in a range, both ends of which are in it.

  Raises:
    ConfigError: it is none.
  """
  try:
    number = operator.index(value)
  except TypeError:
    raise errors.ConfigError(f"{name}={value!r} is not a whole number.") from None
  if least is not None and number < least:
    raise errors.ConfigError(f"{name}={number} must be at least {least}.")
  if most is not None and number > most:
    raise errors.ConfigError(f"{name}={number} must be at most {most}.")
  return number
