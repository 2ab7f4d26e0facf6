"""Stores in device memory: a gather and a scatter. Other implementations are judged by it."""

import jax.numpy as jnp

from pallas_kernels.fetch_pages import places


def fetch_pages(stores, slots, pages_R, rows_R):
  return _copy(stores, slots, pages_R, rows_R, places.exist(pages_R, rows_R, stores, slots))


def write_pages(stores, slots, pages_R, rows_R):
  return _copy(slots, stores, rows_R, pages_R, places.exist(pages_R, rows_R, stores, slots))


def _copy(sources, targets, from_R, to_R, exist_R):
  # Past the end, where a scatter drops what it is given.
  to_R = jnp.where(exist_R, to_R, targets[0].shape[0])
  return tuple(
    target.at[to_R].set(source[from_R], mode="drop")
    for source, target in zip(sources, targets, strict=True)
  )
