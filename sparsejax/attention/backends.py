"""Which backends a model's attention runs on, asked before anything runs.

Letters: B batch, T tokens, H query heads, K key/value heads, D head size, M blocks listed.
"""

import jax
import jax.numpy as jnp

import pallas_kernels
from sparsejax import attention, errors
from sparsejax.attention import method


def choose(
  options: method.Options,
  *,
  dtype: str,
  num_heads: int,
  num_kv_heads: int,
  head_dim: int,
  length: int,
) -> list[pallas_kernels.Choice]:
  """What each operation of attention runs on, and why.

  Whatever the method trains, validation runs it full and sparse: the operations of both
  streams are always among them.

  Args:
    options: settings of attention.
    dtype: of queries, keys and values.
    num_heads, num_kv_heads, head_dim: H, K and D.
    length: T, tokens per row.

  Raises:
    ConfigError: for each operation that cannot run on what was asked for, why not, and what
      to set.
  """
  asked = _Questions(options, dtype, num_heads, num_kv_heads, head_dim, length)
  choices, problems = [], []
  for key, ask in (
    ("full_implementation", asked.full_attention),
    ("sparse_implementation", asked.block_selection),
    ("sparse_implementation", asked.block_sparse_attention),
  ):
    try:
      choices.append(ask())
    except pallas_kernels.CannotRunError as error:
      problems.append(_problem(key, error))
  if problems:
    raise errors.ConfigError("\n".join(problems))
  if options.method == "ssa":
    choices.append(asked.dual_path_attention())
  return choices


class _Questions:
  """The operations as the methods call them, with shapes for arrays."""

  def __init__(self, options: method.Options, dtype, num_heads, num_kv_heads, head_dim, length):
    def array(*shape, dtype=dtype):
      return jax.ShapeDtypeStruct((1, length, *shape), dtype)

    self._options = options
    sparse = attention.sparse_method(options)
    self._rules = sparse.selection(options, length)
    bias_BTK = array(num_kv_heads, dtype=jnp.float32)
    self._sparse_bias, self._full_bias, self._both_bias = {}, {}, {}
    if sparse.has_key_scores:
      self._sparse_bias = dict(key_bias_BSK=bias_BTK)
      self._both_bias = dict(key_bias_BTK=bias_BTK)
    if sparse.has_key_scores and options.method != "full":
      self._full_bias = self._both_bias
    k_BTKD = array(num_kv_heads, head_dim)
    self._qkv = array(num_heads, head_dim), k_BTKD, k_BTKD
    self._blocks_BTKM = array(num_kv_heads, options.num_listed(length), dtype=jnp.int32)
    tokens = method.Tokens(array(dtype=jnp.int32), None, None)
    self._full_segments_BT = options.full_segments(tokens)
    self._sparse_segments_BT = options.sparse_segments(tokens)

  def full_attention(self) -> pallas_kernels.Choice:
    return pallas_kernels.choose_full_attention(
      *self._qkv,
      segments_BT=self._full_segments_BT,
      max_documents=self._options.max_documents,
      implementation=self._options.full_backend,
      **self._full_bias,
    )

  def block_selection(self) -> pallas_kernels.Choice:
    q_BTHD, k_BTKD, _ = self._qkv
    return pallas_kernels.choose_block_selection(
      q_BTHD,
      k_BTKD,
      block_size=self._options.block_size,
      num_blocks=self._blocks_BTKM.shape[-1],
      implementation=self._options.selection_backend,
      **self._rules,
    )

  def block_sparse_attention(self) -> pallas_kernels.Choice:
    return pallas_kernels.choose_block_sparse_attention(
      *self._qkv,
      self._blocks_BTKM,
      block_size=self._options.block_size,
      segments_BS=self._sparse_segments_BT,
      implementation=self._options.sparse_backend,
      **self._sparse_bias,
    )

  def dual_path_attention(self) -> pallas_kernels.Choice:
    return pallas_kernels.choose_dual_path_attention(
      *self._qkv,
      self._blocks_BTKM,
      block_size=self._options.block_size,
      full_segments_BT=self._full_segments_BT,
      sparse_segments_BT=self._sparse_segments_BT,
      max_documents=self._options.max_documents,
      full_implementation=self._options.full_backend,
      sparse_implementation=self._options.sparse_backend,
      **self._both_bias,
    )


def _problem(key: str, error: pallas_kernels.CannotRunError) -> str:
  if error.asked == "strict":
    return (
      f"attention.kernels='strict': no GPU kernel can run {error.op} ({error.reasons}). Set "
      "attention.kernels to 'auto' to run it in XLA."
    )
  return f"attention.{key}={error.asked!r} cannot run: {error.reasons}. Set it to 'auto'."
