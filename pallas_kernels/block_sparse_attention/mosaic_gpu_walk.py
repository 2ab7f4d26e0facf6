"""Kernels in which the warps of a tile walk along the union of their lists.

A warp holds one unit, 16 rows of queries that share a list: with 16 heads per key head, one
token. The units of a tile, neighbours, mostly list the same blocks, so the union of their
lists goes through shared memory once; each warp picks what its unit lists, and no product
is spent on what it does not. Lists ascend, and so does the union: it streams through a
ring, and warps run along it, each at its own pace, a step of 64 keys at a time.

See `mosaic_gpu_shape` for the letters.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_barrier
from pallas_kernels.block_lists import query_tiles
from pallas_kernels.block_sparse_attention import mosaic_gpu_threads as threads
from pallas_kernels.block_sparse_attention.mosaic_gpu_arrays import tiled
from pallas_kernels.block_sparse_attention.mosaic_gpu_shape import Shape
from pallas_kernels.block_sparse_attention.mosaic_gpu_tile import Config, Lists, Tile


def call(
  name: str,
  own: Sequence[jax.Array],
  lists: Lists,
  *,
  shape: Shape,
  config: Config,
  out_type: Sequence[jax.ShapeDtypeStruct],
  scratch: dict[str, Any],
  num_copies: int,
  copies: Callable,
  load: Callable,
  attend: Callable,
  interpret=None,
) -> list[jax.Array]:
  """Runs a kernel over all tiles.

  Args:
    name: of the kernel, as profilers show it.
    own: arrays that this kernel reads besides the lists.
    lists: the others.
    shape, config: of the call.
    out_type: of what it returns.
    scratch: shared memory by name, an entry for each thread, for what a tile needs.
    num_copies: how many copies `copies` gives.
    copies: `copies(tile, own_refs, scratch_refs)` gives sources, indices into them and
      targets, to be copied before a thread begins a tile.
    load: `load(tile, scratch_refs)` takes into registers all that was copied, so that the
      copies for the next tile can begin; the first thing that a thread does.
    attend: `attend(tile, loaded, out_refs)` is the rest of its work on a tile.
    interpret: of `plgpu.kernel`.
  """
  warps = shape.warps
  num_threads = config.units_per_tile // warps.per_thread
  num_tiles = lists.count_RX.shape[1]
  width = lists.entries_RUE.shape[-1]
  slots = config.stages * shape.group
  names = [name for name, x in lists._asdict().items() if x is not None]

  def body(*refs, walk, own_scratch):
    own_refs, refs = refs[: len(own)], refs[len(own) :]
    list_refs, out_refs = refs[: len(names)], refs[len(names) :]
    gmem = Lists(**dict.fromkeys(Lists._fields) | dict(zip(names, list_refs, strict=True)))
    worker, thread = lax.axis_index("worker"), lax.axis_index("thread")
    num_rows = jnp.int32(shape.num_rows)
    total = shape.num_rows * num_tiles
    num_own = lax.div(total - worker + shape.num_workers - 1, jnp.int32(shape.num_workers))

    def tile_of(i, before) -> Tile:
      """The i-th tile of this worker, the last ones of a row first: they read most."""
      number = total - 1 - (worker + i * shape.num_workers)
      row, x = lax.rem(number, num_rows), lax.div(number, num_rows)
      count = gmem.count_RX[row, x]
      num_stages = lax.div(count + shape.group - 1, jnp.int32(shape.group))
      ring = threads.ring_of(walk, config.stages, shape, thread, before)
      return Tile(shape, config, gmem, walk, ring, row, x, num_stages, thread, i & 1)

    def compute():
      ready = mosaic_barrier.Barriers(walk["ready"], shape.own_barriers)

      def begin_copies(i):
        @pl.when(i < num_own)
        def _begin():
          tile = tile_of(i, jnp.int32(0))
          ready.copy(thread, [*tile.copies(), *copies(tile, own_refs, own_scratch)])

      def work(i, before):
        tile = tile_of(i, before)
        ready.wait(thread, tile.turn)
        loaded = load(tile, own_scratch)
        # All warps have read what the copies for the next tile write over.
        plgpu.commit_smem()
        begin_copies(i + 1)
        attend(tile, loaded, out_refs)
        return before + tile.num_stages

      begin_copies(jnp.int32(0))
      lax.fori_loop(0, num_own, work, jnp.int32(0))

    def fetch(warp):
      def stream(i, before):
        tile = tile_of(i, before)
        tile.stream(warp)
        return before + tile.num_stages

      in_all = lax.fori_loop(0, num_own, stream, jnp.int32(0))
      threads.ring_of(walk, config.stages, shape, thread, in_all).drain()

    num_fetchers = threads.num_fetchers(shape, shape.group)
    threads.set_up(walk, shape, thread, {"ready": 1, "filled": num_fetchers})
    threads.run(thread, num_threads, config.registers, compute, fetch, num_fetchers)

  num_pieces = -(-width // query_tiles.COPY)
  num_list_copies = 1 if num_pieces == 1 else num_pieces * warps.per_thread
  num_ready = 2 + (1 + shape.has_tokens) * num_list_copies + num_copies
  num_filled = (2 + shape.has_bias) * shape.group

  walk = dict(
    k=tiled((slots * shape.block_size, shape.head_dim)),
    v=tiled((slots * shape.block_size, shape.head_dim)),
    # Of a tile, and of the one after it.
    entries=plgpu.SMEM((2, num_threads, warps.per_thread, width), jnp.int32),
    first=plgpu.SMEM((2, num_threads, warps.rows), jnp.int32),
    position=plgpu.SMEM((2, num_threads, warps.rows), jnp.int32),
    ready=mosaic_barrier.scratch(num_threads, num_ready, shape.own_barriers),
    **threads.ring_scratch(config.stages, num_filled, shape, num_threads),
  )
  if shape.has_tokens:
    walk["tokens"] = walk["entries"]
  if shape.has_bias:
    walk["bias"] = plgpu.SMEM((slots, max(32, shape.block_size)), jnp.float32)
  return plgpu.kernel(
    body,
    out_type=out_type,
    grid=(shape.num_workers,),
    grid_names=("worker",),
    num_threads=num_threads + 1,
    thread_name="thread",
    kernel_name=name,
    scratch_types=dict(walk=walk, own_scratch=scratch),
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=interpret,
  )(*own, *(x for x in lists if x is not None))
