"""A model small enough for tests, from the smoke preset."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs import smoke
from sparsejax import checkpoint, parameters, sharding
from sparsejax.configuration import build, record
from sparsejax.data import batch as data
from sparsejax.training import state as states


def make_config(**changes):
  """The smoke preset at toy size; `changes` are dotted keys with `_` for the dots' sake."""
  c = smoke.get_config()
  c.model.update(
    num_hidden_layers=2,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
  )
  c.attention.update(block_size=8, num_blocks=3, window=12)
  c.nsa.update(compress_length=8, compress_stride=4, num_local=1, window=12)
  # Windows within a block: one forced block is enough for all that a query cannot see.
  c.infllmv2.update(num_local=1, window_size=4, window_stride=2, num_windows=3)
  c.loss.chunk_length = 24
  c.data.update(sequence_length=64, batch_size=8)
  c.optimizer.update(warmup_steps=2)
  c.train.update(num_steps=6, log_every=1, eval_every=3, eval_batches=1, save_every=3)
  c.train.update(sample_tokens=8, tensorboard=False)
  for key, value in changes.items():
    section, _, name = key.partition("__")
    c[section][name] = value
  return c


def make_model(max_documents=4, **changes):
  return build.make_model(make_config(**changes), max_documents=max_documents)


def make_params(transformer, seed=0, scale=1.0):
  """New parameters; a `scale` above 1 makes attention sharp enough to matter."""
  return jax.tree.map(lambda x: jnp.array(x * x.dtype.type(scale)), _draw(transformer, seed))


@functools.cache
def _draw(transformer, seed):
  """On the host: many tests ask for the same ones, and may give away what they get."""
  make = jax.jit(lambda rng: nn.unbox(parameters.init(transformer, rng)))
  return jax.device_get(make(jax.random.key(seed)))


def shapes_of_params(transformer):
  """Their tree of `jax.ShapeDtypeStruct`."""
  return jax.eval_shape(lambda: nn.unbox(parameters.init(transformer, jax.random.key(0))))


def run(transformer, params, batch, stream, use_full=True):
  """The model's output, every layer of SSA on the full stream or none."""
  use_full_L = jnp.full((transformer.shape.num_hidden_layers,), use_full)

  @jax.jit
  def apply(params):
    return transformer.apply(
      {"params": params},
      batch.inputs,
      batch.positions,
      batch.segments,
      stream=stream,
      use_full_L=use_full_L,
    )

  return apply(params)


def make_batch(rows=2, length=64, vocab_size=320, seed=0, num_documents=3):
  """Random tokens in a few documents, with padding at the end of the last row."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(vocab_size, size=(rows, length + 1))
  borders = np.sort(rng.integers(1, length, size=(rows, num_documents - 1)), axis=1)
  index = np.arange(length)
  segments = 1 + (index[None, :, None] >= borders[:, None, :]).sum(-1)
  opened_at = np.where(np.diff(segments, axis=1, prepend=0) > 0, index[None], 0)
  positions = index[None] - np.maximum.accumulate(opened_at, axis=1)
  weights = np.ones((rows, length), np.float32)
  segments[-1, -5:], weights[-1, -5:] = 0, 0.0
  fields = tokens[:, :-1], tokens[:, 1:], weights, segments, positions
  return data.Batch(
    *(jnp.asarray(field, jnp.float32 if field is weights else jnp.int32) for field in fields)
  )


def save_checkpoints(workdir, config, steps=(1,)):
  """Checkpoints of a model that was not trained, as train.py leaves them; the last state."""
  corpus = build.make_corpus(config, workdir / "data")
  transformer = build.make_model(config, max_documents=corpus.max_documents)
  optimizer, _ = build.make_optimizer(config)
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  state = states.init_state(transformer, optimizer, mesh, 0)
  checkpoints = checkpoint.Checkpoints(
    workdir / "checkpoints", keep_latest=9, keep_every=0, keep_best=0
  )
  about = checkpoint.Record(
    next_row=0,
    corpus=corpus.fingerprint,
    tokenizer=corpus.tokenizer.fingerprint,
    config=record.as_json(config),
  )
  for step in steps:
    state = state.replace(
      step=state.step * 0 + step, params=jax.tree.map(lambda x: x * 1.5, state.params)
    )
    checkpoints.save(state, about, wait=True)
  checkpoints.close()
  return state
