"""Where arrays are, and which entries of a list mean a page."""

import jax


def is_on_host(x) -> bool:
  """Whether an array, or what one would look like, is in host memory."""
  if isinstance(x, jax.ShapeDtypeStruct):
    return x.sharding is not None and x.sharding.memory_kind == "pinned_host"
  return jax.typeof(x).memory_space == jax.memory.Space.Host


def exist(pages_R, rows_R, stores, slots) -> jax.Array:
  """Bool [R]: whether there is such a page and such a row."""
  num_pages, num_slots = stores[0].shape[0], slots[0].shape[0]
  is_page_R = (pages_R >= 0) & (pages_R < num_pages)
  return is_page_R & (rows_R >= 0) & (rows_R < num_slots)
