"""Where pages of keys and values lie while a model decodes, and attention to them.

Either all of them are on the device, or they lie in the host's memory and the device has slots
for some (NOSI, arXiv:2510.13602): pages that a token reads and that are not in a slot yet are
fetched into the slots that were wanted the longest ago. The page that tokens are added to is
always in a slot, and goes to the host when it is full. Both ways give the same bits.

Letters: L layers, B rows, K key/value heads, N pages of a row, C slots of a row, X tokens of a
page, D head size, M pages listed, R entries of lists of pages.
"""

from collections.abc import Mapping
import dataclasses
import math

import jax
import jax.numpy as jnp

import pallas_kernels

HOST = "pinned_host"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
  """How much there is room for.

  Attributes:
    batch: rows, B.
    num_pages, page_size: N and X.
    num_kv_heads, head_dim: K and D.
    dtype: of keys and values.
    num_slots: pages of a row and key head on the device, where the rest is on the host; None
      where all are on the device.
    kernels: `auto`, or `strict` where attention and what moves pages must run on GPU kernels;
      what chooses pages, and slots for them, is what can run either way.
  """

  batch: int
  num_pages: int
  page_size: int
  num_kv_heads: int
  head_dim: int
  dtype: str
  num_slots: int | None = None
  kernels: str = "auto"

  @property
  def length(self) -> int:
    """Tokens of a row."""
    return self.num_pages * self.page_size


@dataclasses.dataclass(frozen=True)
class Place:
  """The layer and the tokens at hand.

  Attributes:
    room: of the cache.
    layer: number in its stack.
    position_B: of the token in each row.
    step: larger at every read of pages, for the order in which slots were wanted.
  """

  room: Room
  layer: jax.Array
  position_B: jax.Array
  step: jax.Array

  def rows(self, number_BKM: jax.Array, per_row: int) -> jax.Array:
    """Numbers among those of all layers, rows and heads [B, K, M]; -1 for none."""
    room = self.room
    row_BK1 = (self.layer * room.batch + jnp.arange(room.batch))[:, None, None]
    row_BK1 = row_BK1 * room.num_kv_heads + jnp.arange(room.num_kv_heads)[None, :, None]
    is_there = (number_BKM >= 0) & (number_BKM < per_row)
    return jnp.where(is_there, row_BK1 * per_row + number_BKM, -1)

  @property
  def own_page(self) -> jax.Array:
    """Of the token at hand, [B, K, 1]."""
    page_B = self.position_B // self.room.page_size
    shape = self.room.batch, self.room.num_kv_heads, 1
    return jnp.broadcast_to(page_B[:, None, None], shape)


type Arrays = dict[str, jax.Array]
type Shapes = Mapping[str, tuple[tuple[int, ...], str]]


def specs(pages: Shapes, room: Room, num_layers: int) -> dict[str, jax.ShapeDtypeStruct]:
  """What is kept for pages.

  Args:
    pages: by name, the shape of a token's part and its dtype.
    room: of the cache.
    num_layers: L.
  """
  rows = num_layers, room.batch, room.num_kv_heads
  found = {}
  for name, (shape, dtype) in pages.items():
    whole = math.prod(rows) * room.num_pages, room.page_size, *shape
    if room.num_slots is None:
      found[name] = jax.ShapeDtypeStruct(whole, dtype)
      continue
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=HOST)
    found[name] = jax.ShapeDtypeStruct(whole, dtype, sharding=host)
    held = math.prod(rows) * room.num_slots, room.page_size, *shape
    found[f"slots/{name}"] = jax.ShapeDtypeStruct(held, dtype)
  if room.num_slots is not None:
    for name in ("slots/page", "slots/used"):
      found[name] = jax.ShapeDtypeStruct((*rows, room.num_slots), jnp.int32)
    for name in ("slots/hits", "slots/misses"):
      found[name] = jax.ShapeDtypeStruct(rows, jnp.int32)
  return found


def attend(
  arrays: Arrays,
  place: Place,
  token: Arrays,
  q_BHD: jax.Array,
  pages_BKM: jax.Array,
  *,
  window: int | None,
  has_bias: bool,
) -> tuple[jax.Array, Arrays]:
  """Adds a token to its page and reads pages up to it: the output [B, H, D], and the arrays.

  Args:
    arrays: of `specs`.
    place: see there.
    token: by name of pages, what the token has of each [B, K, ...].
    q_BHD: queries.
    pages_BKM: numbers of pages, that of the token among them; -1 for none.
    window: tokens that are read at most, the one at hand included; None is all.
    has_bias: whether the pages `bias` are added to the scores.
  """
  room, x = place.room, place.room.page_size
  if room.num_slots is None:
    held = arrays
    number_BKM = place.rows(pages_BKM, room.num_pages)
    own_R = place.rows(place.own_page, room.num_pages).reshape(-1)
  else:
    arrays, number_BKM, own_R = _fetch(arrays, place, list(token), pages_BKM)
    held = {name: arrays[f"slots/{name}"] for name in token}
  offset_R = jnp.repeat(place.position_B % x, room.num_kv_heads)
  # Rows that are full have no page for the token.
  own_R = jnp.where(own_R < 0, held["k"].shape[0], own_R)
  held = {
    name: held[name]
    .at[own_R, offset_R]
    .set(part.reshape(-1, *part.shape[2:]).astype(held[name].dtype), mode="drop")
    for name, part in token.items()
  }
  end_BKM = place.position_B[:, None, None] + 1 - pages_BKM * x
  begin_BKM = jnp.zeros_like(end_BKM) if window is None else end_BKM - window
  out_BHD, _ = pallas_kernels.decode_attention(
    q_BHD,
    held["k"],
    held["v"],
    number_BKM,
    begin_BKM=jnp.clip(begin_BKM, 0, x),
    end_BKM=jnp.clip(end_BKM, 0, x),
    key_bias_PX=held["bias"] if has_bias else None,
    implementation=room.kernels,
  )
  if room.num_slots is None:
    return out_BHD, arrays | held
  arrays = arrays | {f"slots/{name}": pages for name, pages in held.items()}
  return out_BHD, _write_back(arrays, place, list(token), own_R)


def _fetch(arrays: Arrays, place: Place, names: list[str], pages_BKM):
  """Brings pages into slots.

  Returns the arrays, the slot of every page that is listed, and that of the token's own page.
  """
  room = place.room
  held, lists = _slots(arrays), pages_BKM.shape
  # A page that begins with the token at hand is nowhere yet.
  is_new_B = place.position_B % room.page_size == 0
  plan = pallas_kernels.plan_slots(
    held,
    pages_BKM.reshape(-1, lists[-1]),
    place.own_page.reshape(-1),
    jnp.repeat(is_new_B, room.num_kv_heads),
    first_row=place.layer * room.batch * room.num_kv_heads,
    step=place.step,
    pages_per_row=room.num_pages,
  )
  fetched = pallas_kernels.fetch_pages(
    tuple(arrays[name] for name in names),
    tuple(arrays[f"slots/{name}"] for name in names),
    plan.load_QM.reshape(-1),
    plan.slot_QM.reshape(-1),
    implementation=room.kernels,
  )
  after = {f"slots/{name}": slots for name, slots in zip(names, fetched, strict=True)}
  return arrays | after | _named(plan.slots, arrays), plan.slot_QM.reshape(lists), plan.own_Q


def _slots(arrays: Arrays) -> pallas_kernels.Slots:
  """What is in the slots of all layers, rows and heads."""
  page_LBKC = arrays["slots/page"]
  return pallas_kernels.Slots(
    page_RC=page_LBKC.reshape(-1, page_LBKC.shape[-1]),
    used_RC=arrays["slots/used"].reshape(-1, page_LBKC.shape[-1]),
    hits_R=arrays["slots/hits"].reshape(-1),
    misses_R=arrays["slots/misses"].reshape(-1),
  )


def _named(slots: pallas_kernels.Slots, arrays: Arrays) -> Arrays:
  """Slots under the names, and in the shapes, that they have among arrays."""
  names = "slots/page", "slots/used", "slots/hits", "slots/misses"
  return {name: x.reshape(arrays[name].shape) for name, x in zip(names, slots, strict=True)}


def _write_back(arrays: Arrays, place: Place, names: list[str], own_R) -> Arrays:
  """Writes pages that the token at hand has filled to the host."""
  room = place.room
  is_full_B = place.position_B % room.page_size == room.page_size - 1
  page_BK1 = jnp.where(is_full_B[:, None, None], place.own_page, -1)
  stores = pallas_kernels.write_pages(
    tuple(arrays[name] for name in names),
    tuple(arrays[f"slots/{name}"] for name in names),
    place.rows(page_BK1, room.num_pages).reshape(-1),
    own_R,
    implementation=room.kernels,
  )
  return arrays | dict(zip(names, stores, strict=True))


def release(arrays: Arrays, rows_B: jax.Array) -> Arrays:
  """The same with nothing in the slots of some rows, where there are slots; bool [B]."""
  if "slots/page" not in arrays:
    return arrays
  num_layers, _, num_kv_heads, _ = arrays["slots/page"].shape
  is_free_R = jnp.tile(jnp.repeat(rows_B, num_kv_heads), num_layers)
  return arrays | _named(pallas_kernels.release_slots(_slots(arrays), is_free_R), arrays)


def fill(x_LBTK: jax.Array, room: Room) -> jax.Array:
  """Pages of what prompts have [L, B, T, K, ...]; on the device, whatever the room says."""
  missing = room.length - x_LBTK.shape[2]
  x_LBTK = jnp.pad(x_LBTK, [(0, 0), (0, 0), (0, missing)] + [(0, 0)] * (x_LBTK.ndim - 3))
  pages = room.num_pages, room.page_size
  x_LBNXK = x_LBTK.reshape(*x_LBTK.shape[:2], *pages, *x_LBTK.shape[3:])
  x_LBKNX = jnp.moveaxis(x_LBNXK, 4, 2)
  return x_LBKNX.reshape(-1, *x_LBKNX.shape[4:])


def put_row(arrays: Arrays, filled: Arrays, num_rows: int, room: Room, row) -> Arrays:
  """Pages with those of a prompt in place of a row of their own.

  Args:
    arrays: of `specs`.
    filled: by name, pages on the device, of rows of which the first is taken.
    num_rows: how many rows that are.
    room: of the arrays.
    row: which row to replace.
  """
  per_row = room.num_kv_heads * room.num_pages
  num_layers = arrays["k"].shape[0] // (room.batch * per_row)

  def put(layer, arrays):
    after = {}
    for name, source in filled.items():
      pages = jax.lax.dynamic_slice_in_dim(source, layer * num_rows * per_row, per_row)
      if room.num_slots is not None:
        pages = jax.device_put(pages, jax.memory.Space.Host)
      at = (layer * room.batch + row) * per_row
      after[name] = jax.lax.dynamic_update_slice_in_dim(arrays[name], pages, at, 0)
    return arrays | after

  arrays = jax.lax.fori_loop(0, num_layers, put, arrays)
  # Nothing of the row that was is in a slot any more.
  return release(arrays, jnp.arange(room.batch) == row)
