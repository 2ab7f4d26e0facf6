"""The cache of a model that decodes: how large it is, how a prompt fills it.

Letters: B rows, T tokens, E width, V vocabulary, L layers of a stack.
"""

from collections.abc import Mapping
import dataclasses
import math

import jax
import jax.numpy as jnp

from sparsejax import attention, errors, model
from sparsejax.attention import method, past
from sparsejax.attention.past import Cache


def for_decoding(transformer: model.Transformer) -> model.Transformer:
  """The same model with nothing in it that only training needs."""
  return transformer.clone(
    shape=dataclasses.replace(transformer.shape, remat="none"),
    # Every row is one document.
    options=dataclasses.replace(transformer.options, max_documents=1),
  )


def room(transformer: model.Transformer, *, batch: int, length: int) -> past.Room:
  """Room for so many tokens in each row, in pages of a block each."""
  shape, size = transformer.shape, transformer.options.block_size
  return past.Room(
    batch=batch,
    num_pages=-(-length // size),
    page_size=size,
    num_kv_heads=shape.num_key_value_heads,
    head_dim=shape.head_dim,
    dtype=shape.dtype,
  )


def spec(transformer: model.Transformer, stream: method.Stream, room: past.Room) -> Cache:
  """Shapes and dtypes of a cache, in place of arrays."""
  options = transformer.options
  period = len(options.pattern)
  stacked = transformer.shape.num_hidden_layers // period
  kinds = tuple(
    attention.remembers(options.of_layer(place), stream, room.length) for place in range(period)
  )

  def of_stack(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((stacked, *x.shape), x.dtype)

  arrays = tuple(
    {name: of_stack(kind.spec(room)) for name, kind in own.items()} for own in kinds
  )
  return Cache(jax.ShapeDtypeStruct((room.batch,), jnp.int32), arrays, kinds)


def num_bytes(spec: Cache) -> int:
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(spec))


def check_size(spec: Cache, limit: int | None) -> None:
  """Checks that a cache fits beside what a device already holds.

  Args:
    spec: shapes of the cache.
    limit: free bytes; None where that is not known.

  Raises:
    UserError: it does not.
  """
  needed = num_bytes(spec)
  if limit is not None and needed > limit:
    rows = spec.lengths_B.shape[0]
    raise errors.UserError(
      f"a cache of {rows} rows takes {needed / 2**30:.2f} GiB and the device has "
      f"{limit / 2**30:.2f} GiB free; decode {max(1, rows * limit // needed)} rows at a time, "
      "or shorter ones."
    )


def free_bytes() -> int | None:
  """What the first device has left; None where it does not say."""
  stats = jax.local_devices()[0].memory_stats()
  if not stats or "bytes_limit" not in stats:
    return None
  return stats["bytes_limit"] - stats["bytes_in_use"]


def prefill(
  transformer: model.Transformer,
  params: dict,
  ids_BT: jax.Array,
  lengths_B: jax.Array,
  *,
  stream: method.Stream,
  room: past.Room,
) -> tuple[jax.Array, Cache]:
  """Runs prompts through the model as training does, and remembers them.

  Rows of fewer than `InfllmV2Options.dense_length` tokens are read whole where T is less.

  Args:
    transformer: as `for_decoding` returns it.
    params: its parameters.
    ids_BT: prompts from the left; behind a row's length, anything.
    lengths_B: tokens of each, at least 1 and at most T.
    stream: `full` or `sparse`.
    room: for at least T tokens a row.

  Returns:
    Logits of the next token of each row [B, V], float32, and the cache.
  """
  positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
  output, shown = transformer.apply(
    {"params": params},
    ids_BT,
    positions_BT,
    jnp.ones_like(ids_BT),
    stream=stream,
    mutable=["past"],
  )
  kinds = spec(transformer, stream, room).kinds
  layers = shown["past"]["layers"]
  arrays = tuple(
    _filled(own, layers if len(kinds) == 1 else layers[str(place)], lengths_B, room)
    for place, own in enumerate(kinds)
  )
  last_B1E = jnp.take_along_axis(output.hidden_BTE, (lengths_B - 1)[:, None, None], axis=1)
  return model.logits(params, last_B1E)[:, 0], Cache(lengths_B, arrays, kinds)


def _filled(kinds: dict[str, past.Kind], shown: Mapping, lengths_B, room: past.Room):
  return {
    name: kind.fill(past.find(shown, kind.source), lengths_B, room)
    for name, kind in kinds.items()
  }


def step(
  transformer: model.Transformer,
  params: dict,
  cache: Cache,
  ids_B: jax.Array,
  *,
  stream: method.Stream,
) -> tuple[jax.Array, Cache]:
  """Takes one token of every row; logits of the next one [B, V], float32, and the cache.

  A row that is full stays as it is, and its logits mean nothing.

  Args:
    transformer, params: see `prefill`.
    cache: of the tokens before; give it up to the step (`jax.jit(..., donate_argnums=)`).
    ids_B: the tokens.
    stream: the cache's.
  """
  output = transformer.apply(
    {"params": params},
    ids_B[:, None],
    cache.lengths_B[:, None],
    jnp.ones_like(ids_B)[:, None],
    stream=stream,
    cache=cache,
  )
  return model.logits(params, output.hidden_BTE)[:, 0], output.cache
