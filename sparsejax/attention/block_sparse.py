"""What methods that select blocks share: choose lists, attend to them, run both streams.

Letters: B batch, T tokens, H query heads, K key/value heads, D head size, M blocks listed.
"""

import jax
import jax.numpy as jnp

import pallas_kernels
from sparsejax import sharding
from sparsejax.attention import full, method
from sparsejax.attention import past as pasts
from sparsejax.attention.method import HEADS, KEY_SCORES, KV_HEADS, OFFSET, SEGMENTS


class BlockSparse(method.SparseMethod):
  """Block-sparse attention; run full, it reads every earlier key.

  A method says what sets it apart: how blocks are chosen (`selection`) and, if it has them,
  what its scores of keys are.
  """

  def key_scores(self, v_BTKD) -> jax.Array | None:
    """Scores of keys, float32 [B, T, K]; None for a method without."""
    del v_BTKD

  def __call__(
    self, q_BTHD, k_BTKD, v_BTKD, tokens, stream, past: method.Earlier = None
  ) -> method.Attended:
    score_BTK = self.key_scores(v_BTKD)
    if isinstance(past, method.Chunk):
      return self._prefill(q_BTHD, k_BTKD, v_BTKD, score_BTK, stream, past)
    if past is not None:
      return self._decode(q_BTHD, k_BTKD, v_BTKD, score_BTK, stream, past)
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

  @classmethod
  def remembers(cls, options, stream, length) -> dict[str, pasts.Kind]:
    kinds = dict(pasts.KEYS_AND_VALUES)
    if cls.has_key_scores:
      kinds["bias"] = pasts.Pages("key_bias", is_scalar=True)
    if stream == "full" or lists_everything(options, length):
      return kinds
    rules = cls.selection(options, length)
    size = options.block_size
    pooling = rules.get("pooling", pallas_kernels.Pooling(size, size, 0, 1))
    normalizer = rules.get("normalizer")
    most = pooling.size if normalizer is None else max(pooling.size, normalizer.size)
    kinds["last_keys"] = pasts.Last("keys", size=most)
    kinds["windows"] = pasts.Windows("keys", pooling=pooling, last="last_keys")
    if normalizer is not None:
      kinds["coarse"] = pasts.Windows("keys", pooling=normalizer, last="last_keys")
    if "num_by_query" in rules:
      kinds["last_bias"] = pasts.Last("key_bias", is_scalar=True, size=pooling.size)
      kinds["window_bias"] = pasts.Windows(
        "key_bias", is_scalar=True, pooling=pooling, last="last_bias"
      )
    return kinds

  def _prefill(self, q_BTHD, k_BTKD, v_BTKD, score_BTK, stream, chunk) -> method.Attended:
    """A chunk of prompts, with what came before it."""
    options = self.options
    scores = {} if score_BTK is None else dict(key_bias=score_BTK)
    chunk = chunk.add(keys=k_BTKD, values=v_BTKD, **scores)

    def dense():
      return full.full_of_chunk(q_BTHD, chunk, options)

    def sparse():
      keys, values = chunk.of_layer("keys"), chunk.of_layer("values")
      score_BSK = None if score_BTK is None else chunk.of_layer("key_bias")
      blocks_BTKM = self._list_chunk(q_BTHD, keys, None, score_BSK, chunk.length, chunk.offset)
      return read(q_BTHD, keys, values, blocks_BTKM, None, options, score_BSK, chunk.offset)

    if stream == "full" or lists_everything(options, chunk.length):
      out_BTHD = dense()
    else:
      out_BTHD = chunk.by_length(self.dense_length(options), dense, sparse)
    return method.Attended(out_BTHD, jnp.float32(0), chunk)

  def _decode(self, q_B1HD, k_B1KD, v_B1KD, score_B1K, stream, past) -> method.Attended:
    """One token per row, by the pages that it lists among those of the tokens before it."""
    scores = {} if score_B1K is None else dict(key_bias=score_B1K[:, 0])
    past = past.add(keys=k_B1KD[:, 0], values=v_B1KD[:, 0], **scores)
    q_BHD = q_B1HD[:, 0]
    if stream == "full" or lists_everything(self.options, past.room.length):
      pages_BKM = past.all_pages()
    else:
      pages_BKM = self._with_dense_rows(self.list_of_token(q_BHD, past), past)
      # For whoever looks: apply(..., mutable=["intermediates"]).
      self.sow("intermediates", "pages", pages_BKM)
    out_BHD, past = past.read(q_BHD, pages_BKM)
    return method.Attended(out_BHD[:, None], jnp.float32(0), past)

  def list_of_token(self, q_BHD, past: method.Past) -> jax.Array:
    """The blocks that a token of each row reads, [B, K, M]; -1 for none."""
    options, more = self.options, {}
    if "coarse" in past.kinds:
      more["coarse_keys_BWKD"] = past.of_layer("coarse")
    if "window_bias" in past.kinds:
      more["window_score_BWK"] = past.of_layer("window_bias")
    return pallas_kernels.select_blocks_of_token(
      q_BHD,
      past.of_layer("windows"),
      past.position_B,
      num_keys=past.room.length,
      block_size=options.block_size,
      num_blocks=options.num_listed(past.room.length),
      **self.selection(options, past.room.length),
      **more,
    )

  def _with_dense_rows(self, pages_BKM, past: method.Past):
    """Lists of which those of rows that are still short have every page."""
    dense = self.dense_length(self.options)
    num_dense = min(-(-dense // self.options.block_size), past.room.num_pages)
    if num_dense == 0:
      return pages_BKM
    b, k, m = pages_BKM.shape
    wide = max(m, num_dense)
    pages_BKM = jnp.pad(pages_BKM, [(0, 0), (0, 0), (0, wide - m)], constant_values=-1)
    every = jnp.broadcast_to(jnp.arange(wide), (b, k, wide))
    every = jnp.where(every < past.room.num_pages, every, -1)
    is_dense_B11 = (past.position_B + 1 < dense)[:, None, None]
    return jnp.where(is_dense_B11, every, pages_BKM)

  def _sparse(self, q_BTHD, k_BTKD, v_BTKD, tokens, score_BTK):
    blocks_BTKM = self._select(q_BTHD, k_BTKD, tokens, score_BTK)
    segments_BT = self.options.sparse_segments(tokens)
    return read(q_BTHD, k_BTKD, v_BTKD, blocks_BTKM, segments_BT, self.options, score_BTK)

  def _select(self, q_BTHD, k_BTKD, tokens, score_BTK):
    segments_BT, length = self.options.sparse_segments(tokens), q_BTHD.shape[1]
    blocks_BTKM = self._list_chunk(q_BTHD, k_BTKD, segments_BT, score_BTK, length)
    # For whoever looks: apply(..., mutable=["intermediates"]).
    self.sow("intermediates", "blocks", blocks_BTKM)
    return blocks_BTKM

  def _list_chunk(self, q_BTHD, k_BSKD, segments_BS, score_BSK, length: int, offset=None):
    """Lists of queries from `offset` on, by the rules of rows of `length` tokens."""
    options, rules = self.options, self.selection(self.options, length)
    if "num_by_query" not in rules:
      score_BSK = None  # where everything is listed, keys have nothing to choose

    def select(q_BTHD, k_BSKD, segments_BS, score_BSK, offset):
      return pallas_kernels.select_blocks(
        q_BTHD,
        k_BSKD,
        block_size=options.block_size,
        num_blocks=options.num_listed(length),
        query_offset=0 if offset is None else offset,
        segments_BS=segments_BS,
        key_score_BSK=score_BSK,
        implementation=options.selection_backend,
        **rules,
      )

    axes = HEADS, KV_HEADS, SEGMENTS, KEY_SCORES, OFFSET
    q_BTHD, k_BSKD, score_BSK = jax.lax.stop_gradient((q_BTHD, k_BSKD, score_BSK))
    return sharding.per_device(select, axes, KV_HEADS)(
      q_BTHD, k_BSKD, segments_BS, score_BSK, offset
    )


def lists_everything(options: method.Options, length: int) -> bool:
  """Whether every query of a row of so many tokens reads every earlier key."""
  return options.num_listed(length) * options.block_size >= length


def read(
  q_BTHD,
  k_BSKD,
  v_BSKD,
  blocks_BTKM,
  segments_BS,
  options: method.Options,
  key_bias_BSK: jax.Array | None = None,
  offset: jax.Array | None = None,
):
  """Attention [B, T, H, D] to the listed blocks, with a bias of each key if there is one.

  The first query is at position `offset` of the keys; None is 0.
  """

  def attend(q_BTHD, k_BSKD, v_BSKD, blocks_BTKM, segments_BS, bias_BSK, offset):
    out_BTHD, _ = pallas_kernels.block_sparse_attention(
      q_BTHD,
      k_BSKD,
      v_BSKD,
      blocks_BTKM,
      block_size=options.block_size,
      query_offset=0 if offset is None else offset,
      segments_BS=segments_BS,
      key_bias_BSK=bias_BSK,
      implementation=options.sparse_backend,
    )
    return out_BTHD

  axes = HEADS, KV_HEADS, KV_HEADS, KV_HEADS, SEGMENTS, KEY_SCORES, OFFSET
  return sharding.per_device(attend, axes, HEADS)(
    q_BTHD, k_BSKD, v_BSKD, blocks_BTKM, segments_BS, key_bias_BSK, offset
  )
