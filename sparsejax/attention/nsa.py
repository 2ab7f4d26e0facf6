"""NSA, Native Sparse Attention (arXiv:2502.11089): three branches, each with a gate.

Every query attends to windows made one key each (compression), to the blocks that those
windows say matter (selection), and to the keys right before it (sliding window); equation 5.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

import pallas_kernels
from sparsejax import sharding
from sparsejax.attention import block_sparse, compression, full, method, rotary
from sparsejax.attention import past as pasts
from sparsejax.attention.method import HEADS, KV_HEADS, OFFSET, SEGMENTS
from sparsejax.attention.product import Product


class Nsa(method.SparseMethod):
  """The sum of three branches, gated by a sigmoid per branch, head and token.

  Run full, the selection branch reads every earlier key and the others stay as they are: what
  SSA's paper (arXiv:2511.20102) calls cmp + full + swa.
  """

  @nn.compact
  def __call__(
    self, q_BTHD, k_BTKD, v_BTKD, tokens, stream, past: method.Earlier = None
  ) -> method.Attended:
    keys_and_values = {
      "slc": (k_BTKD, v_BTKD),
      "cmp": self._project("cmp", k_BTKD, v_BTKD, tokens),
      "win": self._project("win", k_BTKD, v_BTKD, tokens),
    }
    if isinstance(past, method.Chunk):
      branches, past = self._branches_of_chunk(q_BTHD, keys_and_values, stream, past)
    elif past is None:
      branches = self._branches(q_BTHD, keys_and_values, tokens, stream)
    else:
      branches, past = self._branches_of_token(q_BTHD, keys_and_values, stream, past)
    gates_BTCH = self._gates(tokens, q_BTHD)
    out_BTHD = sum(
      gates_BTCH[:, :, i, :, None] * branch_BTHD for i, branch_BTHD in enumerate(branches)
    )
    return method.Attended(out_BTHD, jnp.float32(0), past)

  def _branches(self, q_BTHD, keys_and_values, tokens, stream) -> tuple[jax.Array, ...]:
    """Outputs of compression, selection and window, [B, T, H, D] each."""
    options, nsa = self.options, self.options.nsa
    is_full = stream == "full"
    segments_BT = (options.full_segments if is_full else options.sparse_segments)(tokens)
    compressed = [
      self._compress(name, x_BTKD, segments_BT)
      for name, x_BTKD in zip("kv", keys_and_values["cmp"], strict=True)
    ]
    k_BTKD, v_BTKD = keys_and_values["slc"]
    if is_full:
      if self.is_mutable_collection("intermediates"):
        self._select(q_BTHD, compressed[0], k_BTKD, segments_BT)
      selected_BTHD = full.full_stream(q_BTHD, k_BTKD, v_BTKD, tokens, options)
    else:
      blocks_BTKM = self._select(q_BTHD, compressed[0], k_BTKD, segments_BT)
      selected_BTHD = block_sparse.read(
        q_BTHD, k_BTKD, v_BTKD, blocks_BTKM, segments_BT, options
      )
    return (
      self._attend_to_windows(q_BTHD, *compressed, segments_BT),
      selected_BTHD,
      full.attend(q_BTHD, *keys_and_values["win"], segments_BT, options, window=nsa.window),
    )

  @classmethod
  def remembers(cls, options, stream, length) -> dict[str, pasts.Kind]:
    del stream, length  # compression and window are the same in both streams
    nsa = options.nsa
    pooling = nsa.pooling(options.block_size)
    kinds = dict(pasts.KEYS_AND_VALUES)
    for short, name in (("k", "keys"), ("v", "values")):
      kinds[f"last_{short}"] = pasts.Last(f"{name}_cmp", size=nsa.compress_length)
      kinds[f"windows_{short}"] = pasts.Windows(f"{name}_windows", pooling=pooling)
      if nsa.kv == "separate":
        kinds[f"win_{short}"] = pasts.Last(f"{name}_win", size=nsa.window)
    return kinds

  @classmethod
  def most_pages(cls, options, length) -> int:
    most, nsa = super().most_pages(options, length), options.nsa
    if nsa.kv == "separate":
      return most
    return max(most, pasts.num_pages_of_window(nsa.window, options.block_size))

  def _branches_of_chunk(self, q_BTHD, keys_and_values, stream, chunk: method.Chunk):
    """The same for a chunk of prompts, and what is known of these with it."""
    options, nsa = self.options, self.options.nsa
    tokens = {"keys": keys_and_values["slc"][0], "values": keys_and_values["slc"][1]}
    for branch in ("cmp", "win"):
      for name, x in zip(("keys", "values"), keys_and_values[branch], strict=True):
        tokens[f"{name}_{branch}"] = x
    recent = {}
    if nsa.kv == "separate":
      recent = {
        name: chunk.from_first(name, tokens[name]) for name in ("keys_win", "values_win")
      }
    for short, name in (("k", "keys"), ("v", "values")):
      # A window that ends in the chunk begins less than its length before it.
      since_BTKD = chunk.since_last(f"{name}_cmp", tokens[f"{name}_cmp"])[
        :, nsa.compress_stride :
      ]
      windows_BWKD = self._compress(short, since_BTKD, None)
      chunk = chunk.add_windows(f"{name}_windows", windows_BWKD, nsa.compress_stride)
    chunk = chunk.add(**tokens)

    compressed = chunk.windows("keys_windows"), chunk.windows("values_windows")
    if stream == "full" or block_sparse.lists_everything(options, chunk.length):
      selected_BTHD = full.full_of_chunk(q_BTHD, chunk, options)
    else:
      keys, values = chunk.of_layer("keys"), chunk.of_layer("values")
      blocks_BTKM = self._list_chunk(
        q_BTHD, compressed[0], keys, None, chunk.length, chunk.offset
      )
      selected_BTHD = block_sparse.read(
        q_BTHD, keys, values, blocks_BTKM, None, options, None, chunk.offset
      )
    if nsa.kv == "shared":
      window_BTHD = full.full_of_chunk(q_BTHD, chunk, options, window=nsa.window)
    else:
      (keys, begins), (values, _) = recent["keys_win"], recent["values_win"]
      window_BTHD = full.attend_of_chunk(
        q_BTHD, keys, values, begins, options, window=nsa.window
      )
    compressed_BTHD = self._attend_to_windows(q_BTHD, *compressed, None, chunk.offset)
    return (compressed_BTHD, selected_BTHD, window_BTHD), chunk

  def _branches_of_token(self, q_B1HD, keys_and_values, stream, past: method.Past):
    """The same for one token per row, and its past with it."""
    options, nsa = self.options, self.options.nsa
    token = {"keys": keys_and_values["slc"][0], "values": keys_and_values["slc"][1]}
    for branch in ("cmp", "win"):
      for name, x in zip(("keys", "values"), keys_and_values[branch], strict=True):
        token[f"{name}_{branch}"] = x
    past = past.add(**{name: x_B1KD[:, 0] for name, x_B1KD in token.items()})
    for name in "kv":
      window_B1KD = self._compress(name, past.of_layer(f"last_{name}"), None)
      past = past.add_window(f"windows_{name}", window_B1KD[:, 0])

    q_BHD, keys_BWKD = q_B1HD[:, 0], past.of_layer("windows_k")
    compressed_BHD = compression.attend_of_token(
      q_BHD,
      keys_BWKD,
      past.of_layer("windows_v"),
      past.position_B,
      size=nsa.compress_length,
      stride=nsa.compress_stride,
    )
    if stream == "full" or block_sparse.lists_everything(options, past.room.length):
      pages_BKM = past.all_pages()
    else:
      pages_BKM = pallas_kernels.select_blocks_of_token(
        q_BHD,
        keys_BWKD,
        past.position_B,
        num_keys=past.room.length,
        block_size=options.block_size,
        num_blocks=options.num_listed(past.room.length),
        **self.selection(options, past.room.length),
      )
    selected_BHD, past = past.read(q_BHD, pages_BKM)
    if nsa.kv == "shared":
      window_BHD, past = past.read_window(q_BHD, nsa.window)
    else:
      window_BHD = past.read_last(q_BHD, "win_k", "win_v")
    branches = compressed_BHD, selected_BHD, window_BHD
    return tuple(x_BHD[:, None] for x_BHD in branches), past

  def _project(self, branch: str, k_BTKD, v_BTKD, tokens):
    """Keys and values of a branch: its own of the layer's input, or those of the layer."""
    if self.options.nsa.kv == "shared":
      return k_BTKD, v_BTKD
    x_BTE = tokens.inputs_BTE

    def project(name):
      shape = (x_BTE.shape[-1], *k_BTKD.shape[2:])
      axes = "embed", "kv_heads", "head_dim"
      product = Product(
        "bte,ekd->btkd", shape, axes, self.kernel_init, k_BTKD.dtype, name=f"{name}_{branch}"
      )
      return sharding.constrain(product(x_BTE), "batch", "length", "kv_heads", None)

    return rotary.rotate(project("k"), tokens.angles_BTD), project("v")

  def _gates(self, tokens, q_BTHD):
    """Of compression, selection and window [B, T, 3, H]; the paper's MLP is one product here,
    as in released implementations."""
    x_BTE, heads = tokens.inputs_BTE, q_BTHD.shape[2]
    shape, axes = (x_BTE.shape[-1], 3, heads), ("embed", None, "heads")
    product = Product(
      "bte,ech->btch", shape, axes, self.kernel_init, q_BTHD.dtype, name="branch_gate"
    )
    return nn.sigmoid(product(x_BTE))

  def _compress(self, name: str, x_BTKD, segments_BT):
    nsa = self.options.nsa
    sizes = dict(size=nsa.compress_length, stride=nsa.compress_stride)
    if nsa.compression == "mean":
      return compression.mean(x_BTKD, segments_BT, **sizes)
    mlp = compression.Mlp(**sizes, kernel_init=self.kernel_init, name=f"{name}_compress")
    return mlp(x_BTKD, segments_BT)

  def _attend_to_windows(self, q_BTHD, keys_BWKD, values_BWKD, segments_BT, offset=None):
    options, nsa = self.options, self.options.nsa
    sizes = dict(size=nsa.compress_length, stride=nsa.compress_stride)

    def attend(q_BTHD, keys_BWKD, values_BWKD, segments_BT, offset):
      windows, backend = (keys_BWKD, values_BWKD), options.full_backend
      if offset is not None:
        return compression.attend_of_chunk(
          q_BTHD, *windows, offset, **sizes, implementation=backend
        )
      return compression.attend(
        q_BTHD,
        *windows,
        segments_BT,
        **sizes,
        max_documents=options.max_documents,
        implementation=backend,
      )

    axes = HEADS, KV_HEADS, KV_HEADS, SEGMENTS, OFFSET
    return sharding.per_device(attend, axes, HEADS)(
      q_BTHD, keys_BWKD, values_BWKD, segments_BT, offset
    )

  @classmethod
  def selection(cls, options: method.Options, length: int) -> dict[str, Any]:
    nsa, num_blocks = options.nsa, options.num_listed(length)
    # A budget of less than the forced blocks is spent on the nearest of them.
    num_local = min(nsa.num_local, num_blocks)
    return super().selection(options, length) | dict(
      num_initial=min(nsa.num_initial, num_blocks - num_local),
      num_local=num_local,
      pooling=nsa.pooling(options.block_size),
    )

  def _select(self, q_BTHD, keys_BWKD, k_BTKD, segments_BT):
    blocks_BTKM = self._list_chunk(q_BTHD, keys_BWKD, k_BTKD, segments_BT, q_BTHD.shape[1])
    # For whoever looks: apply(..., mutable=["intermediates"]).
    self.sow("intermediates", "blocks", blocks_BTKM)
    return blocks_BTKM

  def _list_chunk(self, q_BTHD, keys_BWKD, k_BSKD, segments_BS, length: int, offset=None):
    """Equations 8 to 12: blocks by the probabilities of the windows that overlap them.

    Of queries from `offset` on, by the rules of rows of `length` tokens.
    """
    options = self.options

    def select(q_BTHD, keys_BWKD, k_BSKD, segments_BS, offset):
      return pallas_kernels.select_blocks(
        q_BTHD,
        k_BSKD,
        block_size=options.block_size,
        num_blocks=options.num_listed(length),
        query_offset=0 if offset is None else offset,
        segments_BS=segments_BS,
        window_keys_BWKD=keys_BWKD,
        implementation=options.selection_backend,
        **self.selection(options, length),
      )

    axes = HEADS, KV_HEADS, KV_HEADS, SEGMENTS, OFFSET
    return sharding.per_device(select, axes, KV_HEADS)(
      *jax.lax.stop_gradient((q_BTHD, keys_BWKD, k_BSKD)), segments_BS, offset
    )
