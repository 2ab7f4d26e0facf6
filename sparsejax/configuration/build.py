"""Plain objects from a checked config; below this, no function takes a config."""

import dataclasses
import pathlib

import ml_collections
import optax

import pallas_kernels
from sparsejax import attention, errors, losses, model
from sparsejax import optimizer as optimizers
from sparsejax.attention import backends, rotary
from sparsejax.data import corpus
from sparsejax.diagnostics import look


class NoBlocksError(errors.ConfigError):
  """A budget for a model none of whose layers choose blocks."""


def make_corpus(
  config: ml_collections.ConfigDict, builtin_directory: str | pathlib.Path
) -> corpus.Corpus:
  """The data of a config; `stdlib` is prepared below `builtin_directory`."""
  form = corpus.RowFormat(
    sequence_length=config.data.sequence_length,
    vocab_size=config.model.vocab_size,
    seed=config.seed,
    ignore_first_tokens=config.loss.ignore_first_tokens,
    recall_pairs=config.data.recall_pairs,
    recall_queries=config.data.recall_queries,
  )
  bounds, buckets = config.data.length_buckets, None
  if bounds:
    weights = config.data.length_weights or (1.0,) * (len(bounds) - 1)
    buckets = corpus.LengthBuckets(bounds, weights)
  return corpus.open_corpus(
    config.data.sources,
    config.data.weights,
    form,
    builtin_directory=builtin_directory,
    buckets=buckets,
  )


def make_model(config: ml_collections.ConfigDict, *, max_documents: int) -> model.Transformer:
  """The model of a config, for rows of at most `max_documents` documents."""
  keys = config.model.to_dict()
  shape = model.Shape(**keys | dict(rope_scaling=rotary.Scaling(**keys["rope_scaling"])))
  options = attention.Options(
    **config.attention.to_dict(),
    ssa=attention.SsaOptions(**config.ssa.to_dict()),
    nsa=attention.NsaOptions(**config.nsa.to_dict()),
    infllmv2=attention.InfllmV2Options(**config.infllmv2.to_dict()),
    nosa=attention.NosaOptions(**config.nosa.to_dict()),
    max_documents=max_documents,
  )
  return model.Transformer(shape, options)


def choose_backends(
  config: ml_collections.ConfigDict, transformer: model.Transformer
) -> list[pallas_kernels.Choice]:
  """What each operation of attention runs on, by the first device and the model's shapes.

  Raises:
    ConfigError: one cannot run on what the config asks for.
  """
  shape = transformer.shape
  return backends.choose(
    transformer.options,
    dtype=shape.dtype,
    num_heads=shape.num_attention_heads,
    num_kv_heads=shape.num_key_value_heads,
    head_dim=shape.head_dim,
    length=config.data.sequence_length,
  )


def make_optimizer(
  config: ml_collections.ConfigDict,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The optimizer of a config and the schedule inside it."""
  options = optimizers.Options(**config.optimizer.to_dict())
  schedule = optimizers.make_schedule(options, config.train.num_steps)
  return optimizers.make_optimizer(options, schedule), schedule


def make_loss_options(config: ml_collections.ConfigDict) -> losses.Options:
  """The loss of a config."""
  return losses.Options(
    z_loss_weight=config.loss.z_loss_weight,
    align_weight=config.ssa.align_weight,
    chunk_length=config.loss.chunk_length,
  )


def make_look_settings(config: ml_collections.ConfigDict) -> look.Settings:
  """How closely diagnostics look."""
  return look.Settings(
    num_queries=config.diagnostics.num_queries,
    num_sink_keys=config.diagnostics.num_sink_keys,
    tile=config.diagnostics.tile,
    chunk_length=config.loss.chunk_length,
  )


def with_budget(transformer: model.Transformer, budget: int) -> model.Transformer:
  """The same model, reading `budget` keys per query under sparse inference.

  The block size stays, as in the papers' sweeps; the number of blocks changes. What the
  method forces, and what queries choose of NOSA's lists, stays as well. The budget that the
  model has already changes nothing, whatever its layers run.

  Raises:
    NoBlocksError: no layer chooses blocks.
    ConfigError: fewer blocks than some layer can do with; no whole number of blocks, or an odd
      one where half of them are near by.
  """
  options = transformer.options
  if budget == options.budget:
    # Also what evaluations ask for where nobody named a budget.
    return transformer
  names = attention.names_with_blocks(options)
  if not names:
    raise NoBlocksError(
      f"a budget of {budget} keys is for methods that choose blocks; {_reads(options)} "
      "whatever the budget, so leave it out."
    )
  methods, size = [attention.METHODS[name] for name in names], options.block_size
  # Which rules a method has, in rows that are not read whole.
  rules = [method.selection(options, options.budget + 1) for method in methods]
  is_halved = any(own.get("rule") == "half_local" for own in rules)
  step = 2 if is_halved else 1
  least = max(step, *(method.least_blocks(options) for method in methods))
  least += least % step
  num_blocks = budget // size
  if num_blocks < least:
    raise errors.ConfigError(
      f"a budget of {budget} keys is {num_blocks} blocks of {size}, fewer than the {least} "
      f"that every query reads or chooses itself; take at least {least * size}."
    )
  if budget % (step * size):
    below = num_blocks // step * step * size
    remedy = f"take {below} or {below + step * size}."
    if budget % size:
      raise errors.ConfigError(
        f"a budget of {budget} keys is not a whole number of blocks of {size} keys; {remedy}"
      )
    raise errors.ConfigError(
      f"a budget of {budget} keys is {num_blocks} blocks of {size}, an odd number; "
      "attention.selection='half_local' takes half of the blocks near by and half from afar, "
      f"so {remedy}"
    )
  return model.Transformer(
    transformer.shape, dataclasses.replace(options, num_blocks=num_blocks)
  )


def _reads(options: attention.Options) -> str:
  """What layers without lists of blocks read, in words."""
  layers = [options.of_layer(place) for place in range(len(options.pattern))]
  window = f"the last attention.window={options.window} tokens"
  parts = [f"{name!r} reads {window}" for name in attention.sparse_names(options)]
  if any(own.is_always_full for own in layers):
    parts.append("'full' reads every earlier token")
  return " and ".join(parts)
