"""What methods that select blocks share: choose lists, attend to them, run both streams.

Letters: B batch, T tokens, H query heads, K key/value heads, D head size, M blocks listed.
"""

import jax
import jax.numpy as jnp

import pallas_kernels
from sparsejax import sharding
from sparsejax.attention import full, method
from sparsejax.attention.method import HEADS, KEY_SCORES, KV_HEADS, SEGMENTS


class BlockSparse(method.SparseMethod):
  """Block-sparse attention; run full, it reads every earlier key.

  A method says what sets it apart: how blocks are chosen (`selection`) and, if it has them,
  what its scores of keys are.
  """

  def key_scores(self, v_BTKD) -> jax.Array | None:
    """Scores of keys, float32 [B, T, K]; None for a method without."""
    del v_BTKD

  def __call__(self, q_BTHD, k_BTKD, v_BTKD, tokens, stream) -> method.Attended:
    score_BTK = self.key_scores(v_BTKD)
    if score_BTK is not None:
      self.sow("intermediates", "key_bias", score_BTK)
    if stream == "full" or self.is_dense(self.options, q_BTHD.shape[1]):
      self.choose(q_BTHD, k_BTKD, v_BTKD, tokens)
      out_BTHD = full.full_stream(q_BTHD, k_BTKD, v_BTKD, tokens, self.options, score_BTK)
    else:
      out_BTHD = self._sparse(q_BTHD, k_BTKD, v_BTKD, tokens, score_BTK)
    return method.Attended(out_BTHD, jnp.float32(0))

  def both(self, q_BTHD, k_BTKD, v_BTKD, tokens) -> tuple[jax.Array, jax.Array]:
    options, score_BTK = self.options, self.key_scores(v_BTKD)
    if self.is_dense(options, q_BTHD.shape[1]):
      out_BTHD = full.full_stream(q_BTHD, k_BTKD, v_BTKD, tokens, options, score_BTK)
      return out_BTHD, out_BTHD

    def attend(q_BTHD, k_BTKD, v_BTKD, blocks_BTKM, full_segments_BT, sparse_segments_BT, bias):
      return pallas_kernels.dual_path_attention(
        q_BTHD,
        k_BTKD,
        v_BTKD,
        blocks_BTKM,
        block_size=options.block_size,
        full_segments_BT=full_segments_BT,
        sparse_segments_BT=sparse_segments_BT,
        max_documents=options.max_documents,
        key_bias_BTK=bias,
        full_implementation=options.full_backend,
        sparse_implementation=options.sparse_backend,
      )

    blocks_BTKM = self._select(q_BTHD, k_BTKD, tokens, score_BTK)
    axes = HEADS, KV_HEADS, KV_HEADS, KV_HEADS, SEGMENTS, SEGMENTS, KEY_SCORES
    segments = options.full_segments(tokens), options.sparse_segments(tokens)
    return sharding.per_device(attend, axes, (HEADS, HEADS))(
      q_BTHD, k_BTKD, v_BTKD, blocks_BTKM, *segments, score_BTK
    )

  def choose(self, q_BTHD, k_BTKD, v_BTKD, tokens) -> None:
    is_dense = self.is_dense(self.options, q_BTHD.shape[1])
    if self.is_mutable_collection("intermediates") and not is_dense:
      self._select(q_BTHD, k_BTKD, tokens, self.key_scores(v_BTKD))

  def _sparse(self, q_BTHD, k_BTKD, v_BTKD, tokens, score_BTK):
    blocks_BTKM = self._select(q_BTHD, k_BTKD, tokens, score_BTK)
    segments_BT = self.options.sparse_segments(tokens)
    return read(q_BTHD, k_BTKD, v_BTKD, blocks_BTKM, segments_BT, self.options, score_BTK)

  def _select(self, q_BTHD, k_BTKD, tokens, score_BTK):
    options, length = self.options, q_BTHD.shape[1]
    rules = self.selection(options, length)
    if "num_by_query" not in rules:
      score_BTK = None  # where everything is listed, keys have nothing to choose

    def select(q_BTHD, k_BTKD, segments_BT, score_BTK):
      return pallas_kernels.select_blocks(
        q_BTHD,
        k_BTKD,
        block_size=options.block_size,
        num_blocks=options.num_listed(length),
        segments_BS=segments_BT,
        key_score_BSK=score_BTK,
        implementation=options.selection_backend,
        **rules,
      )

    axes = HEADS, KV_HEADS, SEGMENTS, KEY_SCORES
    q_BTHD, k_BTKD, score_BTK = jax.lax.stop_gradient((q_BTHD, k_BTKD, score_BTK))
    blocks_BTKM = sharding.per_device(select, axes, KV_HEADS)(
      q_BTHD, k_BTKD, options.sparse_segments(tokens), score_BTK
    )
    # For whoever looks: apply(..., mutable=["intermediates"]).
    self.sow("intermediates", "blocks", blocks_BTKM)
    return blocks_BTKM


def read(
  q_BTHD,
  k_BTKD,
  v_BTKD,
  blocks_BTKM,
  segments_BT,
  options: method.Options,
  key_bias_BTK: jax.Array | None = None,
):
  """Attention [B, T, H, D] to the listed blocks, with a bias of each key if there is one."""

  def attend(q_BTHD, k_BTKD, v_BTKD, blocks_BTKM, segments_BT, bias_BTK):
    out_BTHD, _ = pallas_kernels.block_sparse_attention(
      q_BTHD,
      k_BTKD,
      v_BTKD,
      blocks_BTKM,
      block_size=options.block_size,
      segments_BS=segments_BT,
      key_bias_BSK=bias_BTK,
      implementation=options.sparse_backend,
    )
    return out_BTHD

  axes = HEADS, KV_HEADS, KV_HEADS, KV_HEADS, SEGMENTS, KEY_SCORES
  return sharding.per_device(attend, axes, HEADS)(
    q_BTHD, k_BTKD, v_BTKD, blocks_BTKM, segments_BT, key_bias_BTK
  )
