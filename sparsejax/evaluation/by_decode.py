"""Scores of tokens by decoding: each token is read into the cache before the next is scored.

Letters: B rows, T tokens of a row, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

from sparsejax import model
from sparsejax.attention import backends, method, past, prompt_backends
from sparsejax.data import batch as data
from sparsejax.decoding import cache as caches
from sparsejax.decoding import pinned, prefill
from sparsejax.evaluation import token_scores


def make_token_score(
  transformer: model.Transformer, stream: method.Stream, mesh: jax.sharding.Mesh
) -> token_scores.Score:
  """Returns `score(params, batch) -> (nll_BT, is_hit_BT)`, as `scoring.make_token_score` does.

  What is ahead of a row's first counted target is read as a prompt is, in chunks; from there
  on rows go through the program that generation takes for a step, all of the batch together,
  token by token. Pages are on the device. Rows are read from their beginning as one document
  each. Targets that are ahead of the first counted one have no score.

  A row that InfLLM-V2 reads whole while it is short (`InfllmV2Options.dense_length`) is read
  so until it has grown, as it would be served; a forward pass goes by its final length.

  Raises:
    UserError: when called, where the cache does not fit on the device.
    ConfigError: when called, where `attention.kernels=strict` and there is no kernel.
  """
  decoder = caches.for_decoding(transformer)
  # Two programs, as generation has them.
  read = jax.jit(functools.partial(_read, decoder, stream))
  take = jax.jit(
    functools.partial(_take, decoder, stream),
    donate_argnames="cache",
    compiler_options=caches.COMPILER_OPTIONS,
  )

  def score(params, batch: data.Batch) -> tuple[jax.Array, jax.Array]:
    b, t = batch.inputs.shape
    _check(decoder, stream, caches.room(decoder, batch=b, length=t), mesh)
    params = caches.cast(decoder.shape.dtype, params)
    scores, cache = read(params, batch)
    return take(params, batch, scores, cache=cache)[0]

  return score


def _check(decoder: model.Transformer, stream: method.Stream, room, mesh) -> None:
  """Raises for what cannot be decoded."""
  num_heads, options = decoder.shape.num_attention_heads, decoder.options
  chunk = prefill.chunk_size(options.block_size)
  backends.choose_decoding(options, stream, room, num_heads=num_heads, mesh=mesh)
  prompt_backends.choose(options, stream, room, num_heads=num_heads, chunk=chunk)
  beside = room.batch * prefill.num_bytes(decoder, stream, room, chunk)
  spec = caches.spec(decoder, stream, room)
  caches.check_size(spec, caches.free_bytes(), pinned.limit(), beside=beside)


def _read(decoder: model.Transformer, stream: method.Stream, params, batch: data.Batch):
  """Scores of the first counted targets, and the cache of what is ahead of them."""
  b, t = batch.inputs.shape
  room = caches.room(decoder, batch=b, length=t)
  read_B = _num_read(batch)
  logits_BV, cache = prefill.prefill(
    decoder, params, batch.inputs, read_B, stream=stream, room=room
  )
  nothing = jnp.zeros((b, t)), jnp.zeros((b, t), bool)
  return _note(nothing, batch, read_B - 1, logits_BV), cache


def _take(
  decoder: model.Transformer, stream: method.Stream, params, batch: data.Batch, scores,
  cache: past.Cache,
):  # fmt: skip
  """Scores of all counted targets, token by token, and the cache."""
  b, t = batch.inputs.shape
  read_B = _num_read(batch)
  num_steps = ((batch.segments > 0).sum(1) - read_B).max()

  def take(number, carry):
    scores, cache = carry
    place_B = read_B + number
    ids_B = batch.inputs[jnp.arange(b), jnp.minimum(place_B, t - 1)]
    logits_BV, cache = caches.step(decoder, params, cache, ids_B, stream=stream)
    return _note(scores, batch, place_B, logits_BV), cache

  # With the cache, which takes the place of the one given up.
  return jax.lax.fori_loop(0, num_steps, take, (scores, cache))


def _num_read(batch: data.Batch) -> jax.Array:
  """Tokens that are read as a prompt: up to that which the first counted target follows."""
  return jnp.argmax(batch.weights > 0, axis=1) + 1


def _note(scores, batch: data.Batch, place_B, logits_BV):
  """Scores with those of the targets behind tokens; beyond a row's end nothing is noted."""
  b, t = batch.inputs.shape
  rows = jnp.arange(b)
  target_B = batch.targets[rows, jnp.minimum(place_B, t - 1)]
  nll_B = jax.nn.logsumexp(logits_BV, axis=-1) - logits_BV[rows, target_B]
  found = nll_B, logits_BV.argmax(-1) == target_B
  return tuple(
    x_BT.at[rows, place_B].set(x_B, mode="drop")
    for x_BT, x_B in zip(scores, found, strict=True)
  )
