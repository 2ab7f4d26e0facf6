"""One page after another in plain XLA, between any memories.

In host memory XLA has slices, and updates of slices, alone: it would turn a gather into work
for the processor, and a scatter ends the process (openxla/xla#34565). There is no branch
either, for which a GPU would wait for the host: every entry moves a page. Slices begin at the
first or the last page where there is no such page.
"""

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels.fetch_pages import places


def fetch_pages(stores, slots, pages_R, rows_R):
  """Where an entry means nothing, a slot keeps what it has."""
  exist_R = places.exist(pages_R, rows_R, stores, slots)

  def step(r, slots):
    loaded = [_to_device(_page(store, pages_R[r])) for store in stores]
    return tuple(
      _update(slot, jnp.where(exist_R[r], page, _page(slot, rows_R[r])), rows_R[r])
      for slot, page in zip(slots, loaded, strict=True)
    )

  return lax.fori_loop(0, rows_R.size, step, slots)


def write_pages(stores, slots, pages_R, rows_R):
  """Where an entry means nothing, it writes once more what the first other one writes.

  Where none means anything, all of them write to one page what is in it. That one page of
  every store is read first. Entries that wrote back their own page's content would read one
  each; a page of the store set aside for them would be one that callers must know of.
  """
  exist_R = places.exist(pages_R, rows_R, stores, slots)
  is_any, first = exist_R.any(), exist_R.argmax()
  pages_R = jnp.where(exist_R, pages_R, pages_R[first])
  rows_R = jnp.where(exist_R, rows_R, rows_R[first])
  kept = [_to_device(_page(store, pages_R[first])) for store in stores]

  def step(r, stores):
    pages = [
      jnp.where(is_any, _page(slot, rows_R[r]), keep)
      for slot, keep in zip(slots, kept, strict=True)
    ]
    return tuple(
      _update(store, jax.device_put(page, jax.typeof(store).memory_space), pages_R[r])
      for store, page in zip(stores, pages, strict=True)
    )

  return lax.fori_loop(0, rows_R.size, step, stores)


def _page(x, number):
  """[1, X, ...], in the memory that `x` is in."""
  start = (number, *[0] * (x.ndim - 1))
  return lax.dynamic_slice(x, start, (1, *x.shape[1:]), allow_negative_indices=False)


def _update(x, page, number):
  start = (number, *[0] * (x.ndim - 1))
  return lax.dynamic_update_slice(x, page, start, allow_negative_indices=False)


def _to_device(x):
  return jax.device_put(x, jax.memory.Space.Device)
