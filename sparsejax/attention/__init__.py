"""Attention methods. A method joins by one file and one entry of `METHODS`."""

from flax import linen as nn

from sparsejax.attention.dma import Dma, EdDma
from sparsejax.attention.full import Full
from sparsejax.attention.infllmv2 import InfllmV2
from sparsejax.attention.method import (
  InfllmV2Options,
  NosaOptions,
  NsaOptions,
  Options,
  SparseMethod,
  SsaOptions,
  Stream,
)
from sparsejax.attention.moba import Moba
from sparsejax.attention.nosa import Nosa
from sparsejax.attention.nsa import Nsa
from sparsejax.attention.past import KEYS_AND_VALUES, Kind
from sparsejax.attention.sliding_window import SlidingWindow
from sparsejax.attention.ssa import Ssa

__all__ = [
  "METHODS",
  "SPARSE_METHODS",
  "InfllmV2Options",
  "NosaOptions",
  "NsaOptions",
  "Options",
  "SsaOptions",
  "dense_length",
  "make_method",
  "most_pages",
  "names_with_blocks",
  "remembers",
  "sparse_method",
  "sparse_name",
  "sparse_names",
]

METHODS = {
  "full": Full,
  "moba": Moba,
  "infllmv2": InfllmV2,
  "dma": Dma,
  "ed_dma": EdDma,
  "nosa": Nosa,
  "nsa": Nsa,
  "sliding_window": SlidingWindow,
  "ssa": Ssa,
}

# Methods with a sparse stream of their own (a `method.SparseMethod` each); the others run one
# of these when run sparse.
SPARSE_METHODS = ("moba", "infllmv2", "dma", "ed_dma", "nosa", "nsa", "sliding_window")

# Those of them whose layers list no blocks: no budget means anything to them.
_WITHOUT_BLOCKS = ("sliding_window",)


def sparse_name(options: Options) -> str:
  """The method whose sparse stream a layer of these settings runs when run sparse."""
  return options.method if options.method in SPARSE_METHODS else options.sparse_method


def sparse_method(options: Options) -> type[SparseMethod]:
  """Its class."""
  return METHODS[sparse_name(options)]


def sparse_names(options: Options) -> tuple[str, ...]:
  """The names of all layers' sparse methods, each once."""
  layers = [options.of_layer(place) for place in range(len(options.pattern))]
  return tuple(dict.fromkeys(sparse_name(own) for own in layers if not own.is_always_full))


def names_with_blocks(options: Options) -> tuple[str, ...]:
  """Those of them that choose blocks, as many as a budget says; () where no layer does."""
  return tuple(name for name in sparse_names(options) if name not in _WITHOUT_BLOCKS)


def remembers(options: Options, stream: Stream, length: int) -> dict[str, Kind]:
  """What a layer of these settings needs of earlier tokens to decode.

  Args:
    options: of the layer.
    stream: `full` or `sparse`.
    length: tokens that a row has room for.
  """
  if options.method == "full" and (stream == "full" or options.is_always_full):
    return KEYS_AND_VALUES
  return sparse_method(options).remembers(options, stream, length)


def dense_length(options: Options) -> int:
  """Rows of fewer tokens run the full stream in some layer, whatever was asked for."""
  layers = [options.of_layer(place) for place in range(len(options.pattern))]
  return max(sparse_method(own).dense_length(own) for own in layers)


def most_pages(options: Options, stream: Stream, length: int) -> int:
  """Pages that a token reads at most, in any layer; see `remembers`."""
  num_pages = -(-length // options.block_size)

  def of_layer(own: Options) -> int:
    if stream == "full" or own.is_always_full:
      return num_pages
    return min(num_pages, sparse_method(own).most_pages(own, length))

  return max(of_layer(options.of_layer(place)) for place in range(len(options.pattern)))


def make_method(options: Options, kernel_init: nn.initializers.Initializer):
  """The linen module of a method, to be called within a layer's compact method.

  Its own matrices begin as `kernel_init` makes them.

  A sparse method is always the layer's submodule `sparse`, alone or inside another method,
  so that its parameters have one place whatever the training.
  """
  if options.is_always_full:
    return Full(options, None, name="method")
  sparse = sparse_method(options)(options, kernel_init, name="sparse")
  if options.method in SPARSE_METHODS:
    return sparse
  return METHODS[options.method](options, sparse, name="method")
