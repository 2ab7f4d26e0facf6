"""What layers remember of earlier tokens while a model decodes, and how it grows by a token.

A method says what it needs by name (`SparseMethod.remembers`): pages of what its tokens have,
the last few of them, means over windows of them. Each kind knows its shape, how it is made of a
prompt that has been read (`prompt.Prompt`), and what a token adds.

Letters: L layers, B rows, T tokens, K key/value heads, D head size, N pages of a row, X tokens
of a page or last tokens, W windows.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

import pallas_kernels
from sparsejax.attention import pages
from sparsejax.attention.pages import Room

# Windows come in such numbers: matrix products would copy others to make them so.
_ALIGNED = 8


@dataclasses.dataclass(frozen=True)
class Kind:
  """Something to remember.

  Attributes:
    source: what tokens have that it is made of: `keys`, `values`, or what else a method adds.
    is_scalar: whether that is a float32 number per key head in place of a vector.
  """

  source: str
  is_scalar: bool = False

  def part(self, room: Room) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of what one token and key head has."""
    return ((), "float32") if self.is_scalar else ((room.head_dim,), room.dtype)

  def _spec(self, shape: tuple[int, ...], room: Room) -> jax.ShapeDtypeStruct:
    part, dtype = self.part(room)
    return jax.ShapeDtypeStruct((*shape, room.num_kv_heads, *part), dtype)


@dataclasses.dataclass(frozen=True)
class Pages(Kind):
  """What every token has, in pages: token t in page t // X. `pages.specs` says what is kept."""

  def fill(self, x_LBTK, lengths_B, room: Room) -> jax.Array:
    del lengths_B
    return pages.fill(x_LBTK, room)


@dataclasses.dataclass(frozen=True)
class Last(Kind):
  """What the last `size` tokens have, [B, size, K, ...]: token t at t % size.

  So a token is written where it stays; the others need not be moved for it.
  """

  size: int = 1

  def spec(self, room: Room) -> jax.ShapeDtypeStruct:
    """For one layer."""
    return self._spec((room.batch, self.size), room)

  def fill(self, x_LBTK, lengths_B, room: Room) -> jax.Array:
    del room
    last_B1, place_1X = lengths_B[:, None] - 1, jnp.arange(self.size)[None]
    # Of rows that are shorter, what stands in place of tokens before the first is never read.
    number_BX = jnp.maximum(last_B1 - (last_B1 - place_1X) % self.size, 0)
    return x_LBTK[:, jnp.arange(len(lengths_B))[:, None], number_BX]

  def mean_of_newest(self, count: int, x_BXK: jax.Array, position_B: jax.Array) -> jax.Array:
    """The mean over that many of the newest tokens, float32, in no order."""
    x_BXK = x_BXK.astype(jnp.float32)
    if count < self.size:
      age_BX = (position_B[:, None] - jnp.arange(self.size)[None]) % self.size
      is_new_BXK = (age_BX < count).reshape(*age_BX.shape, *[1] * (x_BXK.ndim - 2))
      x_BXK = jnp.where(is_new_BXK, x_BXK, 0)
    return x_BXK.sum(1) / count

  def in_order(self, x_BXK: jax.Array, position_B: jax.Array) -> jax.Array:
    """What the last tokens have, the one at a position at the end."""
    place_BX = (position_B[:, None] + 1 + jnp.arange(self.size)[None]) % self.size
    # By row, as it is divided over a mesh.
    return jax.vmap(lambda x_XK, place_X: x_XK[place_X])(x_BXK, place_BX)

  def placed(self, x_LBXK: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Tokens where they stay, of those in order, the last of each row at the end."""
    turn = jax.vmap(lambda x_LXK, n: jnp.roll(x_LXK, n, axis=1), in_axes=(1, 0), out_axes=1)
    return turn(x_LBXK, lengths_B % self.size)


@dataclasses.dataclass(frozen=True)
class Windows(Kind):
  """One for every window of `pooling` that is complete, kept as [B, K, W, ...].

  Those of a key head are side by side, as products with queries read them: a loop over layers
  would turn all of them around before it, and back behind it.

  Attributes:
    pooling: windows.
    last: the name of the `Last` whose mean it is; None where the method makes it otherwise,
      from `source`, which then has windows in place of tokens.
  """

  pooling: pallas_kernels.Pooling | None = None
  last: str | None = None

  def spec(self, room: Room) -> jax.ShapeDtypeStruct:
    """For one layer."""
    num_windows = -(-self.pooling.num_windows(room.length) // _ALIGNED) * _ALIGNED
    part, dtype = self.part(room)
    return jax.ShapeDtypeStruct((room.batch, room.num_kv_heads, num_windows, *part), dtype)

  def fill(self, x_LBTK, lengths_B, room: Room) -> jax.Array:
    del lengths_B
    means = x_LBTK
    if self.last is not None:
      means = jax.vmap(lambda x: pallas_kernels.mean_windows(x, None, self.pooling))(x_LBTK)
    spec = self.spec(room)
    missing = spec.shape[2] - means.shape[2]
    means = jnp.pad(means, [(0, 0), (0, 0), (0, missing)] + [(0, 0)] * (means.ndim - 3))
    return means.swapaxes(2, 3).astype(spec.dtype)


# What every method needs.
KEYS_AND_VALUES = dict(k=Pages("keys"), v=Pages("values"))


@flax.struct.dataclass
class Past:
  """What one layer remembers, among what all of its stack do.

  Attributes:
    arrays: by name; of pages see `pages.specs`, of the rest [L, B, ...].
    layer: whose turn it is.
    position_B: of the token at hand, in each row.
    step: of decoding, larger with every one.
    kinds: what is remembered, by name.
    room: of the cache.
    token: what the token at hand has for pages, by name [B, K, ...], once it was added.
  """

  arrays: dict[str, jax.Array]
  layer: jax.Array
  position_B: jax.Array
  step: jax.Array
  kinds: dict[str, Kind] = flax.struct.field(pytree_node=False)
  room: Room = flax.struct.field(pytree_node=False)
  token: dict[str, jax.Array] = flax.struct.field(default_factory=dict)

  def of_layer(self, name: str) -> jax.Array:
    """[B, ...]; windows are [B, W, K, ...], and of last tokens the one added is at the end."""
    x_B, kind = self._array_of_layer(name), self.kinds[name]
    if isinstance(kind, Last):
      return kind.in_order(x_B, self.position_B)
    return x_B.swapaxes(1, 2) if isinstance(kind, Windows) else x_B

  def _array_of_layer(self, name: str) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(self.arrays[name], self.layer, keepdims=False)

  def add(self, **token: jax.Array) -> "Past":
    """With what the token has, [B, K, ...] by source, and the means that it completes.

    Pages have it once they are read.
    """
    past = self.replace(
      token={
        name: token[kind.source] for name, kind in self.kinds.items() if isinstance(kind, Pages)
      }
    )
    for name, kind in self.kinds.items():
      if isinstance(kind, Last):
        past = past._write_last(name, kind, token[kind.source])
    for name, kind in self.kinds.items():
      if isinstance(kind, Windows) and kind.last is not None:
        mean_BK = self.kinds[kind.last].mean_of_newest(
          kind.pooling.size, past._array_of_layer(kind.last), self.position_B
        )
        past = past.add_window(name, mean_BK)
    return past

  def add_window(self, name: str, x_BK: jax.Array) -> "Past":
    """With a window in the rows in which the token at hand completes one."""
    array, pooling = self.arrays[name], self.kinds[name].pooling
    since = self.position_B + 1 - pooling.size
    is_complete = (since >= 0) & (since % pooling.stride == 0)
    # Beyond the end nothing is written.
    number_B = jnp.where(is_complete, since // pooling.stride, array.shape[3])
    row_B1, head_1K = jnp.arange(len(number_B))[:, None], jnp.arange(array.shape[2])[None]
    place = self.layer, row_B1, head_1K, number_B[:, None]
    array = array.at[place].set(x_BK.astype(array.dtype), mode="drop")
    return self._with(name, array)

  def _write_last(self, name: str, kind: Last, x_BK: jax.Array) -> "Past":
    array = self.arrays[name]
    # By row, as it is divided over a mesh.
    write = jax.vmap(
      lambda x_LXK, x_K, place: x_LXK.at[self.layer, place].set(x_K), (1, 0, 0), out_axes=1
    )
    return self._with(name, write(array, x_BK.astype(array.dtype), self.position_B % kind.size))

  def _with(self, name: str, array: jax.Array) -> "Past":
    return self.replace(arrays=self.arrays | {name: array})

  def read(
    self, q_BHD: jax.Array, pages_BKM: jax.Array, *, window: int | None = None
  ) -> tuple[jax.Array, "Past"]:
    """Attention [B, H, D] to the tokens of some pages, up to the one at hand.

    Biases of keys are added to the scores where they are remembered.

    Args:
      q_BHD: queries.
      pages_BKM: numbers of pages, that of the token at hand among them; -1 for none.
      window: tokens that are read at most, the one at hand included; None is all.
    """
    out_BHD, arrays = pages.attend(
      self.arrays,
      pages.Place(self.room, self.layer, self.position_B, self.step),
      self.token,
      q_BHD,
      pages_BKM,
      window=window,
      has_bias="bias" in self.kinds,
    )
    # A second list in the same step was wanted later.
    return out_BHD, self.replace(arrays=arrays, step=self.step + 1)

  def read_window(self, q_BHD: jax.Array, window: int) -> tuple[jax.Array, "Past"]:
    """Attention [B, H, D] to the last tokens, the one at hand among them."""
    size, heads = self.room.page_size, self.room.num_kv_heads
    own_B1 = (self.position_B // size)[:, None]
    # A row may be shorter than the window.
    number = min(num_pages_of_window(window, size), self.room.num_pages)
    pages_BM = own_B1 - jnp.arange(number)[None]
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
    room = self.room
    shape = room.batch, room.num_kv_heads, room.num_pages
    return jnp.broadcast_to(jnp.arange(room.num_pages), shape)


def num_pages_of_window(window: int, page_size: int) -> int:
  """Pages in which the last `window` tokens may lie: they begin anywhere in the first."""
  return -(-(window - 1) // page_size) + 1


@flax.struct.dataclass
class Cache:
  """What a model remembers of the tokens of every row.

  Attributes:
    lengths_B: tokens of each row.
    step: how many steps have been taken.
    arrays: for each place in the pattern of layers, by name.
    kinds: of the arrays.
    room: for how much there is room.
  """

  lengths_B: jax.Array
  step: jax.Array
  arrays: tuple[dict[str, jax.Array], ...]
  kinds: tuple[dict[str, Kind], ...] = flax.struct.field(pytree_node=False)
  room: Room = flax.struct.field(pytree_node=False)

  def pasts(self) -> tuple[Past, ...]:
    """For each place, what its layers know of the past but for the arrays."""
    return tuple(
      # No layer reads more than two lists in a step.
      Past({}, jnp.int32(0), self.lengths_B, 2 * self.step, kinds, self.room)
      for kinds in self.kinds
    )

  def after(self, arrays: tuple[dict[str, jax.Array], ...]) -> "Cache":
    """The cache with one token more in every row."""
    return self.replace(lengths_B=self.lengths_B + 1, step=self.step + 1, arrays=arrays)

  def with_row(self, row: jax.Array, other: "Cache") -> "Cache":
    """The cache with the first row of another in place of one of its own.

    Args:
      row: number of the row.
      other: a cache with as many pages in a row, all of them on the device.
    """
    arrays = []
    for ours, theirs, kinds in zip(self.arrays, other.arrays, self.kinds, strict=True):
      names = [name for name, kind in kinds.items() if isinstance(kind, Pages)]
      first = {name: theirs[name] for name in names}
      placed = pages.put_row(ours, first, other.room.batch, self.room, row)
      for name in kinds.keys() - set(names):
        placed[name] = jax.lax.dynamic_update_slice_in_dim(
          ours[name], theirs[name][:, :1], row, 1
        )
      arrays.append(placed)
    lengths_B = jax.lax.dynamic_update_slice(self.lengths_B, other.lengths_B[:1], (row,))
    return self.replace(lengths_B=lengths_B, arrays=tuple(arrays))
