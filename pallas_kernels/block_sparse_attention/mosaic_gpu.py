"""Block-sparse attention on Hopper GPUs, in kernels of Pallas Mosaic GPU."""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from pallas_kernels.block_lists import key_tiles, query_tiles, units
from pallas_kernels.block_sparse_attention import (
  mosaic_gpu_dkv,
  mosaic_gpu_dq,
  mosaic_gpu_forward,
  mosaic_gpu_walk,
  packing,
)
from pallas_kernels.block_sparse_attention import problem as problems
from pallas_kernels.block_sparse_attention.mosaic_gpu_shape import STEP, UNIT, Shape
from pallas_kernels.block_sparse_attention.xla import RESIDUAL_NAME

HEAD_DIMS = (64, 128)
BLOCK_SIZES = (16, 32, 64, 128)
# Multiprocessors of an H100 or H200, where there is no device to ask.
_NUM_WORKERS = 132
_LOG2E = 1.4426950408889634


def query_config(head_dim: int) -> mosaic_gpu_walk.Config:
  """How the kernels over query tiles are laid out."""
  if head_dim == 64:
    return mosaic_gpu_walk.Config(warpgroups=3, stages=8, registers=160)
  return mosaic_gpu_walk.Config(warpgroups=2, stages=4, registers=208)


def key_config(head_dim: int) -> mosaic_gpu_dkv.Config:
  """How the kernel over key tiles is laid out."""
  if head_dim == 64:
    return mosaic_gpu_dkv.Config(warpgroups=3, stages=8, units_per_stage=4, registers=160)
  return mosaic_gpu_dkv.Config(warpgroups=2, stages=4, units_per_stage=4, registers=208)


def why_not(problem: problems.Problem, block_size: int) -> str | None:
  """Why these kernels cannot take a problem; None if they can."""
  dtype, d = problem.q_BTHD.dtype, problem.q_BTHD.shape[-1]
  heads = problem.q_BTHD.shape[2] // problem.k_BSKD.shape[2]
  if dtype != jnp.bfloat16:
    return f"takes bfloat16, not {dtype.name}"
  if d not in HEAD_DIMS:
    return f"takes head sizes {HEAD_DIMS}, not {d}"
  if block_size not in BLOCK_SIZES:
    return f"takes blocks of {BLOCK_SIZES} keys, not {block_size}"
  if heads > 2 * UNIT:
    return f"takes up to {2 * UNIT} query heads per key head, not {heads}"
  return None


@functools.partial(
  jax.custom_vjp, nondiff_argnames=("known_offset", "block_size", "scale", "interpret")
)
def block_sparse_attention(
  problem: problems.Problem,
  known_offset: int | None,
  block_size: int,
  scale: float,
  interpret=None,
):
  return _forward(problem, known_offset, block_size, scale, interpret)[0]


def _forward(problem, known_offset, block_size, scale, interpret):
  del known_offset  # positions are data to the kernels
  call = _Call(problem, block_size, interpret is not None)
  config = query_config(call.shape.head_dim)
  out_BVXD, lse_RL = mosaic_gpu_forward.forward(
    call.packing.pack(problem.q_BTHD),
    call.query_lists(config.units_per_tile),
    shape=call.shape,
    config=config,
    scale=scale,
    interpret=interpret,
  )
  out_BTHD = checkpoint_name(call.packing.unpack(out_BVXD), RESIDUAL_NAME)
  lse_BTH = checkpoint_name(call.packing.from_lines(lse_RL), RESIDUAL_NAME)
  return (out_BTHD, lse_BTH), (problem, out_BTHD, lse_BTH)


def _backward(known_offset, block_size, scale, interpret, residuals, cotangents):
  del known_offset
  problem, out_BTHD, lse_BTH = residuals
  dout_BTHD, dlse_BTH = cotangents
  call = _Call(problem, block_size, interpret is not None)
  options = dict(shape=call.shape, scale=scale, interpret=interpret)
  pack = call.packing.pack
  q_BVXD, dout_BVXD = pack(problem.q_BTHD), pack(dout_BTHD)

  delta_BTH = (out_BTHD.astype(jnp.float32) * dout_BTHD.astype(jnp.float32)).sum(-1)
  delta_RL = call.packing.to_lines(delta_BTH - dlse_BTH)
  # A row that sees nothing must not turn masked scores into NaN.
  lse_RL = call.packing.to_lines(jnp.where(jnp.isneginf(lse_BTH), 0.0, lse_BTH))

  config = query_config(call.shape.head_dim)
  per_tile = config.units_per_tile
  dq_BVXD = mosaic_gpu_dq.dq(
    q_BVXD,
    dout_BVXD,
    call.whole_tiles(lse_RL, per_tile),
    call.whole_tiles(delta_RL, per_tile),
    call.query_lists(per_tile),
    config=config,
    **options,
  )
  config = key_config(call.shape.head_dim)
  tiles = call.key_tiles(config.keys_per_tile)
  sums = mosaic_gpu_dkv.dkv(
    q_BVXD,
    dout_BVXD,
    call.numbers(lse_RL * _LOG2E, delta_RL),
    problem.k_BSKD,
    problem.v_BSKD,
    call.bias_BKS,
    tiles,
    config=config,
    **options,
  )
  dk_BSKD, dv_BSKD = (
    mosaic_gpu_dkv.add_parts(x, tiles, shape=call.shape, config=config, interpret=interpret)
    for x in (sums.dk_YND, sums.dv_YND)
  )
  dbias_BSK = None
  if sums.dbias_YN is not None:
    dbias_BSK = mosaic_gpu_dkv.add_bias_parts(sums.dbias_YN, tiles, shape=call.shape)
  dq_BTHD = call.packing.unpack(dq_BVXD)
  return (problems.cotangent(problem, dq_BTHD, dk_BSKD, dv_BSKD, dbias_BSK),)


block_sparse_attention.defvjp(_forward, _backward)


class _Call:
  """A problem as the kernels want it."""

  def __init__(self, problem: problems.Problem, block_size: int, interpreted: bool):
    (b, t, h, d), (_, s, k, _) = problem.q_BTHD.shape, problem.k_BSKD.shape
    self._problem = problem
    self.packing = packing.Packing(t, h // k, k)
    grouping = self.packing.grouping
    kernel_block = min(block_size, STEP)
    self.shape = Shape(
      batch=b,
      num_kv_heads=k,
      num_units=grouping.num_units,
      units_per_token=grouping.units_per_token,
      tokens_per_unit=grouping.tokens_per_unit,
      num_keys=s,
      head_dim=d,
      block_size=kernel_block,
      has_bias=problem.key_bias_BSK is not None,
      interpreted=interpreted,
      num_workers=_num_workers(interpreted),
    )
    self._num_blocks = -(-s // block_size) * (block_size // kernel_block)

    position_T = problem.query_offset + jnp.arange(t, dtype=jnp.int32)
    first_BT = jnp.zeros((b, t), jnp.int32)
    if problem.segments_BS is not None:
      first_BT = _first_keys(problem.segments_BS)[:, position_T]
    self._lists = units.unit_lists(
      _split_blocks(problem.blocks_BTKM, block_size // kernel_block),
      first_BT,
      position_T,
      grouping=grouping,
      block_size=kernel_block,
      num_blocks=self._num_blocks,
    )
    self._first_BL = self.packing.token_lines(first_BT)
    position_BT = jnp.broadcast_to(position_T[None], first_BT.shape)
    self._position_BL = self.packing.token_lines(position_BT)
    self.bias_BKS = None
    if problem.key_bias_BSK is not None:
      self.bias_BKS = problem.key_bias_BSK.astype(jnp.float32).transpose(0, 2, 1)

  def query_lists(self, units_per_tile: int) -> mosaic_gpu_walk.Lists:
    tiles = query_tiles.query_tiles(
      self._lists, units_per_tile=units_per_tile, num_blocks=self._num_blocks
    )
    return mosaic_gpu_walk.Lists(
      self._problem.k_BSKD,
      self._problem.v_BSKD,
      tiles.union_RXC,
      tiles.count_RX,
      tiles.entries_RUE,
      self.whole_tiles(self._first_BL, units_per_tile),
      self.whole_tiles(self._position_BL, units_per_tile),
      tiles.tokens_RUE if self.shape.has_tokens else None,
      self.bias_BKS,
    )

  def key_tiles(self, keys_per_tile: int) -> key_tiles.KeyTiles:
    return key_tiles.key_tiles(
      self._lists,
      block_size=self.shape.block_size,
      num_blocks=self._num_blocks,
      keys_per_tile=keys_per_tile,
      num_workers=self.shape.num_workers,
      has_tokens=self.shape.has_tokens,
    )

  def whole_tiles(self, x_BL, units_per_tile: int):
    """Numbers of lines, padded to whole tiles of units."""
    return jnp.pad(x_BL, [(0, 0), (0, -x_BL.shape[1] % (units_per_tile * UNIT))])

  def numbers(self, lse2_RL, delta_RL):
    """What the kernel over key tiles needs to know of each row of queries, [R, U, 64]."""
    heads = self.shape.num_kv_heads
    bounds = (jnp.repeat(x, heads, axis=0) for x in (self._first_BL, self._position_BL))
    lines = (lse2_RL, delta_RL, *(x.astype(jnp.float32) for x in bounds))
    units_RUL = (x.reshape(x.shape[0], -1, UNIT) for x in lines)
    return jnp.concatenate(list(units_RUL), axis=-1)


def _split_blocks(blocks_BTKM, parts: int):
  """Lists of blocks a `parts`-th as large."""
  if parts == 1:
    return blocks_BTKM
  split = blocks_BTKM[..., None] * parts + jnp.arange(parts)[None, None, None, None]
  # All parts of -1 must stay below 0, and those of large numbers must not wrap around.
  is_there = (blocks_BTKM >= 0) & (blocks_BTKM < 2**24)
  split = jnp.where(is_there[..., None], split, -1)
  return split.reshape(*blocks_BTKM.shape[:-1], -1)


def _first_keys(segments_BS):
  """The first position of the run of equal segments that each position is in."""
  index_S = jnp.arange(segments_BS.shape[1], dtype=jnp.int32)
  begins_BS = jnp.diff(segments_BS, axis=1, prepend=segments_BS[:, :1] - 1) != 0
  return jax.lax.cummax(jnp.where(begins_BS, index_S[None], 0), axis=1)


def _num_workers(interpreted: bool) -> int:
  if interpreted:
    return 2
  return getattr(jax.devices()[0], "core_count", None) or _NUM_WORKERS
