"""Which backends a model's attention runs on, asked before anything runs.

Letters: B batch, T tokens, H query heads, K key/value heads, D head size, M blocks listed.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

import pallas_kernels
from sparsejax import attention, errors
from sparsejax.attention import compression, method


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
  streams are always among them, each once.

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
  names = attention.sparse_names(options)
  # Methods share operations, and a window may be as long as another's.
  questions = dict.fromkeys(question for name in names for question in asked.of_sparse(name))
  choices, problems = [], []
  for key, ask in (("full_implementation", asked.full_attention), *questions):
    try:
      choices.append(ask())
    except pallas_kernels.CannotRunError as error:
      problems.append(_problem(key, error))
  if problems:
    raise errors.ConfigError("\n".join(problems))
  if "ssa" in options.pattern and options.sparse_method == "moba":
    choices.append(asked.dual_path_attention())
  return list(dict.fromkeys(choices))


class _Questions:
  """The operations as the methods call them, with shapes for arrays."""

  def __init__(self, options: method.Options, dtype, num_heads, num_kv_heads, head_dim, length):
    def array(*shape, dtype=dtype):
      return jax.ShapeDtypeStruct((1, length, *shape), dtype)

    self._options = options
    k_BTKD = array(num_kv_heads, head_dim)
    self._qkv = array(num_heads, head_dim), k_BTKD, k_BTKD
    self._blocks_BTKM = array(num_kv_heads, options.num_listed(length), dtype=jnp.int32)
    tokens = method.Tokens(array(dtype=jnp.int32), None, None)
    self._full_segments_BT = options.full_segments(tokens)
    self._sparse_segments_BT = options.sparse_segments(tokens)

  def of_sparse(self, name: str) -> list[tuple[str, Callable[[], pallas_kernels.Choice]]]:
    """What a sparse method's own stream runs: the key that names backends, the question."""
    return {
      "moba": [
        ("sparse_implementation", self.block_selection),
        ("sparse_implementation", self.block_sparse_attention),
      ],
      "nsa": [
        ("full_implementation", lambda: compression.choose(self._options.full_backend)),
        ("sparse_implementation", self.nsa_selection),
        ("sparse_implementation", self.block_sparse_attention),
        ("full_implementation", lambda: self.sliding_window(self._options.nsa.window)),
      ],
      "sliding_window": [
        ("full_implementation", lambda: self.sliding_window(self._options.window)),
      ],
    }[name]

  def sliding_window(self, window: int) -> pallas_kernels.Choice:
    return pallas_kernels.choose_full_attention(
      *self._qkv,
      segments_BT=self._sparse_segments_BT,
      max_documents=self._options.max_documents,
      window=window,
      implementation=self._options.full_backend,
    )

  def full_attention(self) -> pallas_kernels.Choice:
    return pallas_kernels.choose_full_attention(
      *self._qkv,
      segments_BT=self._full_segments_BT,
      max_documents=self._options.max_documents,
      implementation=self._options.full_backend,
    )

  def block_selection(self) -> pallas_kernels.Choice:
    q_BTHD, k_BTKD, _ = self._qkv
    return pallas_kernels.choose_block_selection(
      q_BTHD,
      k_BTKD,
      block_size=self._options.block_size,
      num_blocks=self._blocks_BTKM.shape[-1],
      rule=self._options.selection,
      implementation=self._options.selection_backend,
    )

  def nsa_selection(self) -> pallas_kernels.Choice:
    options = self._options
    q_BTHD, k_BTKD, _ = self._qkv
    return pallas_kernels.choose_block_selection(
      q_BTHD,
      k_BTKD,
      block_size=options.block_size,
      num_blocks=self._blocks_BTKM.shape[-1],
      rule=options.selection,
      pooling=options.nsa.pooling(options.block_size),
      implementation=options.selection_backend,
    )

  def block_sparse_attention(self) -> pallas_kernels.Choice:
    return pallas_kernels.choose_block_sparse_attention(
      *self._qkv,
      self._blocks_BTKM,
      block_size=self._options.block_size,
      segments_BS=self._sparse_segments_BT,
      implementation=self._options.sparse_backend,
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
    )


def _problem(key: str, error: pallas_kernels.CannotRunError) -> str:
  if error.asked == "strict":
    return (
      f"attention.kernels='strict': no GPU kernel can run {error.op} ({error.reasons}). Set "
      "attention.kernels to 'auto' to run it in XLA."
    )
  return f"attention.{key}={error.asked!r} cannot run: {error.reasons}. Set it to 'auto'."
