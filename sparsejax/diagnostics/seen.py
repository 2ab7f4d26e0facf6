"""What a forward pass showed of its layers: `apply(..., mutable=["intermediates"])`.

Layers are scanned, so that everything comes stacked along a leading axis; where layers run
different methods in turn, each place in their pattern has a stack of its own.
"""

import jax


def by_place(seen, name: str) -> dict[int, jax.Array]:
  """Stacks of what layers showed under a name, by their place in the pattern of layers.

  Args:
    seen: the variables that `apply` returned.
    name: `queries`, `keys`, `values`, `key_bias` or `blocks`.
  """
  found = {}
  for path, value in jax.tree_util.tree_flatten_with_path(seen)[0]:
    names = [str(getattr(key, "key", "")) for key in path]
    if name in names:
      found[next((int(part) for part in names if part.isdigit()), 0)] = value
  return found
