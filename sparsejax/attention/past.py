"""What layers remember of earlier tokens while a model decodes, and how it grows by a token.

A method says what it needs by name (`SparseMethod.remembers`): pages of what its tokens have,
the last few of them, means over windows of them. Each kind knows its shape, how the training
path's forward pass fills it (`sparsejax.decoding.prefill`), and what a token adds.

Letters: L layers, B rows, T tokens, K key/value heads, D head size, N pages of a row, X tokens
of a page, W windows.
"""

from collections.abc import Mapping
import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

import pallas_kernels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
  """How much there is room for.

  Attributes:
    batch: rows, B.
    num_pages, page_size: N and X.
    num_kv_heads, head_dim: K and D.
    dtype: of keys and values.
  """

  batch: int
  num_pages: int
  page_size: int
  num_kv_heads: int
  head_dim: int
  dtype: str

  @property
  def length(self) -> int:
    """Tokens of a row."""
    return self.num_pages * self.page_size


@dataclasses.dataclass(frozen=True)
class Kind:
  """Something to remember.

  Attributes:
    source: what tokens have that it is made of: `keys`, `values`, or what else a method sows
      in the collection `past`.
    is_scalar: whether that is a float32 number per key head in place of a vector.
  """

  source: str
  is_scalar: bool = False

  def spec(self, room: Room) -> jax.ShapeDtypeStruct:
    """Shape and dtype for one layer."""
    shape = self._shape(room)
    if self.is_scalar:
      return jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.ShapeDtypeStruct((*shape, room.head_dim), room.dtype)


@dataclasses.dataclass(frozen=True)
class Pages(Kind):
  """What every token has, [B, K, N, X, ...]: token t in page t // X."""

  def _shape(self, room: Room) -> tuple[int, ...]:
    return room.batch, room.num_kv_heads, room.num_pages, room.page_size

  def fill(self, x_LBTK, lengths_B, room: Room) -> jax.Array:
    del lengths_B
    missing = room.length - x_LBTK.shape[2]
    x_LBTK = jnp.pad(x_LBTK, [(0, 0), (0, 0), (0, missing)] + [(0, 0)] * (x_LBTK.ndim - 3))
    pages = room.num_pages, room.page_size
    x_LBNXK = x_LBTK.reshape(*x_LBTK.shape[:2], *pages, *x_LBTK.shape[3:])
    return jnp.moveaxis(x_LBNXK, 4, 2)


@dataclasses.dataclass(frozen=True)
class Last(Kind):
  """What the last `size` tokens have, the newest at the end, [B, size, K, ...]."""

  size: int = 1

  def _shape(self, room: Room) -> tuple[int, ...]:
    return room.batch, self.size, room.num_kv_heads

  def fill(self, x_LBTK, lengths_B, room: Room) -> jax.Array:
    del room
    # Of rows that are shorter, what stands before the first token is never read.
    place = jnp.maximum(lengths_B[:, None] + jnp.arange(-self.size, 0)[None], 0)
    row_B1 = jnp.arange(len(lengths_B))[:, None]
    return x_LBTK[:, row_B1, place]


@dataclasses.dataclass(frozen=True)
class Windows(Kind):
  """One for every window of `pooling` that is complete, [B, W, K, ...].

  Attributes:
    pooling: windows.
    last: the name of the `Last` whose mean it is; None where the method makes it otherwise,
      from `source`, which then has windows in place of tokens.
  """

  pooling: pallas_kernels.Pooling | None = None
  last: str | None = None

  def _shape(self, room: Room) -> tuple[int, ...]:
    return room.batch, self.pooling.num_windows(room.length), room.num_kv_heads

  def fill(self, x_LBTK, lengths_B, room: Room) -> jax.Array:
    del lengths_B
    means = x_LBTK
    if self.last is not None:
      means = jax.vmap(lambda x: pallas_kernels.mean_windows(x, None, self.pooling))(x_LBTK)
    missing = self.pooling.num_windows(room.length) - means.shape[2]
    means = jnp.pad(means, [(0, 0), (0, 0), (0, missing)] + [(0, 0)] * (means.ndim - 3))
    return means.astype(self.spec(room).dtype)


# What every method needs.
KEYS_AND_VALUES = dict(k=Pages("keys"), v=Pages("values"))


@flax.struct.dataclass
class Past:
  """What one layer remembers, among what all of its stack do.

  Attributes:
    arrays: by name [L, B, ...].
    layer: whose turn it is.
    position_B: of the token at hand, in each row.
    kinds: of the arrays.
  """

  arrays: dict[str, jax.Array]
  layer: jax.Array
  position_B: jax.Array
  kinds: dict[str, Kind] = flax.struct.field(pytree_node=False)

  @property
  def num_pages(self) -> int:
    """Pages that a row has room for."""
    return self.arrays["k"].shape[3]

  @property
  def length(self) -> int:
    """Tokens that a row has room for."""
    return self.num_pages * self.arrays["k"].shape[4]

  def of_layer(self, name: str) -> jax.Array:
    """[B, ...]"""
    return jax.lax.dynamic_index_in_dim(self.arrays[name], self.layer, keepdims=False)

  def add(self, **token: jax.Array) -> "Past":
    """With what the token has, [B, K, ...] by source, and the means that it completes."""
    past = self
    for name, kind in self.kinds.items():
      if isinstance(kind, Pages):
        past = past._add_to_pages(name, token[kind.source])
      elif isinstance(kind, Last):
        past = past._push(name, token[kind.source])
    for name, kind in self.kinds.items():
      if isinstance(kind, Windows) and kind.last is not None:
        last = past.of_layer(kind.last)[:, -kind.pooling.size :]
        mean = pallas_kernels.mean_windows(last, None, kind.pooling)[:, 0]
        past = past.add_window(name, mean)
    return past

  def add_window(self, name: str, x_BK: jax.Array) -> "Past":
    """With a window in the rows in which the token at hand completes one."""
    array, pooling = self.arrays[name], self.kinds[name].pooling
    since = self.position_B + 1 - pooling.size
    is_complete = (since >= 0) & (since % pooling.stride == 0)
    # Beyond the end nothing is written.
    number = jnp.where(is_complete, since // pooling.stride, array.shape[2])
    row = jnp.arange(len(number))
    array = array.at[self.layer, row, number].set(x_BK.astype(array.dtype), mode="drop")
    return self._with(name, array)

  def _add_to_pages(self, name: str, x_BK: jax.Array) -> "Past":
    array = self.arrays[name]
    size, row = array.shape[4], jnp.arange(len(self.position_B))
    page, place = self.position_B // size, self.position_B % size
    array = array.at[self.layer, row, :, page, place].set(x_BK.astype(array.dtype))
    return self._with(name, array)

  def _push(self, name: str, x_BK: jax.Array) -> "Past":
    last = jnp.concatenate([self.of_layer(name)[:, 1:], x_BK[:, None]], axis=1)
    array = jax.lax.dynamic_update_index_in_dim(
      self.arrays[name], last.astype(self.arrays[name].dtype), self.layer, 0
    )
    return self._with(name, array)

  def _with(self, name: str, array: jax.Array) -> "Past":
    return self.replace(arrays=self.arrays | {name: array})

  def read(
    self,
    q_BHD: jax.Array,
    pages_BKM: jax.Array,
    *,
    window: int | None = None,
    bias: str | None = None,
    implementation: str = "auto",
  ) -> jax.Array:
    """Attention [B, H, D] to the tokens of some pages, up to the one at hand.

    Args:
      q_BHD: queries.
      pages_BKM: numbers of pages, -1 for none.
      window: tokens that are read at most, the one at hand included; None is all.
      bias: name of what is added to the scores.
      implementation: of `pallas_kernels.decode_attention`.
    """
    k, v = self.arrays["k"], self.arrays["v"]
    _, b, heads, n, x, d = k.shape
    row_BK1 = (self.layer * b + jnp.arange(b))[:, None, None] * heads
    row_BK1 = row_BK1 + jnp.arange(heads)[None, :, None]
    place_BKM = jnp.where(pages_BKM < 0, -1, row_BK1 * n + pages_BKM)
    # Tokens of the page before the one after that at hand.
    end_BKM = self.position_B[:, None, None] + 1 - pages_BKM * x
    begin_BKM = jnp.zeros_like(end_BKM) if window is None else end_BKM - window
    out_BHD, _ = pallas_kernels.decode_attention(
      q_BHD,
      k.reshape(-1, x, d),
      v.reshape(-1, x, d),
      place_BKM,
      begin_BKM=jnp.clip(begin_BKM, 0, x),
      end_BKM=jnp.clip(end_BKM, 0, x),
      key_bias_PX=None if bias is None else self.arrays[bias].reshape(-1, x),
      implementation=implementation,
    )
    return out_BHD

  def read_window(self, q_BHD: jax.Array, window: int) -> jax.Array:
    """Attention [B, H, D] to the last tokens, the one at hand among them."""
    size, heads = self.arrays["k"].shape[4], self.arrays["k"].shape[2]
    own_B1 = (self.position_B // size)[:, None]
    # The window may begin at any token of its first page.
    pages_BM = own_B1 - jnp.arange(-(-(window - 1) // size) + 1)[None]
    pages_BKM = jnp.repeat(pages_BM[:, None], heads, axis=1)
    return self.read(q_BHD, pages_BKM, window=window)

  def read_last(self, q_BHD: jax.Array, keys: str, values: str) -> jax.Array:
    """Attention [B, H, D] to the last tokens as two `Last` have them, by their names."""
    k_BXKD, v_BXKD = self.of_layer(keys), self.of_layer(values)
    age_X = jnp.arange(k_BXKD.shape[1])[::-1]
    is_there_BX = age_X[None] <= self.position_B[:, None]
    v_BXKD = jnp.where(is_there_BX[..., None, None], v_BXKD, 0)
    return jax.nn.dot_product_attention(
      q_BHD[:, None], k_BXKD, v_BXKD, mask=is_there_BX[:, None, None]
    )[:, 0]

  def all_pages(self) -> jax.Array:
    """The numbers of all pages, [B, K, N]."""
    _, b, k, n = self.arrays["k"].shape[:4]
    return jnp.broadcast_to(jnp.arange(n), (b, k, n))


@flax.struct.dataclass
class Cache:
  """What a model remembers of the tokens of every row.

  Attributes:
    lengths_B: tokens of each row.
    arrays: for each place in the pattern of layers, by name [L, B, ...].
    kinds: of the arrays.
  """

  lengths_B: jax.Array
  arrays: tuple[dict[str, jax.Array], ...]
  kinds: tuple[dict[str, Kind], ...] = flax.struct.field(pytree_node=False)

  def pasts(self) -> tuple[Past, ...]:
    """For each place, what its layers know of the past but for the arrays."""
    return tuple(Past({}, jnp.int32(0), self.lengths_B, kinds) for kinds in self.kinds)

  def after(self, arrays: tuple[dict[str, jax.Array], ...]) -> "Cache":
    """The cache with one token more in every row."""
    return self.replace(lengths_B=self.lengths_B + 1, arrays=arrays)

  def with_row(self, row: jax.Array, other: "Cache") -> "Cache":
    """The cache with the first row of another, of as much room, in place of one of its own."""

    def put(ours, theirs, axis):
      theirs = jax.lax.slice_in_dim(theirs, 0, 1, axis=axis)
      return jax.lax.dynamic_update_slice_in_dim(ours, theirs, row, axis)

    return self.replace(
      lengths_B=put(self.lengths_B, other.lengths_B, 0),
      arrays=jax.tree.map(lambda a, b: put(a, b, 1), self.arrays, other.arrays),
    )


def find(shown: Mapping, name: str) -> jax.Array | None:
  """What was sown under a name, anywhere in a tree of modules; None if nothing was."""
  for key, value in shown.items():
    if key == name:
      return value[0]
    if isinstance(value, Mapping):
      found = find(value, name)
      if found is not None:
        return found
  return None
