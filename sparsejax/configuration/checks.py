"""Refuses configurations that contradict themselves, before any device is touched."""

from collections.abc import Iterator
import math

import ml_collections

from sparsejax import attention, errors, model, optimizer

CHOICES = {
  "model.rope_scaling.rope_type": ("default", "llama3"),
  "model.dtype": ("bfloat16", "float32"),
  "model.remat": tuple(model.REMAT_POLICIES),
  "attention.method": tuple(attention.METHODS),
  "attention.sparse_method": attention.SPARSE_METHODS,
  "attention.selection": ("exact", "half_local"),
  "attention.document_mask": ("both", "full", "none"),
  "attention.kernels": ("auto", "strict"),
  "attention.full_implementation": ("auto", "cudnn", "xla"),
  "attention.sparse_implementation": ("auto", "mosaic_gpu", "triton", "xla", "reference"),
  "ssa.align_loss": ("smooth_l1", "l2"),
  "ssa.align_direction": ("both", "full_follows_sparse", "sparse_follows_full"),
  "ssa.coin": ("step", "layer"),
  "nsa.compression": ("mlp", "mean"),
  "nsa.kv": ("separate", "shared"),
  "infllmv2.local_window": ("paper", "released"),
  "infllmv2.first_window": ("paper", "released"),
  "infllmv2.normalizer": ("windows", "coarse"),
  "nosa.eviction_head": ("ed_dma", "dma"),
  "optimizer.schedule": tuple(optimizer.SCHEDULES),
}

# Implementations that `attention.kernels=strict` rules out.
NOT_KERNELS = ("xla", "reference")

AT_LEAST_ONE = (
  "model.num_hidden_layers",
  "model.hidden_size",
  "model.intermediate_size",
  "model.num_attention_heads",
  "model.num_key_value_heads",
  "model.head_dim",
  "model.vocab_size",
  "attention.block_size",
  "attention.num_blocks",
  "attention.window",
  "nsa.compress_length",
  "nsa.compress_stride",
  "nsa.num_local",
  "nsa.window",
  "infllmv2.num_local",
  "infllmv2.window_size",
  "infllmv2.window_stride",
  "infllmv2.num_windows",
  "loss.chunk_length",
  "data.sequence_length",
  "data.batch_size",
  "data.num_threads",
  "diagnostics.num_rows",
  "diagnostics.num_queries",
  "diagnostics.num_sink_keys",
  "diagnostics.tile",
  "train.num_steps",
  "train.accumulate_steps",
  "train.log_every",
  "train.keep_latest",
  "train.max_nonfinite_steps",
)

AT_LEAST_ZERO = ("infllmv2.num_initial", "infllmv2.dense_length", "nosa.num_query_aware")

# Methods that read the section `infllmv2`.
WITH_FORCED_BLOCKS = ("infllmv2", "dma", "ed_dma", "nosa")


def check(config: ml_collections.ConfigDict) -> None:
  """Checks each key, then the keys against each other.

  Raises:
    ConfigError: naming every problem found, each with its remedy.
  """
  problems = [
    *_single_keys(config),
    *_model(config),
    *_attention(config),
    *_layer_methods(config),
    *_nsa(config),
    *_forced_blocks(config),
    *_training(config),
    *_lengths(config),
  ]
  if problems:
    raise errors.ConfigError("\n".join(problems))


def _single_keys(config) -> Iterator[str]:
  for key, allowed in CHOICES.items():
    value = _get(config, key)
    if value not in allowed:
      yield errors.one_of(key, value, allowed)
  for key in AT_LEAST_ONE:
    if _get(config, key) < 1:
      yield f"{key}={_get(config, key)} must be at least 1."
  for key in AT_LEAST_ZERO:
    if _get(config, key) < 0:
      yield f"{key}={_get(config, key)} must be at least 0."
  if not 0.0 <= config.ssa.full_ratio <= 1.0:
    yield f"ssa.full_ratio={config.ssa.full_ratio} is a probability: from 0 to 1."


def _model(config) -> Iterator[str]:
  heads, kv_heads = config.model.num_attention_heads, config.model.num_key_value_heads
  if kv_heads and heads % kv_heads:
    fits = [n for n in range(1, heads + 1) if heads % n == 0]
    yield (
      f"model.num_attention_heads={heads} does not divide into "
      f"model.num_key_value_heads={kv_heads} groups; take {_or(fits)} key/value heads."
    )
  if config.model.head_dim % 2:
    yield (
      f"model.head_dim={config.model.head_dim} is odd; rotary embeddings turn pairs of "
      "channels, so take an even number."
    )
  own = config.model.rope_scaling
  yield from (f"model.rope_scaling.{problem}" for problem in rope_scaling(own))


def rope_scaling(own: ml_collections.ConfigDict) -> Iterator[str]:
  """What is wrong with a `model.rope_scaling`; of type `default` no number is read."""
  if own.rope_type == "default":
    return
  if not 1 <= own.factor < math.inf:
    yield f"factor={own.factor} must be a finite number from 1 up: contexts become longer."
  if own.original_max_position_embeddings < 1:
    number = own.original_max_position_embeddings
    yield f"original_max_position_embeddings={number} must be at least 1."
  if not 0 < own.low_freq_factor < own.high_freq_factor < math.inf:
    yield (
      f"low_freq_factor={own.low_freq_factor} must be above 0 and below "
      f"high_freq_factor={own.high_freq_factor}, a finite number."
    )


def _attention(config) -> Iterator[str]:
  length, block = config.data.sequence_length, config.attention.block_size
  if block >= 1 and length % block:
    lower = length // block * block
    nearest = [n for n in (lower, lower + block) if n]
    yield (
      f"data.sequence_length={length} is not a multiple of attention.block_size={block}; "
      f"take {_or(nearest)}."
    )
  elif block >= 1 and config.attention.num_blocks > length // block:
    yield (
      f"attention.num_blocks={config.attention.num_blocks} blocks of {block} keys are more "
      f"than the {length // block} of data.sequence_length={length}; take at most "
      f"{length // block}."
    )
  if config.attention.selection == "half_local" and config.attention.num_blocks % 2:
    yield (
      f"attention.num_blocks={config.attention.num_blocks} is odd; selection='half_local' "
      "takes half of the blocks near by and half from afar, so take an even number."
    )
  if config.attention.kernels == "strict":
    for key in ("attention.full_implementation", "attention.sparse_implementation"):
      if _get(config, key) in NOT_KERNELS:
        yield (
          f"attention.kernels='strict' forbids {key}={_get(config, key)!r}, which is no GPU "
          f"kernel; set {key} to 'auto', or attention.kernels."
        )


def _layer_methods(config) -> Iterator[str]:
  names, num_layers = config.attention.layer_methods, config.model.num_hidden_layers
  for name in dict.fromkeys(names):
    if name not in attention.METHODS:
      yield errors.one_of("method in attention.layer_methods", str(name), attention.METHODS)
  if names and num_layers % len(names):
    fits = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
    yield (
      f"attention.layer_methods names {len(names)} layers, which do not repeat to the "
      f"model.num_hidden_layers={num_layers}; name {_or(fits)}."
    )


def _sparse_methods(config) -> list[tuple[str, str]]:
  """Sparse methods that layers run, each with the key that names it."""
  attention_, found = config.attention, []
  key = "attention.layer_methods" if attention_.layer_methods else "attention.method"
  for name in attention_.layer_methods or (attention_.method,):
    if name in attention.SPARSE_METHODS:
      found.append((key, name))
    elif name == "ssa" or not attention_.layer_methods:
      found.append(("attention.sparse_method", attention_.sparse_method))
  return list(dict.fromkeys(found))


def _nsa(config) -> Iterator[str]:
  attention_, nsa = config.attention, config.nsa
  names = [name for _, name in _sparse_methods(config)]
  if "nsa" not in names:
    return
  if attention_.method == "full" and not attention_.layer_methods:
    yield (
      "attention.sparse_method='nsa' has weights that attention.method='full' does not train; "
      "take 'moba', or attention.method='nsa'."
    )
  stride = nsa.compress_stride
  for key, size in (
    ("nsa.compress_length", nsa.compress_length),
    ("attention.block_size", attention_.block_size),
  ):
    if stride >= 1 and size % stride:
      yield f"{key}={size} is not a multiple of nsa.compress_stride={stride}; take one."
  if nsa.num_initial < 0:
    yield f"nsa.num_initial={nsa.num_initial} must be at least 0."
  forced = nsa.num_initial + nsa.num_local
  if forced > attention_.num_blocks:
    yield (
      f"nsa.num_initial={nsa.num_initial} and nsa.num_local={nsa.num_local} force {forced} "
      f"blocks, more than attention.num_blocks={attention_.num_blocks}; take at least {forced} "
      "blocks, or force fewer."
    )
  if attention_.selection == "half_local" and (nsa.num_initial, nsa.num_local) != (0, 1):
    yield (
      f"attention.selection='half_local' forces the query's own block alone; with NSA take "
      f"nsa.num_initial=0 and nsa.num_local=1, not {nsa.num_initial} and {nsa.num_local}."
    )


def _forced_blocks(config) -> Iterator[str]:
  """Of what forces some blocks: whether they, and its windows, fit."""
  for key, name in _sparse_methods(config):
    if name in WITH_FORCED_BLOCKS:
      yield from _forced_blocks_of(config, key, name)


def _forced_blocks_of(config, key: str, name: str) -> Iterator[str]:
  forced = config.infllmv2
  if config.attention.selection != "exact":
    yield (
      f"attention.selection={config.attention.selection!r} is a rule of moba's; {key}={name!r} "
      "selects by 'exact' alone, so set that."
    )
  block, num_blocks = config.attention.block_size, config.attention.num_blocks
  local = forced.num_local + (forced.local_window == "released")
  needed = [("initial", forced.num_initial), ("local", local)]
  if name == "nosa":
    # The block that `released` adds is one of those that the query would choose.
    rest = config.nosa.num_query_aware - (local - forced.num_local)
    needed.append(("query-aware", max(0, rest)))
  total = sum(number for _, number in needed)
  if total > num_blocks:
    parts = " + ".join(f"{number} {what}" for what, number in needed)
    lower = " or nosa.num_query_aware" if name == "nosa" else ""
    yield (
      f"attention.num_blocks={num_blocks} has no room for the {parts} blocks of "
      f"{key}={name!r}; take at least {total}, or lower infllmv2.num_local{lower}."
    )
  size, stride = forced.window_size, forced.window_stride
  if stride < 1 or block < 1:
    return
  if block % stride:
    fits = [n for n in range(1, block + 1) if block % n == 0]
    yield (
      f"infllmv2.window_stride={stride} does not divide attention.block_size={block}; take "
      f"{_or(fits)}."
    )
    return
  # Scores of keys that a query must not know of are those of forced blocks alone.
  first = -1 if forced.first_window == "released" else 0
  reach = (first + forced.num_windows - 1) * stride + size
  least = -(-(reach - 1) // block)
  if name != "infllmv2" and local < least:
    yield (
      f"infllmv2.num_local={forced.num_local} is too few for {key}={name!r}: the windows of a "
      f"block reach {reach} keys from its beginning, beyond what a query sees of it; take at "
      f"least {least - (local - forced.num_local)}, or fewer or shorter windows."
    )


def _training(config) -> Iterator[str]:
  batch, parts = config.data.batch_size, config.train.accumulate_steps
  if parts >= 1 and batch % parts:
    nearest = [n for n in (batch // parts * parts, -(-batch // parts) * parts) if n]
    yield (
      f"data.batch_size={batch} does not divide into train.accumulate_steps={parts} parts; "
      f"take a batch of {_or(nearest)}."
    )
  warmup, steps = config.optimizer.warmup_steps, config.train.num_steps
  if warmup + config.optimizer.decay_steps > steps:
    yield (
      f"optimizer.warmup_steps={warmup} plus optimizer.decay_steps="
      f"{config.optimizer.decay_steps} exceed train.num_steps={steps}; shorten them."
    )
  if config.optimizer.schedule == "wsd" and not config.optimizer.decay_steps:
    yield (
      "optimizer.schedule='wsd' needs optimizer.decay_steps, the length of its final decay; "
      f"a tenth of the run is common: {max(1, steps // 10)}."
    )
  weights, sources = config.data.weights, config.data.sources
  if not sources:
    yield "data.sources is empty; name prepared directories, or stdlib or recall."
  if weights and len(weights) != len(sources):
    yield (
      f"data.weights has {len(weights)} numbers for {len(sources)} data.sources; give one "
      "each, or () to weigh them by size."
    )
  if any(not isinstance(weight, int | float) or weight <= 0 for weight in weights):
    yield f"data.weights={weights} must all be positive numbers."
  axes = [name for name, size in config.mesh.items() if size == -1]
  if len(axes) > 1:
    yield f"mesh axes {' and '.join(axes)} are both -1; only one can take what remains."
  for name, size in config.mesh.items():
    if size < 1 and size != -1:
      yield f"mesh.{name}={size} must be at least 1, or -1 for all remaining devices."
  tensor = config.mesh.tensor
  if tensor > 1 and config.model.num_key_value_heads % tensor:
    yield (
      f"mesh.tensor={tensor} cannot split model.num_key_value_heads="
      f"{config.model.num_key_value_heads}; use fsdp or data for those devices instead."
    )


def _lengths(config) -> Iterator[str]:
  bounds, weights = config.data.length_buckets, config.data.length_weights
  are_whole = all(isinstance(bound, int) and bound >= 0 for bound in bounds)
  if bounds and not (are_whole and len(bounds) > 1 and list(bounds) == sorted({*bounds})):
    yield (
      f"data.length_buckets={bounds} must be ascending whole numbers, two or more, such as "
      "(0, 4096, 12288)."
    )
  if weights and len(weights) != max(0, len(bounds) - 1):
    yield (
      f"data.length_weights has {len(weights)} numbers for the {max(0, len(bounds) - 1)} "
      "buckets of data.length_buckets; give one each, or () for equal shares."
    )
  if any(not isinstance(weight, int | float) or weight <= 0 for weight in weights):
    yield f"data.length_weights={weights} must all be positive numbers."


def _get(config, key: str):
  for part in key.split("."):
    config = config[part]
  return config


def _or(values) -> str:
  return " or ".join(map(str, values))
