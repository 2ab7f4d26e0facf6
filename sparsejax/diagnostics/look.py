"""A look at every layer of a model on a few rows, under full and under sparse inference.

Letters: B rows, T tokens, P sampled queries, H query heads, K key/value heads, D head size,
M blocks listed, S layers of a stack, L layers.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import attention, losses, model
from sparsejax.attention import method
from sparsejax.diagnostics import attention_mass, block_choice, divergence, seen

STREAMS = ("full", "sparse")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """How closely to look.

  Attributes:
    num_queries: that are sampled of each row, for where the mass of attention lies.
    num_sink_keys: at the beginning of a document, that count as its sink.
    tile: neighbouring queries whose lists are joined.
    chunk_length: positions of each row whose logits exist at the same time.
  """

  num_queries: int = 64
  num_sink_keys: int = 16
  tile: int = 8
  chunk_length: int = 512


class Look(NamedTuple):
  """What there was to see.

  Attributes:
    layers: `[L]` by name, NaN where a layer has no such number.
    model: scalars by name.
  """

  layers: dict[str, jax.Array]
  model: dict[str, jax.Array]


def make(transformer: model.Transformer, settings: Settings) -> Callable[..., Look]:
  """Returns a jitted `look(params, batch)`.

  By layer, with `full/` or `sparse/` before the name for the stream that was run:

    attn_sparsity   see `attention_mass.attention_sparsity`; the mean over heads and over
                    sampled queries with more keys before them than they read
    entropy, sink   see `attention_mass`; means over heads and sampled queries
    overlap_mean, overlap_min
                    see `block_choice.overlap`; over full lists within a document
    forced_share, union
                    see `block_choice`; means over queries, and over tiles
    align           the alignment loss of SSA's two streams, without its weight

  Of the model: `kl`, the mean of `divergence.from_full`, `loss_full`, `loss_sparse` and their
  difference `gap`, all in nats per token, on the same rows.

  Queries and keys of all layers exist at the same time: for long rows, take few of them.
  """
  options, num_layers = transformer.options, transformer.shape.num_hidden_layers

  @jax.jit
  def look(params, batch) -> Look:
    def run(stream):
      return transformer.apply(
        {"params": params},
        batch.inputs,
        batch.positions,
        batch.segments,
        stream=stream,
        mutable=["intermediates"],
      )

    layers, hidden = {}, {}
    for stream in STREAMS:
      output, shown = run(stream)
      hidden[stream] = output.hidden_BTE
      of_stream = _of_layers(shown, batch, options, settings, num_layers)
      layers |= {f"{stream}/{name}": values for name, values in of_stream.items()}
    if "ssa" in options.pattern:
      layers["align"] = run("train")[0].align_L
    return Look(layers, _of_model(params, batch, hidden, settings.chunk_length))

  return look


def _of_model(params, batch, hidden: dict[str, jax.Array], chunk_length: int):
  table_VE, total = model.unembedding(params), batch.weights.sum()
  kl_BT = divergence.from_full(*hidden.values(), table_VE, chunk_length=chunk_length)
  values = dict(kl=(kl_BT * batch.weights).sum() / total)
  for stream, hidden_BTE in hidden.items():
    nll_BT = losses.next_token(
      hidden_BTE, table_VE, batch.targets, chunk_length=chunk_length
    ).nll
    values[f"loss_{stream}"] = (nll_BT * batch.weights).sum() / total
  values["gap"] = values["loss_sparse"] - values["loss_full"]
  return values


def _of_layers(shown, batch, options: method.Options, settings: Settings, num_layers: int):
  """Numbers of all layers in one stream, [L] by name."""
  stacks = {
    name: seen.by_place(shown, name) for name in ("queries", "keys", "key_bias", "blocks")
  }
  period, result = len(options.pattern), {}
  for place in range(period):
    arrays = {name: by_place[place] for name, by_place in stacks.items() if place in by_place}
    own = options.of_layer(place)
    of_layer = functools.partial(_of_layer, batch=batch, options=own, settings=settings)
    for name, values_S in jax.lax.map(of_layer, arrays).items():
      nowhere_L = jnp.full((num_layers,), jnp.nan)
      result[name] = result.get(name, nowhere_L).at[place::period].set(values_S)
  return result


def _of_layer(arrays, *, batch, options: method.Options, settings: Settings):
  """Numbers of one layer by name, from what it showed."""
  segments_BT = batch.segments
  t = segments_BT.shape[1]
  begins_BT = jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1] - 1) != 0
  first_BT = jax.lax.cummax(jnp.where(begins_BT, jnp.arange(t)[None], 0), axis=1)
  is_real_BT = segments_BT > 0
  separate = options.document_mask in ("both", "full")

  position_P = attention_mass.sample_positions(t, settings.num_queries)
  p_BPHS = attention_mass.probabilities(
    arrays["queries"][:, position_P],
    arrays["keys"],
    position_P,
    segments_BS=segments_BT if separate else None,
    key_bias_BSK=arrays.get("key_bias"),
  )
  first_BP, is_real_BP = first_BT[:, position_P], is_real_BT[:, position_P]
  sink_first = first_BP if separate else jnp.zeros_like(first_BP)
  values = dict(
    entropy=_mean(attention_mass.entropy(p_BPHS), is_real_BP),
    sink=_mean(
      attention_mass.sink_mass(p_BPHS, sink_first, settings.num_sink_keys), is_real_BP
    ),
  )
  if "blocks" not in arrays:
    return values
  blocks_BTKM, size = arrays["blocks"], options.block_size
  kept_BPH = attention_mass.attention_sparsity(p_BPHS, blocks_BTKM[:, position_P], size)
  has_more_BP = position_P[None] - first_BP >= blocks_BTKM.shape[-1] * size
  overlap = block_choice.overlap(blocks_BTKM)
  # Full lists alone; and the first query of a document chooses anew.
  is_full = (blocks_BTKM >= 0).all(-1) & (is_real_BT & ~begins_BT)[..., None]
  rules = attention.sparse_method(options).selection(options, t)
  forced = block_choice.forced_share(
    blocks_BTKM,
    first_BT,
    block_size=size,
    num_initial=rules.get("num_initial", 0),
    num_local=rules.get("num_local", 1),
  )
  union = block_choice.union_size(blocks_BTKM, settings.tile)
  least = jnp.where(is_full[:, 1:], overlap, jnp.inf).min()
  return values | dict(
    attn_sparsity=_mean(kept_BPH, is_real_BP & has_more_BP),
    overlap_mean=(overlap * is_full[:, 1:]).sum() / is_full[:, 1:].sum(),
    overlap_min=jnp.where(jnp.isinf(least), jnp.nan, least),
    forced_share=_mean(forced, is_real_BT),
    union=union.mean(),
  )


def _mean(x_BTH, is_counted_BT):
  """The mean over counted queries and all heads; NaN where none counts."""
  total = is_counted_BT.sum() * x_BTH.shape[2]
  return (x_BTH * is_counted_BT[..., None]).sum() / total


def scalars(look: Look) -> dict[str, float]:
  """Numbers by name for logs: of the model, means over layers, and of every layer.

  What no layer has is left out.
  """
  values = {f"diagnostics/{name}": float(x) for name, x in look.model.items()}
  for name, values_L in look.layers.items():
    there = {i: float(x) for i, x in enumerate(values_L) if x == x}
    if there:
      values[f"diagnostics/{name}"] = sum(there.values()) / len(there)
      values |= {f"diagnostics/{name}/layer_{i}": x for i, x in there.items()}
  return values
