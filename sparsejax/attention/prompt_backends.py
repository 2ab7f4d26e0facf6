"""Which backends read prompts in chunks, asked before anything runs.

Letters: B batch, T tokens of a chunk, S tokens that there is room for, H query heads, K
key/value heads, D head size, M blocks listed.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

import pallas_kernels
from sparsejax import attention
from sparsejax.attention import backends, block_sparse, compression, method, pages


def choose(
  options: method.Options,
  stream: method.Stream,
  room: pages.Room,
  *,
  num_heads: int,
  chunk: int,
  lengths: Sequence[int] = (),
) -> list[pallas_kernels.Choice]:
  """What each operation of attention runs on while prompts are read, and why; each once.

  Args:
    options: settings of attention.
    stream: `full` or `sparse`.
    room: of the cache.
    num_heads: H.
    chunk: T.
    lengths: tokens that prompts are padded to; () is as many as there is room for. Short ones
      are read whole, by other operations than long ones.

  Raises:
    ConfigError: for each operation that cannot run on what was asked for, why not, and what
      to set.
  """
  layers = [options.of_layer(place) for place in range(len(options.pattern))]
  questions = [
    question
    for length in lengths or (room.length,)
    for own in layers
    for question in _Questions(room, num_heads, chunk, length).of_layer(own, stream)
  ]
  return list(dict.fromkeys(backends.answers(questions)))


class _Questions:
  """The operations as the methods call them, with shapes for arrays."""

  def __init__(self, room: pages.Room, num_heads: int, chunk: int, length: int):
    self._room = room
    # As `prefill.prefill` does.
    chunk = min(chunk, -(-length // room.page_size) * room.page_size)
    capacity = -(-length // chunk) * chunk
    self._length = min(capacity, room.length)
    k_BSKD = jax.ShapeDtypeStruct((1, capacity, room.num_kv_heads, room.head_dim), room.dtype)
    q_BTHD = jax.ShapeDtypeStruct((1, chunk, num_heads, room.head_dim), room.dtype)
    self._qkv = q_BTHD, k_BSKD, k_BSKD
    self._bias_BSK = jax.ShapeDtypeStruct(k_BSKD.shape[:-1], jnp.float32)

  def of_layer(self, own: method.Options, stream: method.Stream) -> list[backends.Question]:
    """What a layer runs: the key that names backends, and the question."""
    is_full = stream == "full" or own.is_always_full
    name, length = attention.sparse_name(own), self._length
    has_bias = "bias" in attention.remembers(own, stream, self._room.length)
    full = [("full_implementation", lambda: self.chunk_attention(own, has_bias, None))]
    if name == "sliding_window":
      window = [("full_implementation", lambda: self.chunk_attention(own, False, own.window))]
      return full if is_full else window
    blocks = [
      ("sparse_implementation", lambda: self.block_selection(own)),
      ("sparse_implementation", lambda: self.block_sparse_attention(own, has_bias)),
    ]
    if is_full or block_sparse.lists_everything(own, length):
      found = full
    else:
      dense_length = attention.sparse_method(own).dense_length(own)
      found = full * (dense_length > 1) + blocks * (length >= dense_length)
    if name != "nsa" or own.is_always_full or (is_full and own.method == "full"):
      return found
    branches = [
      ("full_implementation", lambda: self.compressed_attention(own)),
      ("full_implementation", lambda: self.chunk_attention(own, False, own.nsa.window)),
    ]
    return [*found, *branches]

  def chunk_attention(
    self, own: method.Options, has_bias: bool, window: int | None
  ) -> pallas_kernels.Choice:
    return pallas_kernels.choose_chunk_attention(
      *self._qkv,
      window=window,
      key_bias_BSK=self._bias_BSK if has_bias else None,
      implementation=own.full_backend,
    )

  def compressed_attention(self, own: method.Options) -> pallas_kernels.Choice:
    return compression.choose_chunk(
      *self._qkv[:2],
      size=own.nsa.compress_length,
      stride=own.nsa.compress_stride,
      implementation=own.full_backend,
    )

  def block_selection(self, own: method.Options) -> pallas_kernels.Choice:
    return pallas_kernels.choose_block_selection(
      *self._qkv[:2],
      block_size=own.block_size,
      num_blocks=own.num_listed(self._length),
      implementation=own.selection_backend,
      **attention.sparse_method(own).selection(own, self._length),
    )

  def block_sparse_attention(
    self, own: method.Options, has_bias: bool
  ) -> pallas_kernels.Choice:
    shape = *self._qkv[0].shape[:2], self._room.num_kv_heads
    listed = own.num_listed(self._length)
    return pallas_kernels.choose_block_sparse_attention(
      *self._qkv,
      jax.ShapeDtypeStruct((*shape, listed), jnp.int32),
      block_size=own.block_size,
      key_bias_BSK=self._bias_BSK if has_bias else None,
      implementation=own.sparse_backend,
    )
