"""What a model costs: parameters, floating-point operations, and the devices' best."""

import jax

from sparsejax import attention, model
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
  keys that are read under the causal mask, the block lists and the window, of both streams for
  SSA and of all branches for NSA, the scores of pooled keys, forward only, and an eviction
  head.
  """
  layers = [options.of_layer(place) for place in range(len(options.pattern))]
  per_period = sum(_layer(shape, own, sequence_length) for own in layers)
  return 3 * _matrices(shape) + shape.num_hidden_layers / len(layers) * per_period


def _layer(shape: model.Shape, options: method.Options, sequence_length: int) -> float:
  """Operations of one layer's attention per token, forward and backward."""
  full = 3 * _attention(shape, mean_keys_full(sequence_length))
  if options.method == "full":
    return full
  sparse = attention.sparse_method(options)
  if sparse.is_dense(options, sequence_length):
    total = full
  else:
    total = full if options.method == "ssa" else 0.0
    stream = _STREAMS.get(attention.sparse_name(options), _listed)
    total += stream(shape, options, sequence_length)
  if sparse.has_key_scores:
    total += 3 * 2.0 * shape.head_dim * shape.num_key_value_heads**2
  return total


def dense_flops_per_token(shape: model.Shape, sequence_length: int) -> float:
  """The same for a model that runs full attention once: the common yardstick of MFU."""
  per_layer = 3 * _attention(shape, mean_keys_full(sequence_length))
  return 3 * _matrices(shape) + shape.num_hidden_layers * per_layer


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


def mean_keys_window(sequence_length: int, window: int) -> float:
  """Keys a query reads of a sliding window, averaged over a row."""
  window = min(window, sequence_length)
  # The first queries have fewer keys before them.
  missing = window * (window - 1) / 2
  return window - missing / sequence_length


def mean_windows(sequence_length: int, size: int, stride: int) -> float:
  """Complete windows that a query sees under the causal mask, averaged over a row."""
  num_windows = max(0, (sequence_length - size) // stride + 1)
  # Each is seen from its last token on.
  seen = num_windows * (sequence_length - size + 1)
  seen -= stride * num_windows * (num_windows - 1) / 2
  return seen / sequence_length


def _listed(shape: model.Shape, options: method.Options, sequence_length: int) -> float:
  read = 3 * _attention(shape, mean_keys_sparse(sequence_length, options))
  per_key = attention.sparse_method(options).scores_per_key(options)
  return read + _attention(shape, mean_keys_full(sequence_length) * per_key) / 2


def _sliding_window(shape: model.Shape, options: method.Options, sequence_length: int) -> float:
  return 3 * _attention(shape, mean_keys_window(sequence_length, options.window))


def _nsa(shape: model.Shape, options: method.Options, sequence_length: int) -> float:
  nsa, size, stride = options.nsa, options.nsa.compress_length, options.nsa.compress_stride
  num_windows = mean_windows(sequence_length, size, stride)
  num_keys = mean_keys_sparse(sequence_length, options)
  num_keys += num_windows + mean_keys_window(sequence_length, nsa.window)
  read = 3 * _attention(shape, num_keys) + _attention(shape, num_windows) / 2
  weights = 3 * shape.hidden_size * shape.num_attention_heads
  width = shape.num_key_value_heads * shape.head_dim
  if nsa.kv == "separate":
    weights += 4 * shape.hidden_size * width
  if nsa.compression == "mlp":
    windows_per_token = max(0, (sequence_length - size) // stride + 1) / sequence_length
    weights += 2 * width * (size + 1) * shape.head_dim * windows_per_token
  return read + 3 * 2.0 * weights


# Operations of a sparse stream per token and layer, forward and backward, and of the matrix
# products that it has more than other methods; of those that are not `_listed`.
_STREAMS = {"nsa": _nsa, "sliding_window": _sliding_window}


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
