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


class Moba(nn.Module):
  """Block-sparse attention; run full, it reads every earlier key."""

  options: method.Options

  @nn.compact
  def __call__(self, q_BTHD, k_BTKD, v_BTKD, tokens, stream) -> method.Attended:
    if stream == "full":
      out_BTHD = full.full_stream(q_BTHD, k_BTKD, v_BTKD, tokens, self.options)
    else:
      out_BTHD = self._sparse(q_BTHD, k_BTKD, v_BTKD, tokens)
    return method.Attended(out_BTHD, jnp.float32(0))

  def _sparse(self, q_BTHD, k_BTKD, v_BTKD, tokens):
    options = self.options
    implementation = options.sparse_implementation
    implementation = None if implementation == "auto" else implementation

    segments_BT = tokens.segments_BT if options.document_mask == "both" else None
    heads, kv_heads = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
    segments = None if segments_BT is None else ("batch", None)

    def select(q_BTHD, k_BTKD, segments_BT):
      return pallas_kernels.select_blocks(
        q_BTHD,
        k_BTKD,
        block_size=options.block_size,
        # A row shorter than the budget is read whole.
        num_blocks=min(options.num_blocks, -(-q_BTHD.shape[1] // options.block_size)),
        segments_BS=segments_BT,
        rule=options.selection,
        implementation=implementation,
      )

    def attend(q_BTHD, k_BTKD, v_BTKD, blocks_BTKM, segments_BT):
      out_BTHD, _ = pallas_kernels.block_sparse_attention(
        q_BTHD,
        k_BTKD,
        v_BTKD,
        blocks_BTKM,
        block_size=options.block_size,
        segments_BS=segments_BT,
        implementation=implementation,
      )
      return out_BTHD

    blocks_BTKM = sharding.per_device(select, (heads, kv_heads, segments), kv_heads)(
      *jax.lax.stop_gradient((q_BTHD, k_BTKD)), segments_BT
    )
    out_BTHD = sharding.per_device(
      attend, (heads, kv_heads, kv_heads, kv_heads, segments), heads
    )(q_BTHD, k_BTKD, v_BTKD, blocks_BTKM, segments_BT)
    # For whoever looks: apply(..., mutable=["intermediates"]).
    self.sow("intermediates", "blocks", blocks_BTKM)
    return out_BTHD
