"""The cache of a model that decodes: how large it is, and a step with it.

Letters: B rows, V vocabulary.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

import pallas_kernels
from sparsejax import attention, errors, model
from sparsejax.attention import method, pages, past
from sparsejax.attention.past import Cache
from sparsejax.decoding import pinned

OFFLOAD = ("auto", "never", "always")
# Pages that earlier tokens read, beside those that a token reads.
SPARE_SLOTS = 16


def for_decoding(transformer: model.Transformer) -> model.Transformer:
  """The same model with nothing in it that only training needs."""
  return transformer.clone(
    shape=dataclasses.replace(transformer.shape, remat="none"),
    # Every row is one document.
    options=dataclasses.replace(transformer.options, max_documents=1),
  )


# Of programs that take a step. Layers are a loop over stacked parameters; by these, products
# read a layer's matrices where they are, which by default are copied first.
COMPILER_OPTIONS = {
  "xla_gpu_enable_dynamic_slice_fusion": True,
  "xla_gpu_enable_triton_gemm": False,
}


@functools.partial(jax.jit, static_argnums=0)
def cast(dtype: str, params: dict) -> dict:
  """Parameters as matrix products take them, so that no step reads more bytes than it uses.

  Scales of norms and of eviction heads, which multiply in float32, stay as they are.
  """

  def of_leaf(path, x):
    return x if path[-1].key == "scale" else x.astype(dtype)

  return jax.tree.map_with_path(of_leaf, params)


def room(
  transformer: model.Transformer, *, batch: int, length: int, num_slots: int | None = None
) -> pages.Room:
  """Room for so many tokens in each row, in pages of a block each; see `pages.Room`."""
  shape, size = transformer.shape, transformer.options.block_size
  return pages.Room(
    batch=batch,
    num_pages=-(-length // size),
    page_size=size,
    num_kv_heads=shape.num_key_value_heads,
    head_dim=shape.head_dim,
    dtype=shape.dtype,
    num_slots=num_slots,
    kernels=transformer.options.kernels,
  )


def place(
  transformer: model.Transformer,
  stream: method.Stream,
  room: pages.Room,
  *,
  offload: str,
  num_slots: int | None,
  limit: int | None,
  num_devices: int,
) -> tuple[pages.Room, pallas_kernels.Choice]:
  """Where pages lie: the room with or without slots, and why.

  Args:
    transformer: whose cache it is.
    stream: `full` or `sparse`.
    room: for all pages on the device.
    offload: `always` and `never` put pages in the host's memory or not; `auto` does where
      `num_slots` is given, or where they do not fit on the device.
    num_slots: see `pages.Room`; None is what a token reads and `SPARE_SLOTS` more. A row has
      no more than it has pages.
    limit: free bytes of the device; None where that is not known.
    num_devices: of which only one alone has pages in the host's memory by itself.

  Raises:
    ConfigError: no such `offload`, or slots of pages that are on the device.
  """
  check_offload(offload, num_slots)
  needed = num_bytes(spec(transformer, stream, room))
  fits = limit is None or needed <= limit
  size = f"a cache of {in_words(needed)}"
  if offload == "never" or (offload == "auto" and num_slots is None and fits):
    reason = f"{size} fits there" if offload == "auto" else "offload=never"
    if offload == "auto" and limit is None:
      reason = f"{size}; how much fits there is not known"
    return room, pallas_kernels.Choice("pages", "device", reason)
  if offload == "auto" and num_slots is None and num_devices > 1:
    return room, pallas_kernels.Choice("pages", "device", "the host's memory is of one device")
  most = attention.most_pages(transformer.options, stream, room.length)
  slots = min(most + SPARE_SLOTS if num_slots is None else num_slots, room.num_pages)
  reason = f"{slots} slots of {room.num_pages} pages are on the device; "
  reason += f"{size} does not fit there" if num_slots is None and not fits else "asked for"
  return dataclasses.replace(room, num_slots=slots), pallas_kernels.Choice(
    "pages", "host", reason
  )


def spec(transformer: model.Transformer, stream: method.Stream, room: pages.Room) -> Cache:
  """Shapes and dtypes of a cache, in place of arrays."""
  options = transformer.options
  period = len(options.pattern)
  stacked = transformer.shape.num_hidden_layers // period
  kinds = tuple(
    attention.remembers(options.of_layer(place), stream, room.length) for place in range(period)
  )

  lengths_B = jax.ShapeDtypeStruct((room.batch,), jnp.int32)
  arrays = tuple(_spec_of_stack(own, room, stacked) for own in kinds)
  return Cache(lengths_B, jax.ShapeDtypeStruct((), jnp.int32), arrays, kinds, room)


def _spec_of_stack(kinds: dict[str, past.Kind], room: pages.Room, num_layers: int) -> dict:
  parts = {name: x.part(room) for name, x in kinds.items() if isinstance(x, past.Pages)}
  found = pages.specs(parts, room, num_layers)
  for name, kind in kinds.items():
    if name not in parts:
      spec = kind.spec(room)
      found[name] = jax.ShapeDtypeStruct((num_layers, *spec.shape), spec.dtype)
  return found


def num_bytes(spec: Cache, *, is_host: bool = False) -> int:
  """Bytes of a cache on the device, or of its pages in the host's memory."""
  return sum(_sizes(spec, is_host=is_host))


def _sizes(spec: Cache, *, is_host: bool) -> list[int]:
  """Bytes of each array, in the order in which `make` allocates them."""
  return [
    math.prod(x.shape) * x.dtype.itemsize
    for x in jax.tree.leaves(spec)
    if is_host == (x.sharding is not None)
  ]


def in_words(num_bytes: float) -> str:
  """In the largest unit of which there is one."""
  for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
    if num_bytes >= 2**power:
      return f"{num_bytes / 2**power:.2f} {unit}"
  return f"{num_bytes:.0f} bytes"


def make(spec: Cache) -> Cache:
  """An empty cache; outside of `jax.jit`. Pages in the host's memory hold anything.

  Raises:
    UserError: there is no memory for it, where nobody could say so before.
  """
  try:
    return _make(spec)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    rows = spec.lengths_B.shape[0]
    what, remedy = f"{rows} rows", "decode fewer rows at a time, or shorter ones"
    if rows == 1:
      what, remedy = "a row", "take a shorter one"
    raise errors.UserError(
      f"there is no memory for a cache of {what}, which takes {in_words(num_bytes(spec))} on "
      f"the device and {in_words(num_bytes(spec, is_host=True))} on the host; {remedy}. A "
      "row has room for a prompt and max_new_tokens behind it."
    ) from error


def _make(spec: Cache) -> Cache:

  def empty(x: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(x.shape, x.dtype) if x.sharding is None else _allocate(x)

  cache = jax.tree.map(empty, spec)
  all_B = jnp.ones(spec.room.batch, bool)
  return cache.replace(arrays=tuple(pages.release(own, all_B) for own in cache.arrays))


def _allocate(x: jax.ShapeDtypeStruct) -> jax.Array:
  """An array in the host's memory, without one of its size on the device or anywhere else.

  XLA allocates what is written to in parts, and fills nothing of it.
  """

  @functools.partial(jax.jit, out_shardings=x.sharding)
  def make():
    whole, first = (
      jax.device_put(jnp.zeros((length, *x.shape[1:]), x.dtype), jax.memory.Space.Host)
      for length in (x.shape[0], 1)
    )
    return jax.lax.dynamic_update_slice_in_dim(whole, first, 0, axis=0)

  return make()


def check_offload(offload: str, num_slots: int | None) -> None:
  """Checks that there is such an `offload`, and no slots of pages that are on the device.

  Raises:
    ConfigError: there is not, or there are.
  """
  if offload not in OFFLOAD:
    raise errors.ConfigError(errors.one_of("offload", str(offload), OFFLOAD))
  if offload == "never" and num_slots is not None:
    raise errors.ConfigError(
      f"num_slots={num_slots} is of pages in the host's memory, and offload='never' keeps them "
      "on the device; leave out either."
    )


def check_slots(
  transformer: model.Transformer,
  stream: method.Stream,
  room: pages.Room,
  mesh: jax.sharding.Mesh,
) -> None:
  """Checks that slots hold what a token reads, where pages lie in the host's memory.

  Raises:
    ConfigError: they are too few, or there are several devices.
  """
  if room.num_slots is None:
    return
  most = attention.most_pages(transformer.options, stream, room.length)
  if room.num_slots < most:
    raise errors.ConfigError(
      f"num_slots={room.num_slots} is less than the {most} pages of {room.page_size} tokens "
      f"that a token reads; take at least {most}, or keep all pages on the device."
    )
  if mesh.size > 1:
    raise errors.ConfigError(
      f"pages in the host's memory (offload='always', or num_slots) take one device and not "
      f"{mesh.size}; hide the others with CUDA_VISIBLE_DEVICES, or keep pages on the devices."
    )


def check_size(
  spec: Cache, limit: int | None, host_limit: int | None, *, beside: int = 0
) -> None:
  """Checks that a cache fits beside what a device already holds, and on the host.

  Args:
    spec: shapes of the cache.
    limit: free bytes of the device; None where that is not known.
    host_limit: likewise of pinned memory of the host.
    beside: bytes of the device that a prompt takes while it is read.

  Raises:
    UserError: it does not.
  """
  rows, needed = spec.lengths_B.shape[0], num_bytes(spec)
  if limit is not None and needed + beside > limit:
    fit = rows * max(0, limit - beside) // needed
    remedy = f"decode {fit} rows at a time, or shorter ones" if fit else "decode shorter rows"
    own = f"a cache of {rows} rows takes {in_words(needed)}"
    if beside:
      own += f", a prompt that is read {in_words(beside)}"
    raise errors.UserError(
      f"{own}, and the device has {in_words(max(0, limit))} free; {remedy}."
    )
  pinned.check(_sizes(spec, is_host=True), rows, host_limit)


def free_bytes() -> int | None:
  """What the first device has left; None where it does not say."""
  stats = jax.local_devices()[0].memory_stats()
  if not stats or "bytes_limit" not in stats:
    return None
  return stats["bytes_limit"] - stats["bytes_in_use"]


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
    transformer, params: see `prefill.prefill`.
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
