"""What a training or evaluation step reads."""

from typing import NamedTuple

import jax
import numpy as np


class Batch(NamedTuple):
  """Token rows; every field has shape [B, T], or [T] for a single row.

  Attributes:
    inputs: token ids, int32.
    targets: the token after each input, int32.
    weights: 1 where the target counts in the loss, 0 where it does not, float32.
    segments: number of the document within the row, from 1; 0 is padding, int32.
    positions: place of the input within its document (or what the row has of it), int32.
  """

  inputs: np.ndarray | jax.Array
  targets: np.ndarray | jax.Array
  weights: np.ndarray | jax.Array
  segments: np.ndarray | jax.Array
  positions: np.ndarray | jax.Array
