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
from sparsejax.attention.method import HEADS, KV_HEADS, SEGMENTS
from sparsejax.attention.product import Product


class Nsa(method.SparseMethod):
  """The sum of three branches, gated by a sigmoid per branch, head and token.

  Run full, the selection branch reads every earlier key and the others stay as they are: what
  SSA's paper (arXiv:2511.20102) calls cmp + full + swa.
  """

  @nn.compact
  def __call__(self, q_BTHD, k_BTKD, v_BTKD, tokens, stream) -> method.Attended:
    options, nsa = self.options, self.options.nsa
    is_full = stream == "full"
    segments_BT = (options.full_segments if is_full else options.sparse_segments)(tokens)

    keys_BWKD, values_BWKD = (
      self._compress(name, x_BTKD, segments_BT)
      for name, x_BTKD in zip("kv", self._project("cmp", k_BTKD, v_BTKD, tokens), strict=True)
    )
    if is_full:
      if self.is_mutable_collection("intermediates"):
        self._select(q_BTHD, keys_BWKD, k_BTKD, segments_BT)
      selected_BTHD = full.full_stream(q_BTHD, k_BTKD, v_BTKD, tokens, options)
    else:
      blocks_BTKM = self._select(q_BTHD, keys_BWKD, k_BTKD, segments_BT)
      selected_BTHD = block_sparse.read(
        q_BTHD, k_BTKD, v_BTKD, blocks_BTKM, segments_BT, options
      )
    window = self._project("win", k_BTKD, v_BTKD, tokens)
    branches = (
      self._attend_to_windows(q_BTHD, keys_BWKD, values_BWKD, segments_BT),
      selected_BTHD,
      full.attend(q_BTHD, *window, segments_BT, options, window=nsa.window),
    )
    gates_BTCH = self._gates(tokens, q_BTHD)
    out_BTHD = sum(
      gates_BTCH[:, :, i, :, None] * branch_BTHD for i, branch_BTHD in enumerate(branches)
    )
    return method.Attended(out_BTHD, jnp.float32(0))

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

  def _attend_to_windows(self, q_BTHD, keys_BWKD, values_BWKD, segments_BT):
    options = self.options

    def attend(q_BTHD, keys_BWKD, values_BWKD, segments_BT):
      return compression.attend(
        q_BTHD,
        keys_BWKD,
        values_BWKD,
        segments_BT,
        size=options.nsa.compress_length,
        stride=options.nsa.compress_stride,
        max_documents=options.max_documents,
        implementation=options.full_backend,
      )

    axes = HEADS, KV_HEADS, KV_HEADS, SEGMENTS
    return sharding.per_device(attend, axes, HEADS)(q_BTHD, keys_BWKD, values_BWKD, segments_BT)

  @classmethod
  def selection(cls, options: method.Options, length: int) -> dict[str, Any]:
    nsa, num_blocks = options.nsa, options.num_listed(length)
    # A budget of less than the forced blocks is spent on the nearest of them.
    num_local = min(nsa.num_local, num_blocks)
    return dict(
      rule=options.selection,
      num_initial=min(nsa.num_initial, num_blocks - num_local),
      num_local=num_local,
      pooling=nsa.pooling(options.block_size),
    )

  def _select(self, q_BTHD, keys_BWKD, k_BTKD, segments_BT):
    """Equations 8 to 12: blocks by the probabilities of the windows that overlap them."""
    options, length = self.options, q_BTHD.shape[1]

    def select(q_BTHD, keys_BWKD, k_BTKD, segments_BT):
      return pallas_kernels.select_blocks(
        q_BTHD,
        k_BTKD,
        block_size=options.block_size,
        num_blocks=options.num_listed(length),
        segments_BS=segments_BT,
        window_keys_BWKD=keys_BWKD,
        implementation=options.selection_backend,
        **self.selection(options, length),
      )

    axes = HEADS, KV_HEADS, KV_HEADS, SEGMENTS
    blocks_BTKM = sharding.per_device(select, axes, KV_HEADS)(
      *jax.lax.stop_gradient((q_BTHD, keys_BWKD, k_BTKD)), segments_BT
    )
    # For whoever looks: apply(..., mutable=["intermediates"]).
    self.sow("intermediates", "blocks", blocks_BTKM)
    return blocks_BTKM
