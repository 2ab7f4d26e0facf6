"""Attention to pages on Hopper GPUs, in a kernel of Pallas Mosaic GPU.

A row's list is divided among thread blocks, and among the warps of each; the 16 heads of a
unit are the rows of a warp's products. Every warp adds up what it finds in its pieces of 16
keys (`mosaic_gpu_worker`), thread blocks put together what their warps have
(`mosaic_gpu_together`), and XLA what they have. See `mosaic_gpu_shape` for the letters.
"""

import math

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import devices, mosaic_barrier, mosaic_inline
from pallas_kernels.decode_attention import mosaic_gpu_shape as shapes
from pallas_kernels.decode_attention import mosaic_gpu_together
from pallas_kernels.decode_attention.mosaic_gpu_shape import PIECE, WARPS, Shape
from pallas_kernels.decode_attention.mosaic_gpu_worker import Worker
from pallas_kernels.decode_attention.problem import Problem

HEAD_DIMS = (64, 128)
# Query heads per key head.
_MOST_HEADS = 32
_LOG2E = math.log2(math.e)


def why_not(problem: Problem) -> str | None:
  """Why this kernel cannot take a problem; None if it can."""
  q_BHD, k_PXD = problem.q_BHD, problem.k_PXD
  heads = q_BHD.shape[1] // problem.pages_BKM.shape[1]
  if q_BHD.dtype != jnp.bfloat16 or k_PXD.dtype != jnp.bfloat16:
    return f"takes bfloat16, not {q_BHD.dtype.name} and {k_PXD.dtype.name}"
  if q_BHD.shape[-1] not in HEAD_DIMS:
    return f"takes head sizes {HEAD_DIMS}, not {q_BHD.shape[-1]}"
  if k_PXD.shape[1] % PIECE:
    return f"takes pages of a multiple of {PIECE} keys, not {k_PXD.shape[1]}"
  if heads > _MOST_HEADS:
    return f"takes up to {_MOST_HEADS} query heads per key head, not {heads}"
  return None


def decode_attention(problem: Problem, scale: float, interpret=None):
  """See `api.decode_attention`.

  Args:
    problem: one that `why_not` has nothing against.
    scale: factor on the scores.
    interpret: of `plgpu.kernel`.
  """
  shape = _shape(problem, is_interpreted=interpret is not None)
  b, h, d = problem.q_BHD.shape
  g = h // problem.pages_BKM.shape[1]
  q_RGD = problem.q_BHD.reshape(shape.num_rows, g, d)
  # Rows of products that no head is there for.
  q_RQD = jnp.pad(q_RGD, [(0, 0), (0, shape.num_units * PIECE - g), (0, 0)])
  parts = _kernel(problem, q_RQD, shape, scale, interpret)

  parts = [x.reshape(shape.num_rows, shape.num_splits, *x.shape[1:])[:, :, :g] for x in parts]
  out_RGD, lse_RG = _add_parts(*parts)
  return out_RGD.reshape(b, h, d).astype(problem.q_BHD.dtype), lse_RG.reshape(b, h)


def _add_parts(total_RYGD, highest_RYG, norm_RYG):
  """Out and lse of what Y thread blocks have found each, of which some found nothing."""
  highest_RG = highest_RYG.max(1)
  factor_RYG = jnp.exp2(highest_RYG - highest_RG[:, None])
  norm_RG = (norm_RYG * factor_RYG).sum(1)
  total_RGD = (total_RYGD * factor_RYG[..., None]).sum(1)
  is_any_RG = norm_RG > 0.0
  norm_RG = jnp.where(is_any_RG, norm_RG, 1.0)
  lse_RG = jnp.where(is_any_RG, (highest_RG + jnp.log2(norm_RG)) / _LOG2E, -jnp.inf)
  return total_RGD / norm_RG[..., None], lse_RG


def _shape(problem: Problem, *, is_interpreted: bool) -> Shape:
  (p, x, d), (b, k, m) = problem.k_PXD.shape, problem.pages_BKM.shape
  num_units = -(-problem.q_BHD.shape[1] // (k * PIECE))
  return Shape(
    num_rows=b * k,
    num_units=num_units,
    num_slots=m,
    num_pages=p,
    page_size=x,
    head_dim=d,
    num_splits=shapes.num_splits(
      b * k, m * (x // PIECE), WARPS // num_units, devices.num_multiprocessors()
    ),
    has_bias=problem.key_bias_PX is not None,
    interpreted=is_interpreted,
  )


def _kernel(problem: Problem, q_RQD, shape: Shape, scale: float, interpret):
  """What every thread block has found: [R Y, 16 U, D], [R Y, 64] and [R Y, 64]."""
  config, d = shapes.config(shape.head_dim), shape.head_dim
  num_blocks, num_stages = shape.num_rows * shape.num_splits, WARPS * config.stages
  own_barriers = not shape.interpreted
  lists = {"pages": problem.pages_BKM, "begin": problem.begin_BKM, "end": problem.end_BKM}
  arrays = {
    "q": q_RQD,
    "k": problem.k_PXD.reshape(-1, PIECE, d),
    "v": problem.v_PXD.reshape(-1, PIECE, d),
    **{name: x.reshape(shape.num_rows, shape.num_slots) for name, x in lists.items()},
  }
  if shape.has_bias:
    arrays["bias"] = problem.key_bias_PX.reshape(-1, PIECE)

  def body(*refs, smem):
    gmem = dict(zip(arrays, refs[: len(arrays)], strict=True))
    block, thread = lax.axis_index("block"), lax.axis_index("thread")
    if own_barriers:
      mosaic_barrier.initialize([(smem["filled"], 1)], [])
      # No warp may begin before they are set up.
      plgpu.commit_smem()
    sums = Worker(shape, config, scale, gmem, smem, block, thread).run()
    own_refs = [ref.at[block] for ref in refs[len(arrays) :]]
    mosaic_gpu_together.store_sum(shape, smem, thread, sums, own_refs)

  tiled = plgpu.SMEM((num_stages * PIECE, d), jnp.bfloat16, transforms=mosaic_inline.TRANSFORMS)
  num_copies = 2 + shape.has_bias
  smem = dict(
    k=tiled,
    v=tiled,
    ranges=plgpu.SMEM((shape.num_threads, shape.warps.per_thread, config.stages), jnp.int32),
    filled=mosaic_barrier.scratch(num_stages, num_copies, own_barriers),
    **mosaic_gpu_together.scratch(shape),
  )
  if shape.has_bias:
    # Copies want rows of a multiple of 128 bytes.
    smem["bias"] = plgpu.SMEM((num_stages, 32), jnp.float32)
  total = jax.ShapeDtypeStruct((num_blocks, shape.num_units * PIECE, d), jnp.float32)
  numbers = jax.ShapeDtypeStruct((num_blocks, mosaic_gpu_together.ROWS), jnp.float32)
  return plgpu.kernel(
    body,
    out_type=[total, numbers, numbers],
    grid=(num_blocks,),
    grid_names=("block",),
    num_threads=shape.num_threads,
    thread_name="thread",
    kernel_name="decode_attention",
    scratch_types=dict(smem=smem),
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=interpret,
  )(*arrays.values())
