"""Attention methods. A method joins by one file and one entry of `METHODS`."""

from sparsejax.attention.dma import Dma, EdDma
from sparsejax.attention.full import Full
from sparsejax.attention.infllmv2 import InfllmV2
from sparsejax.attention.method import (
  InfllmV2Options,
  NosaOptions,
  Options,
  SparseMethod,
  SsaOptions,
)
from sparsejax.attention.moba import Moba
from sparsejax.attention.nosa import Nosa
from sparsejax.attention.ssa import Ssa

__all__ = [
  "METHODS",
  "SPARSE_METHODS",
  "InfllmV2Options",
  "NosaOptions",
  "Options",
  "SsaOptions",
  "make_method",
  "sparse_method",
]

METHODS = {
  "full": Full,
  "moba": Moba,
  "ssa": Ssa,
  "infllmv2": InfllmV2,
  "dma": Dma,
  "ed_dma": EdDma,
  "nosa": Nosa,
}

# Methods that select blocks themselves (a `method.SparseMethod` each); the others run one of
# these when run sparse.
SPARSE_METHODS = ("moba", "infllmv2", "dma", "ed_dma", "nosa")


def sparse_method(options: Options) -> type[SparseMethod]:
  """The class of what selects blocks: the method itself, or the sparse side of it."""
  name = options.method if options.method in SPARSE_METHODS else options.sparse_method
  return METHODS[name]


def make_method(options: Options):
  """The linen module of a method, to be called within a layer's compact method.

  What selects blocks is always the layer's submodule `sparse`, alone or inside the method,
  so that its parameters have one place whatever the training.
  """
  sparse = sparse_method(options)(options, name="sparse")
  if options.method in SPARSE_METHODS:
    return sparse
  return METHODS[options.method](options, sparse, name="method")
