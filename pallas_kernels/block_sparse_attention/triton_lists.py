"""What the Triton kernels know of block lists, in plain XLA.

The kernels over queries walk through the list of a unit (see `triton_shape`). The kernel over
keys walks through the units that list a block, in *chunks* of bounded length: a block that
all queries read has many chunks, so no program has much more to do than the others. Every
chunk leaves its sum in a place of its own, and these are added in a fixed order.

Shapes are static and hold the worst case, so nothing can overflow.

Extra shape letters:
  N blocks of a row R   P pairs of units and blocks   C chunks
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import documents
from pallas_kernels.block_lists import units
from pallas_kernels.block_sparse_attention import problem as problems
from pallas_kernels.block_sparse_attention.triton_shape import Shape

# A chunk has at least so many units, but where a block has fewer.
_CHUNK = 64
# More chunks than a GPU runs at a time; with fewer blocks, chunks are shorter.
_MANY_CHUNKS = 2048


class QueryLists(NamedTuple):
  """Blocks that each unit reads.

  Attributes:
    blocks_RUE: numbers in ascending order, each once.
    tokens_RUE: bit i says whether the unit's i-th token lists the block.
    count_RU: how many of them there are; what follows is of no meaning.
  """

  blocks_RUE: jax.Array
  tokens_RUE: jax.Array
  count_RU: jax.Array


class KeyLists(NamedTuple):
  """Units that read each block, block by block and in chunks.

  Attributes:
    units_P: numbers of units, ascending within a block.
    tokens_P: bit i says whether the unit's i-th token lists the block.
    bounds_C2: where the pairs of a chunk begin and end in the above.
    block_C: the chunk's block, `r * N + n`; R * N where there are no more chunks.
    first_chunk_X: the first chunk of every block, and at last the number of chunks;
      X = R * N + 1.
  """

  units_P: jax.Array
  tokens_P: jax.Array
  bounds_C2: jax.Array
  block_C: jax.Array
  first_chunk_X: jax.Array


def first_keys(problem: problems.Problem) -> jax.Array:
  """The first key that each query may see, [B, T]: where its document begins."""
  b, t = problem.q_BTHD.shape[:2]
  if problem.segments_BS is None:
    return jnp.zeros((b, t), jnp.int32)
  first_BS = documents.first_positions(problem.segments_BS)
  return first_BS[:, problem.query_offset + jnp.arange(t, dtype=jnp.int32)]


def query_lists(problem: problems.Problem, first_BT, shape: Shape) -> QueryLists:
  """Drops what no token of a unit sees, sorts, and joins the lists of its tokens."""
  lists = units.unit_lists(
    problem.blocks_BTKM,
    first_BT,
    problem.query_offset + jnp.arange(shape.num_tokens, dtype=jnp.int32),
    grouping=shape.grouping,
    block_size=shape.block_size,
    num_blocks=shape.num_blocks,
  )
  # Repeats and empty slots sort to the end: no list is longer than there are blocks.
  length = min(lists.blocks_RUE.shape[-1], shape.num_blocks)
  blocks_RUE, tokens_RUE = (x[..., :length] for x in (lists.blocks_RUE, lists.tokens_RUE))
  count_RU = (blocks_RUE < units.NONE).sum(-1).astype(jnp.int32)
  return QueryLists(blocks_RUE, tokens_RUE, count_RU)


def chunk_length(num_pairs: int, num_blocks: int) -> int:
  """Units of a chunk, so that chunks are at most twice as many as blocks, or as `_MANY`.

  Partial sums then take at most twice the memory of the gradients in float32, or are small.
  """
  return max(_CHUNK, -(-num_pairs // max(num_blocks, _MANY_CHUNKS)))


def key_lists(lists: QueryLists, shape: Shape) -> KeyLists:
  """Turns the lists round.

  Raises:
    ValueError: more pairs of units and blocks than 32 bits can number.
  """
  r, u, e = lists.blocks_RUE.shape
  num_pairs, num_blocks = r * u * e, r * shape.num_blocks
  if num_pairs >= 2**31:
    raise ValueError(
      f"{r} rows of {u} lists of {e} blocks are too many to number with 32 bits; use a "
      "smaller batch or shorter lists"
    )
  row_R = jnp.arange(r, dtype=jnp.int32)[:, None, None]
  is_there_RUE = jnp.arange(e)[None, None] < lists.count_RU[..., None]
  block_RUE = jnp.where(is_there_RUE, row_R * shape.num_blocks + lists.blocks_RUE, num_blocks)
  block_P = block_RUE.reshape(-1)
  # Stable, so that units ascend and sums have one order.
  order_P = jnp.argsort(block_P, stable=True)
  edges_X = jnp.searchsorted(block_P[order_P], jnp.arange(num_blocks + 1)).astype(jnp.int32)

  length = chunk_length(num_pairs, num_blocks)
  chunks_N = -(-jnp.diff(edges_X) // length)
  first_chunk_X = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(chunks_N)])
  # The worst case: every list is full, and no block fills its last chunk.
  chunk_C = jnp.arange(-(-num_pairs // length) + num_blocks, dtype=jnp.int32)
  block_C = jnp.searchsorted(first_chunk_X, chunk_C, side="right").astype(jnp.int32) - 1
  begin_C = edges_X[block_C] + (chunk_C - first_chunk_X[block_C]) * length
  begin_C = jnp.where(block_C < num_blocks, begin_C, edges_X[-1])
  end_C = jnp.minimum(begin_C + length, edges_X[jnp.minimum(block_C + 1, num_blocks)])
  return KeyLists(
    units_P=((order_P // e) % u).astype(jnp.int32),
    tokens_P=lists.tokens_RUE.reshape(-1)[order_P],
    bounds_C2=jnp.stack([begin_C, end_C], axis=-1),
    block_C=block_C,
    first_chunk_X=first_chunk_X,
  )
