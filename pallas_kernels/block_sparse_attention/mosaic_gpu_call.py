"""A problem as the Hopper kernels want it, and each kernel as a step of its own."""

import jax
import jax.numpy as jnp

from pallas_kernels import devices, documents
from pallas_kernels.block_lists import key_tiles, query_tiles, units
from pallas_kernels.block_lists import mosaic_gpu as lists_on_gpu
from pallas_kernels.block_lists import mosaic_gpu_deal as deal_on_gpu
from pallas_kernels.block_sparse_attention import (
  mosaic_gpu_dkv,
  mosaic_gpu_dq,
  mosaic_gpu_forward,
  mosaic_gpu_parts,
  mosaic_gpu_walk,
  packing,
)
from pallas_kernels.block_sparse_attention import problem as problems
from pallas_kernels.block_sparse_attention.mosaic_gpu_shape import STEP, UNIT, Shape
from pallas_kernels.mosaic_warp import PIECE

INTERPRETED_WORKERS = 2
# Head sizes for which the kernel of dq finds delta itself, which saves reading the output's
# cotangent once more. With 128 there is no room for the output in shared memory.
DQ_FINDS_DELTA = (64,)
# Bytes of a multiprocessor's shared memory, less what barriers and small arrays take.
_SHARED_MEMORY = 208 * 1024
# Bytes of a round that a device's cache holds beside what else goes through it.
_CACHE = 36 * 2**20
_LOG2E = 1.4426950408889634


def query_config(
  head_dim: int, num_operands: int, entries_per_unit: int
) -> mosaic_gpu_walk.Config:
  """How a kernel over query tiles is laid out; tiles are the same in all of them.

  Args:
    head_dim: D.
    num_operands: arrays of queries' rows in shared memory.
    entries_per_unit: of its list. Long lists take room from the ring.
  """
  warpgroups, most_stages, registers = (3, 8, 160) if head_dim == 64 else (2, 4, 208)
  units = 4 * warpgroups
  rows = 2 * head_dim * UNIT * units * num_operands
  # Entries and what tokens read of them, of a tile and of the one after it.
  lists = 2 * 2 * 4 * units * query_tiles.width(entries_per_unit)
  stages = (_SHARED_MEMORY - rows - lists) // (2 * 2 * head_dim * STEP)
  return mosaic_gpu_walk.Config(
    warpgroups=warpgroups, stages=min(stages, most_stages), registers=registers
  )


def dq_operands(head_dim: int) -> int:
  """Arrays of queries' rows that the kernel of dq holds, the most of all kernels."""
  return 2 + (head_dim in DQ_FINDS_DELTA)


def key_config(head_dim: int, num_rows: int, whole_blocks: bool) -> mosaic_gpu_dkv.Config:
  """How the kernel over key tiles is laid out.

  Args:
    head_dim: D.
    num_rows: of queries, and as many of cotangents, that it reads.
    whole_blocks: whether every unit that reads a block reads its 64 keys.
  """
  rounds = -(-2 * 2 * num_rows * head_dim // _CACHE)
  if whole_blocks and head_dim == 128:
    return mosaic_gpu_dkv.Config(
      warpgroups=2,
      stages=4,
      units_per_stage=4,
      registers=232,
      keys_in_registers=False,
      rounds=min(2, rounds),
      whole_blocks=True,
    )
  # More rounds would leave more partial sums, which cost more than the cache saves.
  rounds = min(3, rounds)
  warpgroups, stages, registers = (3, 8, 160) if head_dim == 64 else (2, 4, 208)
  return mosaic_gpu_dkv.Config(
    warpgroups=warpgroups,
    stages=stages,
    units_per_stage=4,
    registers=registers,
    keys_in_registers=head_dim == 64,
    rounds=rounds,
  )


def entries_per_unit(problem: problems.Problem, block_size: int) -> int:
  """Blocks, as kernels take them, that the list of a unit has room for."""
  (_, t, h, _), (_, s, k, _) = problem.q_BTHD.shape, problem.k_BSKD.shape
  parts = block_size // min(block_size, STEP)
  listed = (
    packing.Packing(t, h // k, k).grouping.tokens_per_unit * problem.blocks_BTKM.shape[-1]
  )
  return parts * min(listed, -(-s // block_size))


class Call:
  """One problem; its methods are the steps of `mosaic_gpu.block_sparse_attention`.

  Each step takes what it computes from and nothing else, so that it can be timed alone.
  """

  def __init__(self, problem: problems.Problem, block_size: int, scale: float, interpret=None):
    (b, t, h, d), (_, s, k, _) = problem.q_BTHD.shape, problem.k_BSKD.shape
    self.packing = packing.Packing(t, h // k, k)
    grouping = self.packing.grouping
    kernel_block = min(block_size, STEP)
    self._parts_of_block = block_size // kernel_block
    self._num_blocks = -(-s // block_size) * self._parts_of_block
    entries = entries_per_unit(problem, block_size)
    self.dq_finds_delta = d in DQ_FINDS_DELTA
    self._forward_config, self._dq_config = (
      query_config(d, n, entries) for n in (1, dq_operands(d))
    )
    whole_blocks = kernel_block == STEP and grouping.tokens_per_unit == 1
    self._key_config = key_config(d, b * k * grouping.num_units * UNIT, whole_blocks)
    self._num_keys = s
    shape = Shape(
      batch=b,
      num_kv_heads=k,
      num_units=grouping.num_units,
      units_per_token=grouping.units_per_token,
      tokens_per_unit=grouping.tokens_per_unit,
      num_keys=s + -s % PIECE,
      head_dim=d,
      block_size=kernel_block,
      has_bias=problem.key_bias_BSK is not None,
      interpreted=interpret is not None,
      num_workers=devices.num_multiprocessors() if interpret is None else INTERPRETED_WORKERS,
    )
    self._shape = shape
    self._options = dict(shape=shape, scale=scale, interpret=interpret)

  def bounds(self, problem: problems.Problem) -> tuple[jax.Array, jax.Array]:
    """The first and the last key that each query may see, [B, T] both."""
    b, t = problem.q_BTHD.shape[:2]
    position_T = problem.query_offset + jnp.arange(t, dtype=jnp.int32)
    position_BT = jnp.broadcast_to(position_T[None], (b, t))
    if problem.segments_BS is None:
      return jnp.zeros((b, t), jnp.int32), position_BT
    return documents.first_positions(problem.segments_BS)[:, position_T], position_BT

  def make_lists(self, blocks_BTKM, bounds) -> tuple[units.UnitLists, query_tiles.QueryTiles]:
    """The lists of units, and what the kernels over query tiles read."""
    first_BT, position_BT = bounds
    units_per_tile = self._forward_config.units_per_tile
    arrays = _split_blocks(blocks_BTKM, self._parts_of_block), first_BT, position_BT[0]
    sizes = dict(
      grouping=self.packing.grouping,
      block_size=self._shape.block_size,
      num_blocks=self._num_blocks,
    )
    # The kernel takes units of single tokens, and has nothing that the interpreter knows.
    is_for_kernel = not self._shape.has_tokens and not self._shape.interpreted
    num_slots = arrays[0].shape[-1]
    if is_for_kernel and lists_on_gpu.has_room(num_slots, self._num_blocks, units_per_tile):
      return lists_on_gpu.lists(*arrays, units_per_tile=units_per_tile, **sizes)
    unit_lists = units.unit_lists(*arrays, **sizes)
    return unit_lists, query_tiles.query_tiles(
      unit_lists, units_per_tile=units_per_tile, num_blocks=self._num_blocks
    )

  def make_key_tiles(self, lists: units.UnitLists) -> key_tiles.KeyTiles:
    tiling = key_tiles.Tiling(
      block_size=self._shape.block_size,
      num_blocks=self._num_blocks,
      keys_per_tile=self._key_config.keys_per_tile,
      in_order=self._key_config.whole_blocks,
    )
    # Kernels deal units of single tokens, and have nothing that the interpreter knows.
    is_for_kernel = not self._shape.has_tokens and not self._shape.interpreted
    if is_for_kernel and deal_on_gpu.has_room(tiling):
      dealt = deal_on_gpu.deal(lists, tiling)
    else:
      dealt = key_tiles.deal(lists, tiling, self._shape.has_tokens)
    num_parts = self._key_config.rounds * self._shape.num_workers
    return key_tiles.share(dealt, lists, tiling, num_parts)

  def make_walk_lists(
    self, problem, tiles: query_tiles.QueryTiles, bounds
  ) -> mosaic_gpu_walk.Lists:
    """What the kernels over query tiles read besides queries."""
    first_BL, position_BL = (self._whole_tiles(self.packing.token_lines(x)) for x in bounds)
    return mosaic_gpu_walk.Lists(
      *self._keys(problem),
      tiles.union_RXC,
      tiles.count_RX,
      tiles.entries_RUE,
      first_BL,
      position_BL,
      tiles.tokens_RUE if self._shape.has_tokens else None,
      self._biases(problem),
    )

  def forward(self, q_BVXD, lists: mosaic_gpu_walk.Lists) -> tuple[jax.Array, jax.Array]:
    """Packed output, and lse by lines."""
    return mosaic_gpu_forward.forward(
      q_BVXD, lists, config=self._forward_config, **self._options
    )

  def dq(
    self, q_BVXD, dout_BVXD, lines: mosaic_gpu_dq.Lines, lists: mosaic_gpu_walk.Lists
  ) -> tuple[jax.Array, jax.Array]:
    """Packed gradient of queries, and lines of delta."""
    num_lines = lines.lse_RL.shape[1]
    whole = lines._replace(
      lse_RL=self._whole_tiles(lines.lse_RL), delta_RL=self._whole_tiles(lines.delta_RL)
    )
    dq_BVXD, delta_RL = mosaic_gpu_dq.dq(
      q_BVXD, dout_BVXD, whole, lists, config=self._dq_config, **self._options
    )
    return dq_BVXD, delta_RL[:, :num_lines]

  def line_numbers(self, lse_RL, delta_RL, bounds) -> jax.Array:
    """What the kernel over key tiles knows of each row of queries, [R, U, 64]."""
    heads = self._shape.num_kv_heads
    first_RL, position_RL = (
      jnp.repeat(self.packing.token_lines(x), heads, axis=0).astype(jnp.float32) for x in bounds
    )
    lines = lse_RL * _LOG2E, delta_RL, first_RL, position_RL
    return jnp.concatenate([x.reshape(x.shape[0], -1, UNIT) for x in lines], axis=-1)

  def dkv(self, q_BVXD, dout_BVXD, numbers_RUC, problem, tiles: key_tiles.KeyTiles):
    """Partial sums of the gradients of keys, values and biases."""
    return mosaic_gpu_dkv.dkv(
      q_BVXD,
      dout_BVXD,
      numbers_RUC,
      *self._keys(problem),
      self._biases(problem),
      tiles,
      config=self._key_config,
      **self._options,
    )

  def add_parts(self, sums: mosaic_gpu_dkv.Sums, tiles: key_tiles.KeyTiles):
    """Gradients of keys, values and biases (None where there are no biases)."""
    dk_BSKD, dv_BSKD = (
      mosaic_gpu_parts.add_parts(
        x,
        tiles,
        shape=self._shape,
        keys_per_tile=self._key_config.keys_per_tile,
        interpret=self._options["interpret"],
      )[:, : self._num_keys]
      for x in (sums.dk_YND, sums.dv_YND)
    )
    if sums.dbias_YN is None:
      return dk_BSKD, dv_BSKD, None
    dbias_BSK = mosaic_gpu_parts.add_bias_parts(
      sums.dbias_YN, tiles, shape=self._shape, keys_per_tile=self._key_config.keys_per_tile
    )
    return dk_BSKD, dv_BSKD, dbias_BSK[:, : self._num_keys]

  def _keys(self, problem: problems.Problem) -> tuple[jax.Array, jax.Array]:
    return self._whole_pieces(problem.k_BSKD), self._whole_pieces(problem.v_BSKD)

  def _biases(self, problem: problems.Problem) -> jax.Array | None:
    if problem.key_bias_BSK is None:
      return None
    bias_BSK = problem.key_bias_BSK.astype(jnp.float32)
    return self._whole_pieces(bias_BSK).transpose(0, 2, 1)

  def _whole_pieces(self, x_BSX):
    missing = self._shape.num_keys - self._num_keys
    return jnp.pad(x_BSX, [(0, 0), (0, missing)] + [(0, 0)] * (x_BSX.ndim - 2))

  def _whole_tiles(self, x_RL):
    """Numbers of lines, padded to whole tiles of units."""
    lines = self._forward_config.units_per_tile * UNIT
    return jnp.pad(x_RL, [(0, 0), (0, -x_RL.shape[1] % lines)])


def _split_blocks(blocks_BTKM, parts: int):
  """Lists of blocks a `parts`-th as large."""
  if parts == 1:
    return blocks_BTKM
  split = blocks_BTKM[..., None] * parts + jnp.arange(parts)[None, None, None, None]
  # All parts of -1 must stay below 0, and those of large numbers must not wrap around.
  is_there = (blocks_BTKM >= 0) & (blocks_BTKM < 2**24)
  split = jnp.where(is_there[..., None], split, -1)
  return split.reshape(*blocks_BTKM.shape[:-1], -1)
