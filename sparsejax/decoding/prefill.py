"""Reads prompts into a cache, a chunk of their tokens at a time.

Letters: B rows, T tokens, C tokens of a chunk, E width, V vocabulary.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from sparsejax import attention, errors, model
from sparsejax.attention import method, pages, prompt
from sparsejax.attention.past import Cache
from sparsejax.decoding import cache as caches

# Tokens of a chunk: enough to keep a GPU busy with one row.
USUAL_CHUNK = 4096
# Of inference.
STREAMS = ("full", "sparse")


def chunk_size(block_size: int, asked: int | None = None) -> int:
  """Tokens of a chunk; where nothing is asked for, whole blocks near `USUAL_CHUNK`.

  Raises:
    ConfigError: what is asked for is not a number of whole blocks.
  """
  if asked is None:
    return max(1, USUAL_CHUNK // block_size) * block_size
  if asked < 1 or asked % block_size:
    near = max(1, round(asked / block_size)) * block_size
    raise errors.ConfigError(
      f"prefill_chunk={asked} is not a multiple of the {block_size} tokens of a block, from "
      f"{block_size} up; take {near}, or leave it out for "
      f"{chunk_size(block_size)}."
    )
  return asked


def check_stream(
  options: method.Options, stream: method.Stream, prefill_stream: method.Stream
) -> None:
  """Checks that prompts can be read by one stream and continued by another.

  Raises:
    ConfigError: there is no such stream, or what the one leaves is not what the other needs.
  """
  for name, given in (("stream", stream), ("prefill_stream", prefill_stream)):
    if given not in STREAMS:
      raise errors.ConfigError(errors.one_of(name, str(given), STREAMS))
  if prefill_stream == stream:
    return
  if prefill_stream != "full" or stream != "sparse":
    raise errors.ConfigError(
      f"prompts that are read {prefill_stream} are continued {prefill_stream}, not {stream}; "
      "read them full to continue them sparse, or both alike."
    )
  layers = [options.of_layer(place) for place in range(len(options.pattern))]
  if any(own.method == "full" and attention.sparse_name(own) == "nsa" for own in layers):
    raise errors.ConfigError(
      "attention.method='full' has no keys of NSA's branches, which attention.sparse_method="
      "'nsa' would read of a prompt; read it sparse, too, or continue it full."
    )


def num_bytes(
  transformer: model.Transformer, stream: method.Stream, room: pages.Room, chunk: int
) -> int:
  """Bytes that a device needs to read a row as long as there is room for, beside the cache.

  For what layers know of the prompt, and for the cache that it becomes; activations of a chunk
  are not counted, nor is a row divided.
  """
  one = dataclasses.replace(room, batch=1, num_slots=None)

  def arrays(lengths_B):
    size = min(chunk, one.length)
    read = _begin(transformer, stream, one, lengths_B, one.length, size)
    return read.arrays, read.as_cache().arrays

  shapes = jax.eval_shape(arrays, jax.ShapeDtypeStruct((1,), jnp.int32))
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def _begin(transformer, stream, room, lengths_B, length: int, chunk: int) -> prompt.Prompt:
  """Prompts of up to so many tokens, of which nothing has been read."""
  kinds = caches.spec(transformer, stream, room).kinds
  layers = transformer.shape.num_hidden_layers // len(kinds)
  capacity = -(-length // chunk) * chunk
  return prompt.empty(kinds, lengths_B, room, layers=layers, capacity=capacity)


def prefill(
  transformer: model.Transformer,
  params: dict,
  ids_BT: jax.Array,
  lengths_B: jax.Array,
  *,
  stream: method.Stream,
  room: pages.Room,
  chunk: int | None = None,
  prefill_stream: method.Stream | None = None,
) -> tuple[jax.Array, Cache]:
  """Reads prompts, and remembers them.

  What comes out is what training's forward pass gives of each row alone, whatever the rows
  beside it: rows of fewer than `InfllmV2Options.dense_length` tokens are read whole.
  Activations are those of a chunk. Chunks behind the longest row's end are not read, so that
  one program can serve all prompts of up to T tokens.

  Args:
    transformer: as `cache.for_decoding` returns it.
    params: its parameters.
    ids_BT: prompts from the left; behind a row's length, any ids.
    lengths_B: tokens of each, at least 1 and at most T.
    stream: of the cache, `full` or `sparse`.
    room: for at least as many tokens a row as the longest has.
    chunk: tokens that are read at a time, see `chunk_size`; shorter prompts are one chunk.
    prefill_stream: by which prompts are read; None is the cache's. `full` where that is
      `sparse` is the dense prefill that sparse decoding is often judged with (NOSA's tables
      have either, arXiv:2510.13602).

  Returns:
    Logits of the next token of each row [B, V], float32, and the cache, all of it on the
    device.

  Raises:
    ConfigError: a chunk that is no number of whole blocks, or see `check_stream`.
  """
  prefill_stream = prefill_stream or stream
  check_stream(transformer.options, stream, prefill_stream)
  block, t = transformer.options.block_size, ids_BT.shape[1]
  size = min(chunk_size(block, chunk), -(-t // block) * block)
  # Where pages will lie is no matter to what is read.
  room = dataclasses.replace(room, num_slots=None)
  read = _begin(transformer, stream, room, lengths_B, t, size)
  ids_BT = jnp.pad(ids_BT, [(0, 0), (0, read.capacity - t)])
  width, dtype = transformer.shape.hidden_size, transformer.shape.dtype

  def read_chunk(number, carry):
    read, last_BE = carry
    offset = number * size
    ids_BC = jax.lax.dynamic_slice_in_dim(ids_BT, offset, size, axis=1)
    positions_BC = jnp.broadcast_to(offset + jnp.arange(size)[None], ids_BC.shape)
    output = transformer.apply(
      {"params": params},
      ids_BC,
      positions_BC,
      jnp.ones_like(ids_BC),
      stream=prefill_stream,
      cache=read.replace(offset=offset),
    )
    # What a chunk leaves is overwritten by the next, until the row has ended.
    place_B11 = (lengths_B - 1 - offset)[:, None, None]
    found_B1E = jnp.take_along_axis(output.hidden_BTE, jnp.clip(place_B11, 0, size - 1), axis=1)
    last_BE = jnp.where(place_B11[:, 0] >= 0, found_B1E[:, 0], last_BE)
    return output.cache, last_BE

  begin = read, jnp.zeros((len(ids_BT), width), dtype)
  if read.capacity == size:
    read, last_BE = read_chunk(jnp.int32(0), begin)
  else:
    num_read = (lengths_B.max() + size - 1) // size
    read, last_BE = jax.lax.fori_loop(0, num_read, read_chunk, begin)
  return model.logits(params, last_BE[:, None])[:, 0], read.as_cache()
