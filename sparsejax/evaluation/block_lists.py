"""Which blocks a trained model chooses, for those who make them fast.

How alike the lists of neighbouring queries are decides what block-sparse kernels cost: a
tile of queries loads the union of its lists. `pallas_kernels.benchmark --lists=FILE.npy`
takes the lists of a layer.
"""

from collections.abc import Sequence
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import attention, errors, sharding
from sparsejax.diagnostics import by_head, seen
from sparsejax.evaluation import markdown
from sparsejax.evaluation import subject as subjects

# Neighbouring queries whose lists are joined.
TILES = (1, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class Cell:
  """The lists of a layer.

  Attributes:
    layer: its number.
    unions: blocks that as many neighbouring queries as `TILES` says read together, the mean
      over tiles and key heads; None where a row is shorter.
    num_blocks: that there are.
  """

  layer: int
  unions: tuple[float | None, ...]
  num_blocks: int


def check(subject: subjects.Subject) -> None:
  """Refuses what has no lists, before the model runs; parameters may be shapes alone.

  Raises:
    ConfigError: the method chooses no blocks, or rows are too short for it to do so.
    DataError: no source has a validation split.
  """
  if not any(source.validation for source in subject.corpus.sources):
    raise errors.DataError(
      "none of the data has a validation split; prepare it with --validation_fraction above 0."
    )
  options, length = subject.transformer.options, subject.config.data.sequence_length
  sparse = [attention.METHODS[name] for name in attention.sparse_names(options)]
  if sparse and all(method.is_dense(options, length) for method in sparse):
    threshold = options.infllmv2.dense_length
    raise errors.ConfigError(
      f"rows of {length} tokens are below infllmv2.dense_length={threshold} and read whole, so "
      "that there are no lists; take longer ones with --sequence_length."
    )
  ids_BT = jax.ShapeDtypeStruct((subject.mesh.size, length), np.int32)
  with sharding.use(subject.mesh):
    places = by_head.places_with_lists(subject.transformer, subject.params, ids_BT)
  if not places:
    raise errors.ConfigError(
      f"attention.method={'+'.join(options.pattern)!r} chooses no blocks in any layer, so that "
      "there are no lists; leave block_lists out of --tasks, or take a checkpoint of a method "
      "that chooses, as ssa, nsa or nosa."
    )


def choose(subject: subjects.Subject) -> np.ndarray:
  """The lists of the first validation row, int32 [layers, T, K, M], -1 for empty slots.

  Layers that choose no blocks, in a model where others do, have empty lists.

  Raises:
    UserError: see `check`.
  """
  check(subject)
  row = next(s.validation[0] for s in subject.corpus.sources if s.validation)
  options = subject.transformer.options
  # Devices share rows: each takes the same one.
  rows = jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], subject.mesh.size, 0), row)

  @jax.jit
  def look(params, rows):
    _, shown = subject.transformer.apply(
      {"params": params},
      rows.inputs,
      rows.positions,
      rows.segments,
      stream="sparse",
      mutable=["intermediates"],
    )
    return shown

  shown = look(subject.params, jax.tree.map(jnp.asarray, rows))
  found = {
    place: np.asarray(x_SBTKM[:, 0])
    for place, x_SBTKM in seen.by_place(shown, "blocks").items()
  }
  num_layers = subject.transformer.shape.num_hidden_layers
  blocks_LTKM = np.full((num_layers, *next(iter(found.values())).shape[1:]), -1, np.int32)
  for place, blocks in found.items():
    blocks_LTKM[place :: len(options.pattern)] = blocks
  return blocks_LTKM


def describe(blocks_LTKM: np.ndarray, block_size: int) -> list[Cell]:
  """What there is to say about lists of `choose`."""
  num_blocks = -(-blocks_LTKM.shape[1] // block_size)
  return [
    Cell(layer, tuple(mean_union(x, tile) for tile in TILES), num_blocks)
    for layer, x in enumerate(blocks_LTKM)
  ]


def mean_union(blocks_TKM: np.ndarray, tile: int) -> float:
  """Blocks that a tile of neighbouring queries reads together, the mean over whole tiles.

  NaN where there are fewer queries.
  """
  length, heads, _ = blocks_TKM.shape
  unions = [
    len(np.unique(lists[lists >= 0]))
    for start in range(0, length - tile + 1, tile)
    for head in range(heads)
    for lists in [blocks_TKM[start : start + tile, head]]
  ]
  return float(np.mean(unions)) if unions else math.nan


def shares(blocks_LTKM: np.ndarray, block_size: int) -> np.ndarray:
  """How many of a block's queries, over all key heads, list each key block.

  Returns:
    From 0 to 1, [layers, query blocks, key blocks]; NaN for blocks that come later. Of a last
    block that is not whole, of the queries it has.
  """
  num_layers, length, num_heads, _ = blocks_LTKM.shape
  num_blocks = -(-length // block_size)
  lists = np.sort(blocks_LTKM, axis=-1)
  # A block that is listed twice counts once.
  counts = (lists >= 0) & (np.diff(lists, axis=-1, prepend=-1) > 0)
  layer, query, head, slot = np.nonzero(counts)
  found = np.zeros((num_layers, num_blocks, num_blocks))
  np.add.at(found, (layer, query // block_size, lists[layer, query, head, slot]), 1.0)
  queries = np.minimum(block_size, length - block_size * np.arange(num_blocks))
  found /= num_heads * queries[None, :, None]
  later = np.triu(np.ones((num_blocks, num_blocks), bool), 1)
  return np.where(later, np.nan, found)


def rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
  """Rows of a table, the header first."""
  header = "layer", *(f"{tile} queries" for tile in TILES), "of blocks"
  return [
    header,
    *(
      (str(c.layer), *(markdown.number(x, ".1f") for x in c.unions), str(c.num_blocks))
      for c in cells
    ),
  ]
