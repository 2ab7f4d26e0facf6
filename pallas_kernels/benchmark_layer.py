"""What the benchmark times around the attention kernels: selection, and whole SSA layers."""

import functools

import jax
from jax.experimental.pallas.ops.gpu import attention_mgpu

from pallas_kernels.block_selection.api import select_blocks
from pallas_kernels.dual_path_attention.api import dual_path_attention


def selection_passes(call, *, block_size: int, num_blocks: int):
  """Selection alone, and with the lists that the forward kernel reads, by name.

  Both are functions of queries, keys and bounds.
  """
  select = functools.partial(
    select_blocks, block_size=block_size, num_blocks=num_blocks, implementation="mosaic_gpu"
  )

  def alone(q_BTHD, k_BTKD, bounds):
    del bounds
    return select(q_BTHD, k_BTKD)

  def with_lists(q_BTHD, k_BTKD, bounds):
    return call.make_lists(select(q_BTHD, k_BTKD), bounds)[1]

  return {"selection": alone, "selection and lists of query tiles": with_lists}


def dense_in_mosaic(q_BTHD, k_BTKD, v_BTKD):
  """Pallas' own dense causal attention, unscaled, in Mosaic; it takes float16.

  One pass for both streams of SSA would be this kernel and more. What it takes beyond
  cuDNN's must then be less than the sparse kernels take, or two passes are faster.
  """
  config = attention_mgpu.TuningConfig(
    block_q=128, block_kv=128, max_concurrent_steps=2, causal=True
  )
  return attention_mgpu.attention(q_BTHD, k_BTKD, v_BTKD, config)


def dual_path(q_BTHD, k_BTKD, v_BTKD, blocks_BTKM, dfull_BTHD, dsparse_BTHD, *, block_size):
  """Both streams of SSA and their gradients."""

  def of(q, k, v):
    return dual_path_attention(
      q,
      k,
      v,
      blocks_BTKM,
      block_size=block_size,
      full_implementation="cudnn",
      sparse_implementation="mosaic_gpu",
    )

  return jax.vjp(of, q_BTHD, k_BTKD, v_BTKD)[1]((dfull_BTHD, dsparse_BTHD))


def layer(q_BTHD, k_BTKD, v_BTKD, dout_BTHD, *, attend, block_size: int, num_blocks: int):
  """A sparse layer's selection, attention and gradients."""
  blocks_BTKM = select_blocks(
    q_BTHD,
    k_BTKD,
    block_size=block_size,
    num_blocks=num_blocks,
    implementation="mosaic_gpu",
  )
  return jax.vjp(lambda *x: attend(*x, blocks_BTKM), q_BTHD, k_BTKD, v_BTKD)[1](dout_BTHD)
