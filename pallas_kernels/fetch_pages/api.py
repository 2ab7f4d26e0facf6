"""Moves pages between a store, in host memory or on the device, and slots on the device.

Shape letters, used in every file of this folder:
  P pages of a store   S slots   X positions of a page   D head size   R entries of a list

All of it only copies bytes: implementations agree in every bit.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from pallas_kernels import devices, dispatch
from pallas_kernels.fetch_pages import dma, mosaic_gpu, places, resident

type FetchImplementation = Literal["auto", "strict", "resident", "mosaic_gpu", "dma"]
type WriteImplementation = FetchImplementation

# What `auto` tries, in this order. On an H200 the kernel moves 50 GB/s between host and device,
# as fast as the bus; page by page `dma` moves about one.
AUTOMATIC = ("resident", "mosaic_gpu", "dma")


def fetch_pages(
  stores: tuple[Shaped[Array, "P X ..."], ...],
  slots: tuple[Shaped[Array, "S X ..."], ...],
  pages_R: Int[Array, "R"],
  rows_R: Int[Array, "R"],
  *,
  implementation: FetchImplementation | None = None,
) -> tuple[Shaped[Array, "S X ..."], ...]:
  """Returns the slots with `slots[rows_R[r]] = stores[pages_R[r]]` for every entry r.

  An entry whose page or row does not exist, -1 or any other, changes nothing. Other entries
  must have different rows. The caller donates the slots to have them updated in place.

  Reading pages in place from pinned host memory is what NOSI does with a Triton kernel
  (arXiv:2510.13602).

  Args:
    stores: keys [P, X, D], values [P, X, D], and whatever else pages have, such as a bias
      [P, X]; all in host memory (memory kind `pinned_host`) or all in device memory. JAX
      traces a `jax.ShapeDtypeStruct` as if it were in device memory, whatever its sharding
      says: lower programs with arrays.
    slots: for each store an array of its dtype and page shape, in device memory.
    pages_R, rows_R: int32.
    implementation: `resident` takes stores in device memory, `dma` any, one page after
      another in plain XLA. `mosaic_gpu` is one kernel that reads them where they are, on
      Hopper GPUs, for the dtypes and pages in its file; over a mesh, in
      `jax.shard_map(..., check_vma=False)` alone. None and `auto` take the first of
      `resident`, `mosaic_gpu` and `dma` that can run; `strict` is `mosaic_gpu` or an error.

  Raises:
    ValueError: arrays that do not fit together, or an implementation that cannot take them
      or run on this device.
    KeyError: no such implementation.
  """
  backend = choose_fetch_pages(
    stores, slots, pages_R, rows_R, implementation=implementation
  ).backend
  if not pages_R.size:
    return slots
  return _FETCH[backend](stores, slots, pages_R, rows_R)


def write_pages(
  stores: tuple[Shaped[Array, "P X ..."], ...],
  slots: tuple[Shaped[Array, "S X ..."], ...],
  pages_R: Int[Array, "R"],
  rows_R: Int[Array, "R"],
  *,
  implementation: WriteImplementation | None = None,
) -> tuple[Shaped[Array, "P X ..."], ...]:
  """Returns the stores with `stores[pages_R[r]] = slots[rows_R[r]]` for every entry r.

  An entry whose page or row does not exist, -1 or any other, changes nothing. Other entries
  must have different pages. The caller donates the stores to have them updated in place;
  they stay in the memory that they are in.

  Args:
    stores, slots, pages_R, rows_R: see `fetch_pages`.
    implementation: as of `fetch_pages`. `dma` writes one page for every entry, also where
      there is nothing to write: keep its lists short.

  Raises:
    ValueError: arrays that do not fit together, or an implementation that cannot take them.
    KeyError: no such implementation.
  """
  backend = choose_write_pages(
    stores, slots, pages_R, rows_R, implementation=implementation
  ).backend
  if not pages_R.size:
    return stores
  return _WRITE[backend](stores, slots, pages_R, rows_R)


def choose_fetch_pages(
  stores: tuple[Shaped[dispatch.Shaped, "P X ..."], ...],
  slots: tuple[Shaped[dispatch.Shaped, "S X ..."], ...],
  pages_R: Int[dispatch.Shaped, "R"],
  rows_R: Int[dispatch.Shaped, "R"],
  *,
  implementation: FetchImplementation | None = None,
) -> dispatch.Choice:
  """What `fetch_pages` runs for such arrays on the first device, and why.

  Takes the same arguments and raises the same errors; runs nothing, so that a
  `jax.ShapeDtypeStruct` will do for an array: its sharding says in which memory it is.
  """
  _check(stores, slots, pages_R, rows_R)
  return _choose("fetch_pages", stores, slots, implementation)


def choose_write_pages(
  stores: tuple[Shaped[dispatch.Shaped, "P X ..."], ...],
  slots: tuple[Shaped[dispatch.Shaped, "S X ..."], ...],
  pages_R: Int[dispatch.Shaped, "R"],
  rows_R: Int[dispatch.Shaped, "R"],
  *,
  implementation: WriteImplementation | None = None,
) -> dispatch.Choice:
  """What `write_pages` runs for such arrays, and why; see `choose_fetch_pages`."""
  _check(stores, slots, pages_R, rows_R)
  return _choose("write_pages", stores, slots, implementation)


def _choose(op, stores, slots, implementation) -> dispatch.Choice:
  candidates = {
    "resident": lambda: _why_not_resident(stores),
    "mosaic_gpu": lambda: (
      devices.why_not_hopper()
      or devices.why_not_divided((stores, slots))
      or mosaic_gpu.why_not(stores)
    ),
    "dma": dispatch.runs_anywhere,
  }
  return dispatch.choose(op, implementation, candidates, automatic=AUTOMATIC)


_FETCH = {
  "resident": resident.fetch_pages,
  "mosaic_gpu": mosaic_gpu.fetch_pages,
  "dma": dma.fetch_pages,
}
_WRITE = {
  "resident": resident.write_pages,
  "mosaic_gpu": mosaic_gpu.write_pages,
  "dma": dma.write_pages,
}


def _why_not_resident(stores) -> str | None:
  return "needs stores in device memory" if places.is_on_host(stores[0]) else None


def _check(stores, slots, pages_R, rows_R) -> None:
  if not stores or len(stores) != len(slots):
    raise ValueError(f"{len(stores)} stores and {len(slots)} arrays of slots; have as many")
  for store, slot in zip(stores, slots, strict=True):
    if store.shape[1:] != slot.shape[1:] or store.dtype != slot.dtype:
      raise ValueError(
        f"pages of {store.dtype.name}{list(store.shape[1:])} do not fit into slots of "
        f"{slot.dtype.name}{list(slot.shape[1:])}"
      )
  for name, arrays in (("stores", stores), ("slots", slots)):
    lengths = [x.shape[0] for x in arrays]
    if len(set(lengths)) > 1:
      raise ValueError(f"{name} must be equally long, got {lengths}")
  if any(map(places.is_on_host, slots)):
    raise ValueError("slots must be in device memory, got some in host memory")
  if len(set(map(places.is_on_host, stores))) > 1:
    raise ValueError("stores must all be in host memory or all in device memory, got both")
  for name, x_R in (("pages", pages_R), ("rows", rows_R)):
    if x_R.ndim != 1 or x_R.dtype != jnp.int32:
      raise ValueError(f"{name} must be int32 [R], got {x_R.dtype.name}{list(x_R.shape)}")
  if pages_R.shape != rows_R.shape:
    raise ValueError(f"{pages_R.size} pages for {rows_R.size} rows; have as many")
