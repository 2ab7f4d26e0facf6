"""What a model costs: parameters, floating-point operations, and the devices' best."""

import jax

from sparsejax import attention as methods
from sparsejax import model
from sparsejax.attention import method

# Dense bfloat16 TFLOP/s by what a device calls itself, first match counts.
PEAK_TFLOPS = {
  "H200": 989.0,
  "H100 PCIe": 756.0,
  "H100": 989.0,
  "H20": 148.0,
  "GH200": 989.0,
  "B200": 2250.0,
  "B300": 2250.0,
  "A100": 312.0,
  "A40": 150.0,
  "A10": 125.0,
  "L40S": 362.0,
  "L40": 181.0,
  "L4": 121.0,
  "RTX 6000 Ada": 364.0,
  "RTX A6000": 155.0,
  "RTX 5090": 210.0,
  "RTX 4090": 165.0,
  "RTX 3090": 71.0,
}


def peak_tflops(device: jax.Device) -> float | None:
  """The device's bfloat16 peak without sparsity, or None where it is not known."""
  # Longer names first: an "L40S" is no "L4", an "H200" no "H20".
  for name in sorted(PEAK_TFLOPS, key=len, reverse=True):
    if name in device.device_kind:
      return PEAK_TFLOPS[name]
  return None


def num_parameters(params) -> int:
  """Number of scalars in a tree of arrays or of their shapes."""
  return sum(x.size for x in jax.tree.leaves(params))


def num_bytes(tree) -> int:
  """Bytes of a tree of arrays or of their shapes, over all devices once."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def train_flops_per_token(
  shape: model.Shape, options: method.Options, sequence_length: int
) -> float:
  """Operations of a forward and backward pass per token, as the method needs them.

  Matrix products count two per multiply-add and three passes (forward, and two products in
  the backward pass); what is recomputed to save memory does not count. Attention counts the
  keys that are read under the causal mask and the block lists, of both streams for SSA, the
  scores of pooled keys, forward only, and an eviction head.
  """
  sparse = methods.sparse_method(options)
  per_layer = 0.0
  if options.method == "full" or sparse.is_dense(options, sequence_length):
    per_layer += 3 * _attention(shape, mean_keys_full(sequence_length))
  else:
    if options.method == "ssa":
      per_layer += 3 * _attention(shape, mean_keys_full(sequence_length))
    per_layer += 3 * _attention(shape, mean_keys_sparse(sequence_length, options))
    num_scores = mean_keys_full(sequence_length) * sparse.scores_per_key(options)
    per_layer += _attention(shape, num_scores) / 2
  if options.method != "full" and sparse.has_key_scores:
    per_layer += 3 * 2.0 * shape.head_dim * shape.num_key_value_heads**2
  return 3 * _matrices(shape) + shape.num_hidden_layers * per_layer


def dense_flops_per_token(shape: model.Shape, sequence_length: int) -> float:
  """The same for a model that runs full attention once: the common yardstick of MFU."""
  attention = 3 * _attention(shape, mean_keys_full(sequence_length))
  return 3 * _matrices(shape) + shape.num_hidden_layers * attention


def mean_keys_full(sequence_length: int) -> float:
  """Keys a query sees under the causal mask, averaged over a row."""
  return (sequence_length + 1) / 2


def mean_keys_sparse(sequence_length: int, options: method.Options) -> float:
  """Keys a query reads of its blocks under the causal mask, averaged over a row."""
  size = options.block_size
  total = 0
  for own in range(-(-sequence_length // size)):
    length = min(size, sequence_length - own * size)
    others = min(options.num_blocks - 1, own) * size
    total += length * others + length * (length + 1) // 2
  return total / sequence_length


def _matrices(shape: model.Shape) -> float:
  """Operations of the matrix products with parameters, forward, per token."""
  heads = 2 * shape.num_attention_heads + 2 * shape.num_key_value_heads
  attention = shape.hidden_size * shape.head_dim * heads
  gate = shape.hidden_size * shape.num_attention_heads
  mlp = 3 * shape.hidden_size * shape.intermediate_size
  logits = shape.vocab_size * shape.hidden_size
  return 2.0 * (shape.num_hidden_layers * (attention + gate + mlp) + logits)


def _attention(shape: model.Shape, keys: float) -> float:
  """Operations of scores and weighted values over so many keys, one layer, per token."""
  return 4.0 * shape.num_attention_heads * shape.head_dim * keys
