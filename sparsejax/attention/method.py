"""What an attention method is: the interface between the layer and each method's file.

A method is a linen module called as

  attended = method(q_BTHD, k_BTKD, v_BTKD, tokens, stream)

that attends over what the layer has projected and rotated. Every method can run three
streams, so that one set of weights can be trained one way and evaluated in others:

  train   what the method does in training
  full    every query reads every earlier key
  sparse  every query reads the blocks it selects

Letters: B batch, T tokens, H query heads, K key/value heads, D head size, M blocks listed.
"""

import dataclasses
from typing import Literal, NamedTuple

import flax.struct
import jax

type Stream = Literal["train", "full", "sparse"]

STREAMS = ("train", "full", "sparse")


@flax.struct.dataclass
class Tokens:
  """What a method may know of the tokens besides their queries, keys and values.

  Attributes:
    segments_BT: document of each token, from 1; 0 is padding.
    gate_BTH: factor that the layer will put on the method's output; None is 1.
    use_full: scalar bool, whether SSA's main stream is the full one.
  """

  segments_BT: jax.Array
  gate_BTH: jax.Array | None
  use_full: jax.Array


class Attended(NamedTuple):
  """What a method returns.

  Attributes:
    out_BTHD: for the layer to gate and project.
    align: scalar float32, how far the two streams are apart; 0 where there is one stream.
  """

  out_BTHD: jax.Array
  align: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Settings of attention; the keys and defaults of `attention` in configs/base.py.

  Attributes:
    method: a key of `METHODS`.
    sparse_method: the sparse side of a method that has none of its own.
    block_size: keys per block.
    num_blocks: blocks a query reads, its own included.
    selection: `exact` or `half_local` (see `pallas_kernels.select_blocks`).
    document_mask: streams that stop at document borders: `both`, `full` or `none`.
    gate: whether a sigmoid gate per head and token multiplies the output.
    full_implementation, sparse_implementation: `auto`, or a backend by name.
    ssa: settings of SSA.
    max_documents: documents that a row may hold; cuDNN's packed form needs to know.
  """

  method: str
  sparse_method: str
  block_size: int
  num_blocks: int
  selection: str
  document_mask: str
  gate: bool
  full_implementation: str
  sparse_implementation: str
  ssa: "SsaOptions"
  max_documents: int

  @property
  def budget(self) -> int:
    """Keys a query reads under sparse inference (the papers' receptive field)."""
    return self.block_size * self.num_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class SsaOptions:
  """Settings of SSA; the keys and defaults of `ssa` in configs/base.py.

  Attributes:
    full_ratio: probability that the main stream is the full one.
    align_weight: weight of the alignment loss, the paper's alpha.
    align_loss: `smooth_l1` or `l2`.
    align_direction: `both`, `full_follows_sparse` or `sparse_follows_full`.
    align_after_gate: whether the gated outputs are compared.
    coin: `step` or `layer`.
  """

  full_ratio: float
  align_weight: float
  align_loss: str
  align_direction: str
  align_after_gate: bool
  coin: str
