"""Sliding-window attention: every query reads the keys right before it.

As a method of its own (Longformer, arXiv:2004.05150; Mistral, arXiv:2310.06825) and as one of
NSA's branches (arXiv:2502.11089, section 3.3.3).
"""

from flax import linen as nn
import jax.numpy as jnp

import pallas_kernels
from sparsejax import sharding
from sparsejax.attention import full, method
from sparsejax.attention.method import HEADS, KV_HEADS, SEGMENTS


class SlidingWindow(method.SparseMethod):
  """The last `options.window` keys of the query's document; run full, every earlier key."""

  @nn.compact
  def __call__(self, q_BTHD, k_BTKD, v_BTKD, tokens, stream) -> method.Attended:
    options = self.options
    if stream == "full":
      out_BTHD = full.full_stream(q_BTHD, k_BTKD, v_BTKD, tokens, options)
    else:
      segments_BT = options.sparse_segments(tokens)
      out_BTHD = attend(q_BTHD, k_BTKD, v_BTKD, segments_BT, options.window, options)
    return method.Attended(out_BTHD, jnp.float32(0))


def attend(q_BTHD, k_BTKD, v_BTKD, segments_BT, window: int, options: method.Options):
  """Attention [B, T, H, D] to the last `window` keys, the query's own among them.

  It stops at the borders of segments, if there are any.
  """

  def run(q_BTHD, k_BTKD, v_BTKD, segments_BT):
    return pallas_kernels.full_attention(
      q_BTHD,
      k_BTKD,
      v_BTKD,
      segments_BT=segments_BT,
      max_documents=options.max_documents,
      window=window,
      implementation=options.full_backend,
    )

  axes = HEADS, KV_HEADS, KV_HEADS, SEGMENTS
  return sharding.per_device(run, axes, HEADS)(q_BTHD, k_BTKD, v_BTKD, segments_BT)
