"""MoBA (arXiv:2502.13189) as SSA trains it: read your own block and the best earlier ones.

Blocks are scored by softmax-normalised products with mean keys, summed over the query heads
of a group, which share one list (arXiv:2511.20102, section 4.1 and released code).
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

import pallas_kernels
from sparsejax import sharding
from sparsejax.attention import full, method
from sparsejax.attention.method import HEADS, KV_HEADS, SEGMENTS


class Moba(method.SparseMethod):
  """Block-sparse attention; run full, it reads every earlier key."""

  @nn.compact
  def __call__(self, q_BTHD, k_BTKD, v_BTKD, tokens, stream) -> method.Attended:
    if stream == "full":
      out_BTHD = full.full_stream(q_BTHD, k_BTKD, v_BTKD, tokens, self.options)
    else:
      out_BTHD = self._sparse(q_BTHD, k_BTKD, v_BTKD, tokens)
    return method.Attended(out_BTHD, jnp.float32(0))

  def both(self, q_BTHD, k_BTKD, v_BTKD, tokens) -> tuple[jax.Array, jax.Array]:
    options = self.options

    def attend(q_BTHD, k_BTKD, v_BTKD, blocks_BTKM, full_segments_BT, sparse_segments_BT):
      return pallas_kernels.dual_path_attention(
        q_BTHD,
        k_BTKD,
        v_BTKD,
        blocks_BTKM,
        block_size=options.block_size,
        full_segments_BT=full_segments_BT,
        sparse_segments_BT=sparse_segments_BT,
        max_documents=options.max_documents,
        full_implementation=options.full_backend,
        sparse_implementation=options.sparse_backend,
      )

    blocks_BTKM = self._select(q_BTHD, k_BTKD, tokens)
    axes = HEADS, KV_HEADS, KV_HEADS, KV_HEADS, SEGMENTS, SEGMENTS
    segments = options.full_segments(tokens), options.sparse_segments(tokens)
    return sharding.per_device(attend, axes, (HEADS, HEADS))(
      q_BTHD, k_BTKD, v_BTKD, blocks_BTKM, *segments
    )

  def _sparse(self, q_BTHD, k_BTKD, v_BTKD, tokens):
    options = self.options

    def attend(q_BTHD, k_BTKD, v_BTKD, blocks_BTKM, segments_BT):
      out_BTHD, _ = pallas_kernels.block_sparse_attention(
        q_BTHD,
        k_BTKD,
        v_BTKD,
        blocks_BTKM,
        block_size=options.block_size,
        segments_BS=segments_BT,
        implementation=options.sparse_backend,
      )
      return out_BTHD

    blocks_BTKM = self._select(q_BTHD, k_BTKD, tokens)
    axes = HEADS, KV_HEADS, KV_HEADS, KV_HEADS, SEGMENTS
    return sharding.per_device(attend, axes, HEADS)(
      q_BTHD, k_BTKD, v_BTKD, blocks_BTKM, options.sparse_segments(tokens)
    )

  def _select(self, q_BTHD, k_BTKD, tokens):
    options = self.options

    def select(q_BTHD, k_BTKD, segments_BT):
      return pallas_kernels.select_blocks(
        q_BTHD,
        k_BTKD,
        block_size=options.block_size,
        num_blocks=options.num_listed(q_BTHD.shape[1]),
        segments_BS=segments_BT,
        rule=options.selection,
        implementation=options.selection_backend,
      )

    blocks_BTKM = sharding.per_device(select, (HEADS, KV_HEADS, SEGMENTS), KV_HEADS)(
      *jax.lax.stop_gradient((q_BTHD, k_BTKD)), options.sparse_segments(tokens)
    )
    # For whoever looks: apply(..., mutable=["intermediates"]).
    self.sow("intermediates", "blocks", blocks_BTKM)
    return blocks_BTKM
