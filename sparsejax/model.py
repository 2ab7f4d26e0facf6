"""A decoder-only transformer of the Llama family, with any attention method.

Parameter names are those of Hugging Face Llama, plus `self_attn.g_proj` for the gate; the
layers are stacked along a leading axis and scanned. Where layers run different methods in
turn, each place in their pattern has a stack of its own, `layers.0`, `layers.1` and so on.

Letters: B batch, T tokens, E width, F MLP width, V vocabulary, L layers, D head size.
"""

import dataclasses
import functools
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import sharding
from sparsejax.attention import layer, method, rotary
from sparsejax.attention import product as products
from sparsejax.attention.past import Cache
from sparsejax.attention.prompt import Prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """Architecture; the keys and defaults of `model` in configs/base.py.

  Names are those of a Hugging Face `config.json`. `remat` is a key of `REMAT_POLICIES`,
  `dtype` that of activations and matrix products; parameters are float32.
  """

  num_hidden_layers: int
  hidden_size: int
  intermediate_size: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  vocab_size: int
  rms_norm_eps: float
  rope_theta: float
  rope_scaling: rotary.Scaling
  tie_word_embeddings: bool
  initializer_range: float
  dtype: str
  remat: str


class Output(NamedTuple):
  """What the model computes.

  Attributes:
    hidden_BTE: normed output of the last layer; `unembedding` turns it into logits.
    align_L: each layer's disagreement of streams (SSA), float32.
    cache: with the tokens at hand, where one was given.
  """

  hidden_BTE: jax.Array
  align_L: jax.Array
  cache: Cache | Prompt | None = None


def _saves_attention(primitive, *args, **parameters) -> bool:
  """Keeps what the attention backward pass needs, so that attention never runs twice."""
  del args
  if primitive.name == "name":
    # pallas_kernels tags its residuals.
    return parameters["name"] == "attention_residual"
  # cuDNN's call has no tag; its outputs are the residuals.
  return primitive.name.startswith("dot_product_attention_fwd")


# What the backward pass recomputes of a layer. None: nothing, everything is kept.
REMAT_POLICIES = {
  "none": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "attention": _saves_attention,
  "full": jax.checkpoint_policies.nothing_saveable,
}


class Mlp(nn.Module):
  """SwiGLU."""

  shape: Shape

  @nn.compact
  def __call__(self, x_BTE):
    gate_BTF = self._dense("gate_proj", ("embed", "mlp"))(x_BTE)
    up_BTF = self._dense("up_proj", ("embed", "mlp"))(x_BTE)
    inner_BTF = sharding.constrain(nn.silu(gate_BTF) * up_BTF, "batch", "length", "mlp")
    return self._dense("down_proj", ("mlp", "embed"))(inner_BTF)

  def _dense(self, name: str, axes: tuple[str, str]) -> nn.Module:
    is_inner = axes[1] == "mlp"
    return nn.Dense(
      self.shape.intermediate_size if is_inner else self.shape.hidden_size,
      use_bias=False,
      dtype=self.shape.dtype,
      kernel_init=nn.with_logical_partitioning(_matrix_init(self.shape), axes),
      name=name,
    )


class Block(nn.Module):
  """Attention, then MLP, each normed before and added to the residual stream."""

  shape: Shape
  options: method.Options
  stream: method.Stream

  @nn.compact
  def __call__(self, carry, angles_BTD, segments_BT, past: method.Earlier, use_full, number):
    """Takes hidden states [B, T, E] through the layer.

    Args:
      carry: those, and with a cache what the layer's stack remembers; else None.
      angles_BTD, segments_BT, use_full: see `layer.Attention`.
      past: with a cache, all there is to know of the past but that.
      number: of the layer in its stack.
    """
    x_BTE, arrays = carry
    if past is not None:
      past = past.replace(arrays=arrays, layer=number)
    x_BTE = sharding.constrain(x_BTE, "batch", "length", "activation_embed")
    attended_BTE, align, past = layer.Attention(
      width=self.shape.hidden_size,
      num_heads=self.shape.num_attention_heads,
      num_kv_heads=self.shape.num_key_value_heads,
      head_dim=self.shape.head_dim,
      options=self.options,
      kernel_init=_matrix_init(self.shape),
      dtype=self.shape.dtype,
      name="self_attn",
    )(
      _norm(self.shape, "input_layernorm")(x_BTE),
      angles_BTD,
      segments_BT,
      use_full,
      self.stream,
      past,
    )
    x_BTE += attended_BTE
    x_BTE += Mlp(self.shape, name="mlp")(_norm(self.shape, "post_attention_layernorm")(x_BTE))
    return (x_BTE, None if past is None else past.arrays), align


class Period(nn.Module):
  """Layers that run different methods, one for each place in the pattern."""

  shape: Shape
  options: method.Options
  stream: method.Stream

  @nn.compact
  def __call__(self, carry, angles_BTD, segments_BT, pasts_P, use_full_P, number):
    """What `Block` takes and returns, with a tuple by place of all that is of a layer."""
    x_BTE, arrays_P = carry
    # A scan of one period is no loop, so that nothing else guards against CSE.
    block, after_P, aligns = _with_remat(self.shape, prevent_cse=True), [], []
    for place in range(len(self.options.pattern)):
      own = self.options.of_layer(place)
      layer_ = block(self.shape, own, self.stream, name=str(place))
      carry = x_BTE, arrays_P[place]
      given = angles_BTD, segments_BT, pasts_P[place], use_full_P[place], number
      (x_BTE, arrays), align = layer_(carry, *given)
      after_P.append(arrays)
      aligns.append(align)
    return (x_BTE, tuple(after_P)), jnp.stack(aligns)


def _with_remat(shape: Shape, *, prevent_cse: bool):
  """`Block`, recomputing what the shape's policy says."""
  policy = REMAT_POLICIES[shape.remat]
  if policy is None:
    return Block
  return nn.remat(Block, policy=policy, prevent_cse=prevent_cse)


class Transformer(nn.Module):
  """Token ids to the hidden states that predict the next ones."""

  shape: Shape
  options: method.Options

  @nn.compact
  def __call__(
    self,
    inputs_BT,
    positions_BT,
    segments_BT,
    *,
    stream: method.Stream = "train",
    use_full_L=None,
    cache: Cache | Prompt | None = None,
  ) -> Output:
    """Runs the model: whole rows, or with a cache one token or one chunk of every row.

    Args:
      inputs_BT: token ids.
      positions_BT: place of each token in its document.
      segments_BT: document of each token, from 1; 0 is padding.
      stream: `train`, `full` or `sparse` (see `attention.method`).
      use_full_L: SSA in training: which layers run on the full stream, bool (see
        `attention.ssa.toss`); None is all.
      cache: of the tokens before those at hand: to decode, a `Cache` whose lengths are their
        positions; to read a chunk of prompts, a `Prompt` (see `decoding.prefill`).
    """
    shape = self.shape
    if use_full_L is None:
      use_full_L = jnp.ones((shape.num_hidden_layers,), bool)
    embed = nn.Embed(
      shape.vocab_size,
      shape.hidden_size,
      dtype=shape.dtype,
      embedding_init=nn.with_logical_partitioning(_matrix_init(shape), ("vocab", "embed")),
      name="embed_tokens",
    )
    if not shape.tie_word_embeddings:
      self.param(
        "lm_head",
        nn.with_logical_partitioning(_matrix_init(shape), ("vocab", "embed")),
        (shape.vocab_size, shape.hidden_size),
      )
    x_BTE = sharding.constrain(embed(inputs_BT), "batch", "length", "activation_embed")
    angles_BTD = rotary.angles(
      positions_BT, shape.head_dim, shape.rope_theta, shape.rope_scaling
    )
    period = len(self.options.pattern)
    arrays = pasts = (None,) * period
    if cache is not None:
      arrays, pasts = cache.arrays, cache.pasts()
    if period == 1:
      # prevent_cse guards against what scan already rules out.
      body, options = _with_remat(shape, prevent_cse=False), self.options.of_layer(0)
      (arrays,), (pasts,) = arrays, pasts
    else:
      body, options = Period, self.options
      use_full_L = use_full_L.reshape(-1, period)
    # A constant, of which XLA knows that it is the loop's counter: what layers remember is then
    # read where it is.
    number_L = np.arange(shape.num_hidden_layers // period, dtype=np.int32)
    layers = nn.scan(
      body,
      variable_axes={"params": 0, "intermediates": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0, 0),
      length=shape.num_hidden_layers // period,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(shape, options, stream, name="layers")
    (x_BTE, arrays), align_L = layers(
      (x_BTE, arrays), angles_BTD, segments_BT, pasts, use_full_L, number_L
    )
    if cache is not None:
      cache = cache.after(arrays if period > 1 else (arrays,))
    return Output(_norm(shape, "norm")(x_BTE), align_L.reshape(-1), cache)


def unembedding(params) -> jax.Array:
  """The table [V, E] whose product with a hidden state gives the logits."""
  if "lm_head" in params:
    return params["lm_head"]
  return params["embed_tokens"]["embedding"]


def logits(params, hidden_BTE) -> jax.Array:
  """Logits [B, T, V], float32. Whole: for a loss, see `losses.next_token`."""
  table_VE = unembedding(params).astype(hidden_BTE.dtype)
  product = functools.partial(jnp.einsum, "bte,ve->btv", preferred_element_type=jnp.float32)
  return products.of_rows(product, hidden_BTE, table_VE)


def _norm(shape: Shape, name: str) -> nn.Module:
  return nn.RMSNorm(
    epsilon=shape.rms_norm_eps,
    dtype=shape.dtype,
    scale_init=nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",)),
    name=name,
  )


def _matrix_init(shape: Shape):
  return nn.initializers.normal(shape.initializer_range)
