"""What layers know of prompts while these are read in chunks, and the cache it becomes.

What a method remembers of tokens while it decodes (`past.Kind`) is made of what tokens have.
Of a prompt, layers keep the latter: of every token where pages or means of windows are made of
it, one for each window where the method makes those itself, else of the last few. So they need
no array that is as long as the prompt but these. Every chunk is a whole number of pages, and
begins at the same place in all rows.

Letters: L layers, B rows, T tokens of a chunk, S tokens that there is room for, K key/value
heads, D head size, W windows, Z last tokens.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from sparsejax import sharding
from sparsejax.attention import past as pasts
from sparsejax.attention.pages import Room
from sparsejax.attention.past import Cache

type Kinds = dict[str, pasts.Kind]


@flax.struct.dataclass
class Chunk:
  """What one layer knows of prompts up to a chunk, among what all of its stack do.

  Attributes:
    arrays: by what tokens have, [L, B, ...] each (see `Prompt.arrays`).
    layer: whose turn it is.
    offset: tokens before the chunk, in every row.
    lengths_B: of the prompts, whole.
    kinds: what of it is remembered, by name.
    room: of the cache.
    capacity: S, whole chunks.
  """

  arrays: dict[str, jax.Array]
  layer: jax.Array
  offset: jax.Array
  lengths_B: jax.Array
  kinds: Kinds = flax.struct.field(pytree_node=False)
  room: Room = flax.struct.field(pytree_node=False)
  capacity: int = flax.struct.field(pytree_node=False)

  @property
  def length(self) -> int:
    """Tokens that a row may come to have: by this, rules of selection are made."""
    return min(self.capacity, self.room.length)

  def of_layer(self, source: str) -> jax.Array:
    """What tokens have, [B, S, K, ...]; behind the chunk, anything finite."""
    return jax.lax.dynamic_index_in_dim(self.arrays[source], self.layer, keepdims=False)

  def windows(self, source: str) -> jax.Array:
    """What the method has made of windows, [B, W, K, ...], all that S tokens complete."""
    return self.of_layer(source)[:, _num_missing(self.kinds, source) :]

  def since_last(self, source: str, x_BTK: jax.Array) -> jax.Array:
    """The last tokens before the chunk and the chunk itself, [B, Z + T, K, ...].

    Where there are fewer before it, zeros come first. To be asked before `add`.
    """
    return jnp.concatenate([self.of_layer(source).astype(x_BTK.dtype), x_BTK], axis=1)

  def from_first(self, source: str, x_BTK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same without those zeros, and where the chunk begins in it.

    As many zeros stand at the end, unless the chunk is all there is.
    """
    if x_BTK.shape[1] == self.capacity:
      return x_BTK, jnp.int32(0)
    joined = self.since_last(source, x_BTK)
    size = joined.shape[1] - x_BTK.shape[1]
    num_before = jnp.minimum(self.offset, size)
    padded = jnp.pad(joined, [(0, 0), (0, size)] + [(0, 0)] * (joined.ndim - 2))
    cut = jax.lax.dynamic_slice_in_dim(padded, size - num_before, joined.shape[1], axis=1)
    return cut, num_before

  def add(self, **chunk: jax.Array) -> "Chunk":
    """With what the tokens of the chunk have, [B, T, K, ...] by source."""
    after = dict(self.arrays)
    for source in self.arrays.keys() & chunk.keys():
      x_BTK = chunk[source].astype(after[source].dtype)
      if _keeps_all(self.kinds, source):
        after[source] = self._write(source, x_BTK, self.offset)
      else:
        after[source] = self._write(source, self._last(source, x_BTK), 0)
    return self.replace(arrays=after)

  def add_windows(self, source: str, x_BWK: jax.Array, stride: int) -> "Chunk":
    """With one for each window that ends in the chunk, [B, T / stride, K, ...].

    Those that would begin before the first token may be anything.
    """
    array = self._write(source, x_BWK, self.offset // stride)
    return self.replace(arrays=self.arrays | {source: array})

  def by_length(
    self, limit: int, short: Callable[[], jax.Array], long: Callable[[], jax.Array]
  ) -> jax.Array:
    """`short()` in rows of fewer than so many tokens and `long()` in the others, [B, T, ...].

    Each runs only where there is such a row that the chunk is part of.
    """
    if self.length < limit:
      return short()
    if limit <= 1:
      return long()
    is_short_B, is_read_B = self.lengths_B < limit, self.lengths_B > self.offset

    def run(function, where_B):
      out = jax.eval_shape(function)
      return jax.lax.cond(where_B.any(), function, lambda: jnp.zeros(out.shape, out.dtype))

    outs = run(short, is_short_B & is_read_B), run(long, ~is_short_B & is_read_B)
    return jnp.where(is_short_B.reshape(-1, *[1] * (outs[0].ndim - 1)), *outs)

  def _last(self, source: str, x_BTK: jax.Array) -> jax.Array:
    """The last tokens with the chunk; of rows that have ended, those they had."""
    joined, t = self.since_last(source, x_BTK), x_BTK.shape[1]
    num_new_B = jnp.clip(self.lengths_B - self.offset, 0, t)
    size = joined.shape[1] - t
    cut = jax.vmap(lambda x, begin: jax.lax.dynamic_slice_in_dim(x, begin, size))
    return cut(joined, num_new_B)

  def _write(self, source: str, x_BT: jax.Array, begin) -> jax.Array:
    array = self.arrays[source]
    at = (self.layer, 0, begin) + (0,) * (array.ndim - 3)
    return jax.lax.dynamic_update_slice(array, x_BT[None].astype(array.dtype), at)


@flax.struct.dataclass
class Prompt:
  """What a model knows of prompts that it is reading; it runs with this for a cache.

  Attributes:
    offset: tokens before the chunk at hand, in every row.
    lengths_B: of the prompts, whole.
    arrays: for each place in the pattern of layers, by what tokens have: of all of them
      [L, B, S, K, ...], of the last ones [L, B, Z, K, ...], or windows [L, B, W, K, ...], the
      first of which begin before the first token.
    kinds: what of it is remembered, of each place.
    room: of the cache.
    capacity: S.
  """

  offset: jax.Array
  lengths_B: jax.Array
  arrays: tuple[dict[str, jax.Array], ...]
  kinds: tuple[Kinds, ...] = flax.struct.field(pytree_node=False)
  room: Room = flax.struct.field(pytree_node=False)
  capacity: int = flax.struct.field(pytree_node=False)

  def pasts(self) -> tuple[Chunk, ...]:
    """For each place, what its layers know but for the arrays."""
    return tuple(
      Chunk({}, jnp.int32(0), self.offset, self.lengths_B, kinds, self.room, self.capacity)
      for kinds in self.kinds
    )

  def after(self, arrays: tuple[dict[str, jax.Array], ...]) -> "Prompt":
    """The prompt with what the layers have added."""
    return self.replace(arrays=arrays)

  def as_cache(self) -> Cache:
    """The cache of the prompts that were read."""
    arrays = tuple(
      {name: self._filled(name, own, kinds) for name in kinds}
      for own, kinds in zip(self.arrays, self.kinds, strict=True)
    )
    return Cache(self.lengths_B, jnp.int32(0), arrays, self.kinds, self.room)

  def _filled(self, name: str, own: dict[str, jax.Array], kinds: Kinds) -> jax.Array:
    kind, room = kinds[name], self.room
    x_LBTK = own[kind.source]
    if _keeps_all(kinds, kind.source):
      return kind.fill(x_LBTK[:, :, : room.length], self.lengths_B, room)
    if isinstance(kind, pasts.Last):
      return kind.placed(x_LBTK[:, :, -kind.size :], self.lengths_B)
    windows = x_LBTK[:, :, _num_missing(kinds, kind.source) :]
    num_windows = kind.pooling.num_windows(room.length)
    return kind.fill(windows[:, :, :num_windows], self.lengths_B, room)


def empty(
  kinds: tuple[Kinds, ...], lengths_B: jax.Array, room: Room, *, layers: int, capacity: int
) -> Prompt:
  """A prompt of which nothing has been read.

  Args:
    kinds: what is remembered, for each place in the pattern of layers.
    lengths_B: tokens of each row.
    room: of the cache, all of which is on the device.
    layers: of a stack, L.
    capacity: S, a multiple of the page size.
  """

  def zeros(kind: pasts.Kind, own: Kinds) -> jax.Array:
    (part, dtype), length = kind.part(room), _extent(kind.source, own, capacity)
    shape = layers, room.batch, length, room.num_kv_heads, *part
    axes = None, "batch", None, "kv_heads", *[None] * len(part)
    return sharding.constrain(jnp.zeros(shape, dtype), *axes)

  arrays = tuple({kind.source: zeros(kind, own) for kind in own.values()} for own in kinds)
  return Prompt(jnp.int32(0), lengths_B, arrays, kinds, room, capacity)


def _made_of(kinds: Kinds, source: str) -> list[pasts.Kind]:
  return [kind for kind in kinds.values() if kind.source == source]


def _keeps_all(kinds: Kinds, source: str) -> bool:
  """Whether something is made of what every token has."""
  return any(
    isinstance(kind, pasts.Pages) or (isinstance(kind, pasts.Windows) and kind.last is not None)
    for kind in _made_of(kinds, source)
  )


def _extent(source: str, kinds: Kinds, capacity: int) -> int:
  if _keeps_all(kinds, source):
    return capacity
  of_windows = [x for x in _made_of(kinds, source) if isinstance(x, pasts.Windows)]
  if of_windows:
    return capacity // of_windows[0].pooling.stride
  return max(kind.size for kind in _made_of(kinds, source))


def _num_missing(kinds: Kinds, source: str) -> int:
  """Windows before the first complete one that end at a stride of the row."""
  pooling = _made_of(kinds, source)[0].pooling
  return pooling.size // pooling.stride - 1
