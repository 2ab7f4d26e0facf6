"""Full causal attention within documents."""

from flax import linen as nn
import jax
import jax.numpy as jnp

import pallas_kernels
from sparsejax import sharding
from sparsejax.attention import method


class Full(nn.Module):
  """Full attention; run sparse, it reads what `sparse` reads, if there is such a method."""

  options: method.Options
  sparse: nn.Module | None

  def __call__(
    self, q_BTHD, k_BTKD, v_BTKD, tokens, stream, past: method.Earlier = None
  ) -> method.Attended:
    if self.is_initializing() and self.sparse is not None:
      # What selects may have parameters; they are there whatever training runs.
      self.sparse(q_BTHD, k_BTKD, v_BTKD, tokens, "sparse")
    if stream == "sparse" and self.sparse is not None:
      return self.sparse(q_BTHD, k_BTKD, v_BTKD, tokens, stream, past)
    if isinstance(past, method.Chunk):
      # What is read whole, and will be decoded sparse.
      is_scored = "key_bias" in past.arrays
      scores = dict(key_bias=self.sparse.key_scores(v_BTKD)) if is_scored else {}
      past = past.add(keys=k_BTKD, values=v_BTKD, **scores)
      keys, values = past.of_layer("keys"), past.of_layer("values")
      out_BTHD = attend_of_chunk(q_BTHD, keys, values, past.offset, self.options)
      return method.Attended(out_BTHD, jnp.float32(0), past)
    if past is not None:
      past = past.add(keys=k_BTKD[:, 0], values=v_BTKD[:, 0])
      out_BHD, past = past.read(q_BTHD[:, 0], past.all_pages())
      return method.Attended(out_BHD[:, None], jnp.float32(0), past)
    if self.sparse is not None:
      self.sparse.choose(q_BTHD, k_BTKD, v_BTKD, tokens)
    out_BTHD = full_stream(q_BTHD, k_BTKD, v_BTKD, tokens, self.options)
    return method.Attended(out_BTHD, jnp.float32(0))


def full_stream(
  q_BTHD,
  k_BTKD,
  v_BTKD,
  tokens: method.Tokens,
  options: method.Options,
  key_bias_BTK: jax.Array | None = None,
):
  """The full stream of every method that scores keys by their product with the query.

  A bias of each key is added to the scaled scores.
  """
  segments_BT = options.full_segments(tokens)
  return attend(q_BTHD, k_BTKD, v_BTKD, segments_BT, options, key_bias_BTK=key_bias_BTK)


def full_of_chunk(
  q_BTHD, chunk: method.Chunk, options: method.Options, *, window: int | None = None
):
  """The same for a chunk of prompts that layers know; to the last keys if there is a window."""
  keys, values = chunk.of_layer("keys"), chunk.of_layer("values")
  bias = chunk.of_layer("key_bias") if "key_bias" in chunk.arrays else None
  return attend_of_chunk(
    q_BTHD, keys, values, chunk.offset, options, window=window, key_bias_BSK=bias
  )


def attend(
  q_BTHD,
  k_BTKD,
  v_BTKD,
  segments_BT,
  options: method.Options,
  *,
  window: int | None = None,
  key_bias_BTK: jax.Array | None = None,
):
  """Attention [B, T, H, D] to earlier keys of the same segment, if there are segments.

  To the last `window` of them, the query's own included, if there is a window; with a bias of
  each key, if there is one.
  """

  def run(q_BTHD, k_BTKD, v_BTKD, segments_BT, key_bias_BTK):
    return pallas_kernels.full_attention(
      q_BTHD,
      k_BTKD,
      v_BTKD,
      segments_BT=segments_BT,
      max_documents=options.max_documents,
      window=window,
      key_bias_BTK=key_bias_BTK,
      implementation=options.full_backend,
    )

  heads = method.HEADS, method.KV_HEADS, method.KV_HEADS
  axes = *heads, method.SEGMENTS, method.KEY_SCORES
  return sharding.per_device(run, axes, method.HEADS)(
    q_BTHD, k_BTKD, v_BTKD, segments_BT, key_bias_BTK
  )


def attend_of_chunk(
  q_BTHD,
  k_BSKD,
  v_BSKD,
  offset,
  options: method.Options,
  *,
  window: int | None = None,
  key_bias_BSK: jax.Array | None = None,
):
  """The same of a chunk of single documents, [B, T, H, D], to keys of the chunk and before.

  The first query is at position `offset` of the keys.
  """

  def run(q_BTHD, k_BSKD, v_BSKD, offset, key_bias_BSK):
    return pallas_kernels.chunk_attention(
      q_BTHD,
      k_BSKD,
      v_BSKD,
      offset,
      window=window,
      key_bias_BSK=key_bias_BSK,
      implementation=options.full_backend,
    )

  heads = method.HEADS, method.KV_HEADS, method.KV_HEADS
  axes = *heads, method.OFFSET, method.KEY_SCORES
  return sharding.per_device(run, axes, method.HEADS)(
    q_BTHD, k_BSKD, v_BSKD, offset, key_bias_BSK
  )
