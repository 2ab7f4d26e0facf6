"""The kernel for the gradients of keys and values on Hopper GPUs.

A warp holds a piece of 16 keys and values; a tile is the pieces of all warps of a
multiprocessor. The units that read the tile stream through a ring, in the order of
`block_lists.key_tiles`, and each warp takes those that read its piece. Scores stand on
their side here, keys down the rows and a unit's 16 queries along the columns. With blocks
of 64 keys, a warpgroup can hold a block together (`mosaic_gpu_block_share`).

No two warps write to the same place and every sum has a fixed order, so gradients are the
same every time. A tile that several parts of the work share has a partial sum of each;
`mosaic_gpu_parts` adds them up.

See `mosaic_gpu_shape` for the letters. More: W windows of 32 units, P pieces of a tile,
X tiles, Y partial sums.
"""

import dataclasses
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.block_lists import key_tiles
from pallas_kernels.block_sparse_attention import mosaic_gpu_arrays as arrays
from pallas_kernels.block_sparse_attention import mosaic_gpu_threads as threads
from pallas_kernels.block_sparse_attention.mosaic_gpu_block_share import BlockShare
from pallas_kernels.block_sparse_attention.mosaic_gpu_shape import UNIT, Shape
from pallas_kernels.block_sparse_attention.mosaic_gpu_share import Config, Share


class Sums(NamedTuple):
  """Partial sums of all tiles, float32; `dbias_YN` is None where keys have no biases.

  Attributes:
    dk_YND, dv_YND, dbias_YN: N keys of a tile; of a block that warpgroups hold together,
      the keys of each warpgroup's sum, one after the other.
  """

  dk_YND: jax.Array
  dv_YND: jax.Array
  dbias_YN: jax.Array | None


def dkv(
  q_BVXD,
  dout_BVXD,
  numbers_RUC,
  k_BSKD,
  v_BSKD,
  bias_BKS,
  tiles: key_tiles.KeyTiles,
  *,
  shape: Shape,
  config: Config,
  scale: float,
  interpret=None,
) -> Sums:
  """Returns partial sums; that of tile x in part p of the work is at x + p.

  Args:
    q_BVXD, dout_BVXD: queries and the cotangent of the output.
    numbers_RUC: of each unit's rows, see `mosaic_gpu_pair.LSE`; C = 64.
    k_BSKD, v_BSKD: keys and values.
    bias_BKS: float32, or None.
    tiles: of the lists.
    shape, config, scale, interpret: of the call.
  """
  shape = dataclasses.replace(shape, warps_as_one=config.whole_blocks)
  share_type = BlockShare if config.whole_blocks else Share
  warps = shape.warps
  num_threads = 4 * config.warpgroups // warps.per_thread
  num_tiles = len(tiles.first_window_X) - 1
  tiles_per_row = num_tiles // shape.num_rows
  num_lines, d, rows = num_threads * warps.rows, shape.head_dim, warps.rows
  slots = config.stages * config.units_per_stage
  per_window = key_tiles.WINDOW // config.units_per_stage
  inputs = dict(
    q=q_BVXD,
    dout=dout_BVXD,
    numbers=numbers_RUC,
    k=k_BSKD,
    v=v_BSKD,
    units=tiles.units_W,
    pieces=tiles.pieces_W,
    first_window=tiles.first_window_X,
    bounds=tiles.bounds_W,
    first_tile=tiles.first_tile_W,
    last_tile=tiles.last_tile_W,
  )
  if shape.has_bias:
    inputs["bias"] = bias_BKS
  if shape.has_tokens:
    inputs["tokens"] = tiles.tokens_WP

  def body(*refs, smem):
    gmem = dict(zip(inputs, refs, strict=False))
    outs = refs[len(inputs) :]
    worker, thread = lax.axis_index("worker"), lax.axis_index("thread")

    def share_of(tile, part, done):
      """What this worker does of a tile in a part of the work, after so many windows."""
      first, last = gmem["bounds"][part], gmem["bounds"][part + 1]
      window = jnp.maximum(gmem["first_window"][tile], first)
      end = jnp.minimum(gmem["first_window"][tile + 1], last)
      before = (done + window - first) * per_window
      ring = threads.ring_of(smem, config.stages, shape, thread, before)
      return share_type(shape, config, gmem, smem, ring, tile, part, tiles_per_row, window, end)

    def for_all_shares(function):
      """Calls `function(share)` for one tile after the other; returns windows in all."""

      def work_on_part(i, done):
        # There and back: what one round has more of than thought, the next has less of.
        turned = shape.num_workers - 1 - worker
        part = i * shape.num_workers + jnp.where(i % 2 == 0, worker, turned)

        def step(tile, _):
          share = share_of(tile, part, done)

          @pl.when(share.end > share.window)
          def _work():
            function(share)

        begin, end = gmem["first_tile"][part], gmem["last_tile"][part]
        lax.fori_loop(begin, end + 1, step, None)
        return done + gmem["bounds"][part + 1] - gmem["bounds"][part]

      return lax.fori_loop(0, config.rounds, work_on_part, jnp.int32(0))

    def compute():
      def work(share):
        dk, dv, dbias = share.sums(thread, scale)
        y, lines = share.tile + share.part, pl.ds(thread * rows, rows)
        outs[0][y, lines, :] = dk * scale
        outs[1][y, lines, :] = dv
        if shape.has_bias:
          outs[2][y, lines] = dbias

      for_all_shares(work)

    def fetch(warp):
      in_all = for_all_shares(lambda share: share.stream(warp)) * per_window
      threads.ring_of(smem, config.stages, shape, thread, in_all).drain()

    num_fetchers = threads.num_fetchers(shape, config.units_per_stage)
    threads.set_up(smem, shape, thread, {"filled": num_fetchers})
    threads.run(thread, num_threads, config.registers, compute, fetch, num_fetchers)

  num_filled = 3 * config.units_per_stage
  num_sums = num_tiles + config.rounds * shape.num_workers
  whole = jax.ShapeDtypeStruct((num_sums, num_lines, d), jnp.float32)
  out_type = [whole, whole]
  if shape.has_bias:
    out_type.append(jax.ShapeDtypeStruct((num_sums, num_lines), jnp.float32))
  stage_rows = config.units_per_stage * UNIT
  rows_shape = (config.stages, stage_rows) if config.whole_blocks else (slots * UNIT,)
  smem = dict(
    q=arrays.tiled((*rows_shape, d)),
    dout=arrays.tiled((*rows_shape, d)),
    numbers=plgpu.SMEM((slots, 4 * UNIT), jnp.float32),
    **threads.ring_scratch(config.stages, num_filled, shape, num_threads),
  )
  if config.whole_blocks:
    smem["own_keys"] = arrays.tiled((2, rows, d))
    smem["keys_left"] = plgpu.Barrier(num_arrivals=num_threads)
    smem["keys_ready"] = plgpu.Barrier(num_arrivals=2)
  elif not config.keys_in_registers:
    smem["own_keys"] = arrays.tiled((2, num_threads, rows, d))
  if shape.has_bias:
    smem["bias"] = plgpu.SMEM((num_threads, rows), jnp.float32)
    smem["bias_ready"] = plgpu.Barrier(num_barriers=num_threads)
  outs = plgpu.kernel(
    body,
    out_type=out_type,
    grid=(shape.num_workers,),
    grid_names=("worker",),
    num_threads=num_threads + 1,
    thread_name="thread",
    kernel_name="block_sparse_dkv",
    scratch_types=dict(smem=smem),
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=interpret,
  )(*inputs.values())
  return Sums(*outs, *[None] * (3 - len(outs)))
