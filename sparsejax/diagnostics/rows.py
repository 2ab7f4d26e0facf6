"""The rows that a look is taken at."""

from collections.abc import Sequence

import jax
import numpy as np

from sparsejax import sharding
from sparsejax.data import batch as data


def first(rows: Sequence[data.Batch], num_rows: int, mesh: jax.sharding.Mesh) -> data.Batch:
  """The first rows of a split, on the mesh: as many as divide over all of its devices.

  Args:
    rows: the split, with a row at least; it begins again where it has too few.
    num_rows: how many, at least.
    mesh: where parameters are.
  """
  count = -(-num_rows // mesh.size) * mesh.size
  picked = [rows[i % len(rows)] for i in range(count)]
  stacked = data.Batch(*(np.stack(field) for field in zip(*picked, strict=True)))
  return sharding.put_batch(stacked, mesh)
