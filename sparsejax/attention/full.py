"""Full causal attention within documents."""

from flax import linen as nn
import jax.numpy as jnp

import pallas_kernels
from sparsejax import sharding
from sparsejax.attention import method


class Full(nn.Module):
  """Full attention; run sparse, it reads what `sparse` reads, if there is such a method."""

  options: method.Options
  sparse: nn.Module | None

  def __call__(self, q_BTHD, k_BTKD, v_BTKD, tokens, stream) -> method.Attended:
    if stream == "sparse" and self.sparse is not None:
      return self.sparse(q_BTHD, k_BTKD, v_BTKD, tokens, stream)
    out_BTHD = full_stream(q_BTHD, k_BTKD, v_BTKD, tokens, self.options)
    return method.Attended(out_BTHD, jnp.float32(0))


def full_stream(q_BTHD, k_BTKD, v_BTKD, tokens: method.Tokens, options: method.Options):
  """The full stream of every method that scores keys by their product with the query."""

  def attend(q_BTHD, k_BTKD, v_BTKD, segments_BT):
    return pallas_kernels.full_attention(
      q_BTHD,
      k_BTKD,
      v_BTKD,
      segments_BT=segments_BT,
      max_documents=options.max_documents,
      implementation=options.full_backend,
    )

  axes = method.HEADS, method.KV_HEADS, method.KV_HEADS, method.SEGMENTS
  segments_BT = options.full_segments(tokens)
  return sharding.per_device(attend, axes, method.HEADS)(q_BTHD, k_BTKD, v_BTKD, segments_BT)
