"""Attention of every layer and head over whole rows: each query is looked at, none is sampled.

Rows are one document each. Queries are taken a chunk at a time, layer by layer, so that of
what grows with the square of the length only one chunk's and one layer's exists.

Letters: B rows, T tokens, P queries of a chunk, H query heads, K key/value heads, D head size,
M blocks listed, S layers of a stack, L layers.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import model
from sparsejax.attention import method
from sparsejax.diagnostics import attention_mass, block_choice, divergence, dropping, seen

STREAMS = ("full", "sparse")
# Of queries that do not read all that is before them.
OF_DROPPED = ("attn_sparsity", "error", "bound", "error_to_bound")
OF_KEY_HEADS = ("gamma", "gamma_min")


class Heads(NamedTuple):
  """What there was to see.

  Attributes:
    heads: by `stream/name`, [L, B, H], or [L, B, K] for `OF_KEY_HEADS`; NaN where a layer, or
      a row so short, has no such number.
    kl_B: the mean of `divergence.from_full` over the tokens of each row, nats.
  """

  heads: dict[str, jax.Array]
  kl_B: jax.Array


def make(
  transformer: model.Transformer,
  *,
  num_sink_keys: int,
  chunk_length: int,
  num_queries: int = 128,
) -> Callable[..., Heads]:
  """Returns a jitted `measure(params, ids_BT)`.

  With `full/` or `sparse/` before the name for the stream that was run, whose queries, keys,
  values and lists the number is of:

    entropy, sink   see `attention_mass`; means over all queries
    attn_sparsity   see `attention_mass`; the mean over queries with more keys before them than
                    they read, as are the three below
    error, bound    see `dropping`; means
    error_to_bound  the largest quotient of the two, at most 1 by the theorem
    gamma, gamma_min
                    see `block_choice.overlap`; the mean and the least over full lists

  Args:
    transformer: the model.
    num_sink_keys: at the beginning of a row, that count as its sink.
    chunk_length: positions of each row whose logits exist at the same time.
    num_queries: P.
  """
  alone = dataclasses.replace(transformer.options, max_documents=1)
  transformer = transformer.clone(options=alone)
  num_layers = transformer.shape.num_hidden_layers

  @jax.jit
  def measure(params, ids_BT) -> Heads:
    positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
    heads, hidden = {}, {}
    for stream in STREAMS:
      output, shown = transformer.apply(
        {"params": params},
        ids_BT,
        positions_BT,
        jnp.ones_like(ids_BT),
        stream=stream,
        mutable=["intermediates"],
      )
      hidden[stream] = output.hidden_BTE
      found = _of_layers(shown, alone, num_layers, num_sink_keys, num_queries)
      heads |= {f"{stream}/{name}": values for name, values in found.items()}
    kl_BT = divergence.from_full(
      *hidden.values(), model.unembedding(params), chunk_length=chunk_length
    )
    return Heads(heads, kl_BT.mean(-1))

  return measure


def places_with_lists(transformer: model.Transformer, params, ids_BT) -> set[int]:
  """Places in the pattern of layers whose layers choose blocks of such rows; nothing is run."""

  def show(params, ids_BT):
    return transformer.apply(
      {"params": params}, ids_BT, ids_BT, ids_BT, stream="sparse", mutable=["intermediates"]
    )[1]

  return set(seen.by_place(jax.eval_shape(show, params, ids_BT), "blocks"))


def _of_layers(shown, options: method.Options, num_layers: int, num_sink_keys, num_queries):
  """Numbers of all layers in one stream, [L, B, heads] by name."""
  names = "queries", "keys", "values", "key_bias", "blocks"
  stacks = {name: seen.by_place(shown, name) for name in names}
  period, result = len(options.pattern), {}
  of_layer = functools.partial(
    _of_layer,
    block_size=options.block_size,
    num_sink_keys=num_sink_keys,
    num_queries=num_queries,
  )
  for place in range(period):
    arrays = {name: by_place[place] for name, by_place in stacks.items() if place in by_place}
    for name, values_SBH in jax.lax.map(of_layer, arrays).items():
      nowhere = jnp.full((num_layers, *values_SBH.shape[1:]), jnp.nan)
      result[name] = result.get(name, nowhere).at[place::period].set(values_SBH)
  return result


def _of_layer(arrays, *, block_size: int, num_sink_keys: int, num_queries: int):
  """Numbers of one layer by name, [B, heads], from what it showed."""
  k_BTKD, v_BTKD, blocks_BTKM = arrays["keys"], arrays["values"], arrays.get("blocks")
  b, t = k_BTKD.shape[:2]
  size = min(num_queries, t)
  num_chunks = -(-t // size)
  budget = t if blocks_BTKM is None else blocks_BTKM.shape[-1] * block_size

  def in_chunks(x):
    x = jnp.pad(x, [(0, 0), (0, num_chunks * size - t)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(b, num_chunks, size, *x.shape[2:]), 1, 0)

  def of_chunk(chunk):
    number, q_BPHD, blocks_BPKM = chunk
    position_P = number * size + jnp.arange(size)
    is_real_P, has_more_P = position_P < t, (position_P < t) & (position_P >= budget)
    scores_BPHS = attention_mass.scores(
      q_BPHD, k_BTKD, position_P, key_bias_BSK=arrays.get("key_bias")
    )
    p_BPHS = jax.nn.softmax(scores_BPHS, axis=-1)
    sink_BPH = attention_mass.sink_mass(p_BPHS, jnp.zeros_like(position_P), num_sink_keys)
    found = dict(
      entropy=_sum(attention_mass.entropy(p_BPHS), is_real_P), sink=_sum(sink_BPH, is_real_P)
    )
    if blocks_BPKM is None:
      return found
    kept_BPH = attention_mass.attention_sparsity(p_BPHS, blocks_BPKM, block_size)
    lost = dropping.measure(scores_BPHS, v_BTKD, blocks_BPKM, block_size)
    # Where nothing is dropped, both are 0.
    quotient_BPH = lost.error / jnp.where(lost.bound > 0, lost.bound, 1.0)
    return found | dict(
      attn_sparsity=_sum(kept_BPH, has_more_P),
      error=_sum(lost.error, has_more_P),
      bound=_sum(lost.bound, has_more_P),
      error_to_bound=jnp.where(has_more_P[None, :, None], quotient_BPH, -jnp.inf).max(1),
    )

  blocks = None if blocks_BTKM is None else in_chunks(blocks_BTKM)
  chunks = jnp.arange(num_chunks), in_chunks(arrays["queries"]), blocks
  found = jax.lax.map(of_chunk, chunks)
  values = {name: found[name].sum(0) / t for name in ("entropy", "sink")}
  if blocks_BTKM is None:
    return values
  if budget >= t:
    nowhere_BH = jnp.full_like(values["entropy"], jnp.nan)
    return values | dict.fromkeys(OF_DROPPED, nowhere_BH) | _gamma(blocks_BTKM)
  means = {name: found[name].sum(0) / (t - budget) for name in OF_DROPPED[:-1]}
  most_BH = found["error_to_bound"].max(0)
  return values | means | dict(error_to_bound=most_BH) | _gamma(blocks_BTKM)


def _gamma(blocks_BTKM) -> dict[str, jax.Array]:
  """The mean and the least share of a full list that the one before has, [B, K]."""
  overlap = block_choice.overlap(blocks_BTKM)
  is_full = (blocks_BTKM >= 0).all(-1)[:, 1:]
  num_BK = is_full.sum(1)
  least_BK = jnp.where(is_full, overlap, jnp.inf).min(1)
  return dict(
    gamma=(overlap * is_full).sum(1) / num_BK,
    gamma_min=jnp.where(num_BK > 0, least_BK, jnp.nan),
  )


def _sum(x_BPH, is_counted_P):
  """Over counted queries, [B, H]."""
  return jnp.where(is_counted_P[None, :, None], x_BPH, 0.0).sum(1)
