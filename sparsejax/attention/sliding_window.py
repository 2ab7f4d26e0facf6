"""Sliding-window attention: every query reads the keys right before it.

As a method of its own (Longformer, arXiv:2004.05150; Mistral, arXiv:2310.06825) and as one of
NSA's branches (arXiv:2502.11089, section 3.3.3).
"""

from flax import linen as nn
import jax.numpy as jnp

from sparsejax.attention import full, method
from sparsejax.attention import past as pasts


class SlidingWindow(method.SparseMethod):
  """The last `options.window` keys of the query's document; run full, every earlier key."""

  @classmethod
  def most_pages(cls, options, length) -> int:
    del length
    return pasts.num_pages_of_window(options.window, options.block_size)

  @nn.compact
  def __call__(
    self, q_BTHD, k_BTKD, v_BTKD, tokens, stream, past: method.Earlier = None
  ) -> method.Attended:
    options = self.options
    if isinstance(past, method.Chunk):
      past = past.add(keys=k_BTKD, values=v_BTKD)
      window = None if stream == "full" else options.window
      out_BTHD = full.full_of_chunk(q_BTHD, past, options, window=window)
      return method.Attended(out_BTHD, jnp.float32(0), past)
    if past is not None:
      past = past.add(keys=k_BTKD[:, 0], values=v_BTKD[:, 0])
      if stream == "full":
        out_BHD, past = past.read(q_BTHD[:, 0], past.all_pages())
      else:
        out_BHD, past = past.read_window(q_BTHD[:, 0], options.window)
      return method.Attended(out_BHD[:, None], jnp.float32(0), past)
    if stream == "full":
      out_BTHD = full.full_stream(q_BTHD, k_BTKD, v_BTKD, tokens, options)
    else:
      segments_BT = options.sparse_segments(tokens)
      out_BTHD = full.attend(
        q_BTHD, k_BTKD, v_BTKD, segments_BT, options, window=options.window
      )
    return method.Attended(out_BTHD, jnp.float32(0))
