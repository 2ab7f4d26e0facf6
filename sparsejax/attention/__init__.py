"""Attention methods. A method joins by one file and one entry of `METHODS`."""

from sparsejax.attention.full import Full
from sparsejax.attention.method import Options, SsaOptions
from sparsejax.attention.moba import Moba
from sparsejax.attention.ssa import Ssa

__all__ = ["METHODS", "SPARSE_METHODS", "Options", "SsaOptions", "make_method"]

METHODS = {"full": Full, "moba": Moba, "ssa": Ssa}

# Methods that select blocks themselves (a `method.SparseMethod` each); the others run one of
# these when run sparse.
SPARSE_METHODS = ("moba",)


def make_method(options: Options):
  """The linen module of a method, to be called within a layer's compact method.

  What selects blocks is always the layer's submodule `sparse`, alone or inside the method,
  so that its parameters have one place whatever the training.
  """
  name = options.method if options.method in SPARSE_METHODS else options.sparse_method
  sparse = METHODS[name](options, name="sparse")
  if options.method in SPARSE_METHODS:
    return sparse
  return METHODS[options.method](options, sparse, name="method")
