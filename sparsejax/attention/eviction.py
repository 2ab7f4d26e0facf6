"""The eviction head of DMA and NOSA: how much a key matters, whoever asks.

Letters: B batch, T tokens, K key/value heads, D head size.
"""

from typing import Literal

from flax import linen as nn
import jax
import jax.numpy as jnp

type Kind = Literal["ed_dma", "dma"]

KINDS = ("ed_dma", "dma")


class EvictionHead(nn.Module):
  """A score per token and key head from the token's values (DMA, arXiv:2508.02124).

  With v all key heads' values of a token, concatenated, and A a number per key head:

    ed_dma  s = A softplus(v W)        NOSA's (arXiv:2510.13602): what is exponentiated in the
                                       softmax when it is added to the scores as a bias
    dma     s = exp(A softplus(v W))   DMA's own: exponentiated before it is a score and a bias

  A begins at 0, as in the released code, where every key scores the same and attention is
  what it is without a bias; equal blocks are then chosen from the beginning on. W has no
  gradient yet, but A has, so that it moves first.
  """

  kind: Kind

  @nn.compact
  def __call__(self, v_BTKD) -> jax.Array:
    """Returns the scores, float32 [B, T, K]: bfloat16 would tie keys that differ by 0.4%."""
    k, d = v_BTKD.shape[2:]
    # Products over the key heads that a device has are added up over devices.
    init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=(0, 1))
    init = nn.with_logical_partitioning(init, ("kv_heads", "head_dim", None))
    kernel_KDK = self.param("kernel", init, (k, d, k))
    # Called a scale so that weight decay leaves it alone, like those of norms.
    zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("kv_heads",))
    scale_K = self.param("scale", zeros, (k,))
    kernel_KDK = kernel_KDK.astype(v_BTKD.dtype)
    if v_BTKD.shape[1] == 1:
      # One kernel for single tokens; for a product XLA makes three, two of which copy operands.
      terms = v_BTKD.astype(jnp.float32)[..., None] * kernel_KDK.astype(jnp.float32)[None, None]
      x_BTK = terms.sum((2, 3))
    else:
      x_BTK = jnp.einsum(
        "btkd,kdj->btj", v_BTKD, kernel_KDK, preferred_element_type=jnp.float32
      )
    score_BTK = scale_K[None, None] * jax.nn.softplus(x_BTK)
    return jnp.exp(score_BTK) if self.kind == "dma" else score_BTK
