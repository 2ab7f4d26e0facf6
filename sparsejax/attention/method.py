"""What an attention method is: the interface between the layer and each method's file.

A method is a linen module called as

  attended = method(q_BTHD, k_BTKD, v_BTKD, tokens, stream, past)

that attends over what the layer has projected and rotated. While a model decodes, there is one
token per row (T = 1), and `past` has the ones before it; while it reads prompts, there is a
chunk of each, and `past` has what came before; otherwise it is None. Every method can run three
streams, so that one set of weights can be trained one way and evaluated in others:

  train   what the method does in training
  full    every query reads every earlier key
  sparse  every query reads what the method gives it to read, such as the blocks it selects

Letters: B batch, T tokens, H query heads, K key/value heads, D head size, M blocks listed.
"""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

from flax import linen as nn
import flax.struct
import jax

import pallas_kernels
from sparsejax import sharding
from sparsejax.attention import past as pasts
from sparsejax.attention.past import Past
from sparsejax.attention.prompt import Chunk

type Stream = Literal["train", "full", "sparse"]

STREAMS = ("train", "full", "sparse")

# What a layer knows of the tokens before those at hand: the ones of a cache, or of a prompt.
type Earlier = Past | Chunk | None

# Logical axes of what every operation of attention takes, for `sharding.per_device`.
HEADS: sharding.Axes = ("batch", None, "heads", None)
KV_HEADS: sharding.Axes = ("batch", None, "kv_heads", None)
SEGMENTS: sharding.Axes = ("batch", None)
KEY_SCORES: sharding.Axes = ("batch", None, "kv_heads")
OFFSET: sharding.Axes = ()


@flax.struct.dataclass
class Tokens:
  """What a method may know of the tokens besides their queries, keys and values.

  Attributes:
    segments_BT: document of each token, from 1; 0 is padding.
    gate_BTH: factor that the layer will put on the method's output; None is 1.
    use_full: scalar bool, whether SSA's main stream is the full one.
    inputs_BTE: normed input of the layer, for methods with projections of their own.
    angles_BTD: by which to turn the keys of those [B, T, D // 2] (see `rotary.rotate`).
  """

  segments_BT: jax.Array
  gate_BTH: jax.Array | None
  use_full: jax.Array
  inputs_BTE: jax.Array | None = None
  angles_BTD: jax.Array | None = None


class Attended(NamedTuple):
  """What a method returns.

  Attributes:
    out_BTHD: for the layer to gate and project.
    align: scalar float32, how far the two streams are apart; 0 where there is one stream.
    past: with the tokens at hand, where it was given.
  """

  out_BTHD: jax.Array
  align: jax.Array
  past: Earlier = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Settings of attention; the keys and defaults of `attention` in configs/base.py.

  Attributes:
    method: a key of `METHODS`.
    layer_methods: the same of each layer, or of a period of layers; () is `method` in all. A
      layer that is `full` by these reads every key in every stream.
    sparse_method: the sparse side of a method that has none of its own.
    block_size: keys per block.
    num_blocks: blocks a query reads, its own included.
    window: keys a query reads of `sliding_window`, its own included.
    selection: `exact` or `half_local` (see `pallas_kernels.select_blocks`).
    document_mask: streams that stop at document borders: `both`, `full` or `none`.
    gate: whether a sigmoid gate per head and token multiplies the output.
    kernels: `auto`, or `strict` where an operation must run on a GPU kernel or fail.
    full_implementation, sparse_implementation: `auto` for what `kernels` says, or a backend
      by name.
    ssa, nsa, infllmv2, nosa: settings of the methods that read those sections.
    max_documents: documents that a row may hold; cuDNN's packed form needs to know.
  """

  method: str
  layer_methods: tuple[str, ...]
  sparse_method: str
  block_size: int
  num_blocks: int
  window: int
  selection: str
  document_mask: str
  gate: bool
  kernels: str
  full_implementation: str
  sparse_implementation: str
  ssa: "SsaOptions"
  nsa: "NsaOptions"
  infllmv2: "InfllmV2Options"
  nosa: "NosaOptions"
  max_documents: int

  @property
  def pattern(self) -> tuple[str, ...]:
    """Methods of the first layers, which repeat: the shortest period."""
    names = self.layer_methods or (self.method,)
    periods = [n for n in range(1, len(names) + 1) if len(names) % n == 0]
    shortest = next(n for n in periods if names[:n] * (len(names) // n) == names)
    return names[:shortest]

  def of_layer(self, place: int) -> "Options":
    """Settings of a layer by its place in the pattern: `method` is then its own."""
    return dataclasses.replace(self, method=self.pattern[place])

  @property
  def is_always_full(self) -> bool:
    """Whether a layer of these settings reads every key even when run sparse."""
    return self.method == "full" and bool(self.layer_methods)

  @property
  def home_stream(self) -> str:
    """The mode of inference that the methods are for: `full` or `sparse`."""
    return "full" if set(self.pattern) == {"full"} else "sparse"

  @property
  def budget(self) -> int:
    """Keys a query reads under sparse inference (the papers' receptive field)."""
    return self.block_size * self.num_blocks

  def num_listed(self, length: int) -> int:
    """Blocks that a query of a row lists: a row shorter than the budget is read whole."""
    return min(self.num_blocks, -(-length // self.block_size))

  def full_segments(self, tokens: Tokens) -> jax.Array | None:
    """Segments [B, T] at whose borders the full stream stops; None if at none."""
    return tokens.segments_BT if self.document_mask in ("both", "full") else None

  def sparse_segments(self, tokens: Tokens) -> jax.Array | None:
    """The same for the sparse stream."""
    return tokens.segments_BT if self.document_mask == "both" else None

  @property
  def full_backend(self) -> str:
    """`implementation` of `pallas_kernels.full_attention`."""
    return _named_or(self.full_implementation, self.kernels)

  @property
  def sparse_backend(self) -> str:
    """`implementation` of `pallas_kernels.block_sparse_attention`."""
    return _named_or(self.sparse_implementation, self.kernels)

  @property
  def selection_backend(self) -> str:
    """`implementation` of `pallas_kernels.select_blocks`, which Triton has no kernel for."""
    return self.kernels if self.sparse_backend == "triton" else self.sparse_backend


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class NsaOptions:
  """Settings of NSA; the keys and defaults of `nsa` in configs/base.py.

  Attributes:
    compression: `mlp` or `mean`: what makes the keys of a window one.
    compress_length, compress_stride: keys of a window, the paper's l, and from one to the
      next, its d.
    num_initial, num_local: selected blocks that are forced: the first of the document, and the
      last, the query's own among them.
    window: keys a query reads of the sliding window, its own included.
    kv: `separate` or `shared`: whether branches have keys and values of their own.
  """

  compression: str
  compress_length: int
  compress_stride: int
  num_initial: int
  num_local: int
  window: int
  kv: str

  def pooling(self, block_size: int) -> pallas_kernels.Pooling:
    """How windows speak for a block of the selection."""
    return pallas_kernels.nsa_windows(block_size, self.compress_length, self.compress_stride)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfllmV2Options:
  """Settings of InfLLM-V2, NOSA and DMA; keys and defaults of `infllmv2` in configs/base.py.

  Attributes:
    num_initial: blocks at the beginning of a document that every query reads.
    num_local: blocks near by that every query reads.
    local_window: `paper` counts the query's own block among them; `released` does not.
    window_size, window_stride: keys of a window, and from one window to the next.
    num_windows: windows whose largest score is a block's.
    first_window: `paper` takes windows from the first that begins in the block on, the last
      of which lies in the next block (as printed, with half-blocks every quarter);
      `released` from the one before it, all of which lie over the block.
    normalizer: of the softmax of scores: `windows`, or `coarse` for the log-sum-exp of
      windows four times as long.
    dense_length: rows of fewer tokens are read whole.
  """

  num_initial: int
  num_local: int
  local_window: str
  window_size: int
  window_stride: int
  num_windows: int
  first_window: str
  normalizer: str
  dense_length: int

  @property
  def num_local_blocks(self) -> int:
    """Local blocks, the query's own included."""
    return self.num_local + (self.local_window == "released")

  @property
  def num_forced(self) -> int:
    """Blocks that every query reads, where there are so many."""
    return self.num_initial + self.num_local_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class NosaOptions:
  """Settings of NOSA; the keys and defaults of `nosa` in configs/base.py.

  Attributes:
    num_query_aware: blocks that a query chooses, k_q; forced ones are not among them.
    eviction_head: `ed_dma` or `dma` (see `eviction.EvictionHead`).
  """

  num_query_aware: int
  eviction_head: str


class SparseMethod(nn.Module):
  """A method with a sparse stream of its own: an entry of `SPARSE_METHODS`.

  What is asked of it before it runs (backends, cost, budgets) has MoBA's answers here.

  Attributes:
    kernel_init: how matrices of the method's own begin.
    has_key_scores: whether keys have scores whoever asks, which are biases in both streams.
  """

  options: Options
  kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
  has_key_scores: ClassVar[bool] = False

  @classmethod
  def selection(cls, options: Options, length: int) -> dict[str, Any]:
    """How `pallas_kernels.select_blocks` is called for rows of so many tokens.

    Without what every method gives it: arrays, block size, M, documents, implementation.
    """
    # A row that is read whole has no halves, and may have an odd number of blocks.
    is_whole = options.num_listed(length) * options.block_size >= length
    return dict(rule="exact" if is_whole else options.selection)

  @classmethod
  def scores_per_key(cls, options: Options) -> float:
    """Products of a query head with means of keys that selection takes, per earlier key."""
    return 1 / options.block_size

  @classmethod
  def least_blocks(cls, options: Options) -> int:
    """Blocks that lists must have room for; 0 where only the query's own is forced."""
    del options
    return 0

  @classmethod
  def dense_length(cls, options: Options) -> int:
    """Rows of fewer tokens run the full stream, whatever was asked for."""
    del options
    return 0

  @classmethod
  def is_dense(cls, options: Options, length: int) -> bool:
    """Whether rows of so many tokens do."""
    return length < cls.dense_length(options)

  @classmethod
  def remembers(cls, options: Options, stream: Stream, length: int) -> dict[str, pasts.Kind]:
    """What a layer needs of earlier tokens to run a stream on rows of up to `length`."""
    del options, stream, length
    return pasts.KEYS_AND_VALUES

  @classmethod
  def most_pages(cls, options: Options, length: int) -> int:
    """Blocks that a token reads at most, run sparse on rows of up to `length`."""
    return max(options.num_listed(length), -(-cls.dense_length(options) // options.block_size))

  def choose(self, q_BTHD, k_BTKD, v_BTKD, tokens: Tokens) -> None:
    """Where the full stream runs: shows the lists that the sparse one would read, if asked.

    That is, if someone looks (`mutable=["intermediates"]`) and the method has lists.
    """
    del q_BTHD, k_BTKD, v_BTKD, tokens

  def both(self, q_BTHD, k_BTKD, v_BTKD, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
    """Outputs of the full and of the sparse stream, [B, T, H, D], for SSA to compare."""
    arrays = q_BTHD, k_BTKD, v_BTKD, tokens
    return self(*arrays, "full").out_BTHD, self(*arrays, "sparse").out_BTHD


def _named_or(implementation: str, kernels: str) -> str:
  return kernels if implementation == "auto" else implementation
