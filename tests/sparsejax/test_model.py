"""The transformer as a whole."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import attention, errors, losses, model, parameters, sharding
from sparsejax.configuration import build
from tests import small


@functools.cache
def make_run(transformer, stream):
  """A jitted function of parameters, a batch, and whether SSA's coin fell on full."""

  def apply(params, batch, use_full):
    return transformer.apply(
      {"params": params},
      batch.inputs,
      batch.positions,
      batch.segments,
      stream=stream,
      use_full_L=jnp.full((transformer.shape.num_hidden_layers,), use_full),
    )

  return jax.jit(apply)


def run(transformer, params, batch, stream="train", use_full=True):
  return make_run(transformer, stream)(params, batch, use_full)


@pytest.mark.parametrize(
  ("method", "stream"),
  [
    *((method, "train") for method in attention.METHODS),
    ("full", "sparse"),
    ("ssa", "sparse"),
    ("nosa", "full"),
  ],
)
def test_later_tokens_change_nothing_before_them(method, stream):
  transformer = small.make_model(attention__method=method)
  params = small.make_params(transformer, scale=4.0)
  batch = small.make_batch()
  at = 30
  changed = batch._replace(inputs=batch.inputs.at[:, at:].set(319 - batch.inputs[:, at:]))
  before, after = (run(transformer, params, b, stream).hidden_BTE for b in (batch, changed))
  np.testing.assert_array_equal(before[:, :at], after[:, :at])
  assert (before[:, at] != after[:, at]).any()


def loss_of(transformer, params, batch):
  output = transformer.apply({"params": params}, batch.inputs, batch.positions, batch.segments)
  return (output.hidden_BTE**2).mean() + output.align_L.sum()


@functools.cache
def make_gradient(transformer):
  return jax.jit(jax.grad(functools.partial(loss_of, transformer)))


def shapes_kept(transformer, params, batch):
  """Of all that the forward pass keeps for the gradient."""

  def backward(params):
    return jax.vjp(lambda params: loss_of(transformer, params, batch), params)[1]

  return [x.shape for x in jax.tree.leaves(jax.eval_shape(backward, params))]


@pytest.mark.parametrize("remat", ["dots", "attention", "full"])
def test_rematerialisation_keeps_less_and_changes_no_gradient(remat):
  batch = small.make_batch()
  plain, other = small.make_model(model__remat="none"), small.make_model(model__remat=remat)
  params = small.make_params(plain)
  gradients = [make_gradient(transformer)(params, batch) for transformer in (plain, other)]
  for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
  plain_kept, other_kept = (
    sum(map(math.prod, shapes_kept(transformer, params, batch)))
    for transformer in (plain, other)
  )
  assert other_kept < 0.7 * plain_kept


def test_the_attention_policy_keeps_the_residuals_of_attention():
  batch = small.make_batch()
  kept = {}
  for policy in ("full", "attention"):
    transformer = small.make_model(model__remat=policy, attention__method="moba")
    kept[policy] = shapes_kept(transformer, small.make_params(transformer), batch)
  # Log-normalisers [layers, B, T, H]; without them the forward pass of attention runs again.
  residual = (2, 2, 64, 4)
  assert residual in kept["attention"]
  assert residual not in kept["full"]


def test_all_methods_share_their_parameters():
  """One checkpoint can be trained one way and evaluated in others.

  What a method has of its own is in one place beside them.
  """
  own = set()
  for method in attention.METHODS:
    transformer = small.make_model(attention__method=method)
    params = small.shapes_of_params(transformer)
    if params["layers"]["self_attn"].pop("sparse", None):
      own.add(method)
    shared = params if method == "full" else shared
    assert params == shared
  assert own == {"dma", "ed_dma", "nosa", "nsa"}


@pytest.mark.parametrize("is_tied", [True, False])
def test_logits_come_from_the_unembedding(is_tied):
  transformer = small.make_model(model__tie_word_embeddings=is_tied)
  params = small.make_params(transformer)
  assert ("lm_head" in params) == (not is_tied)
  batch = small.make_batch()
  hidden = run(transformer, params, batch).hidden_BTE
  table = params["embed_tokens"]["embedding"] if is_tied else params["lm_head"]
  logits = model.logits(params, hidden)
  np.testing.assert_allclose(logits, hidden @ table.T, rtol=1e-4, atol=1e-5)
  nll = losses.next_token(hidden, model.unembedding(params), batch.targets, chunk_length=9).nll
  expected = -jax.nn.log_softmax(logits)
  expected = jnp.take_along_axis(expected, batch.targets[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(nll, expected, rtol=1e-4, atol=1e-4)


def test_it_is_a_llama():
  """Full attention without the gate, layer by layer, against plain numpy."""
  transformer = small.make_model(attention__method="full", attention__gate=False)
  params = small.make_params(transformer, scale=3.0)
  batch = small.make_batch(rows=1, num_documents=1)._replace(
    segments=jnp.ones((1, 64), jnp.int32)
  )
  actual = run(transformer, params, batch).hidden_BTE[0]
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

  def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

  def rope(x):
    angle = np.arange(64)[:, None] * 10_000.0 ** (-np.arange(4) / 4)
    z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)[:, None]
    return np.concatenate([z.real, z.imag], axis=-1)

  x = p["embed_tokens"]["embedding"][np.asarray(batch.inputs[0])]
  for i in range(2):
    layer = jax.tree.map(lambda w, i=i: w[i], p["layers"])
    weights = layer["self_attn"]
    h = norm(x, layer["input_layernorm"]["scale"])
    q, k, v = (np.einsum("te,ehd->thd", h, weights[f"{name}_proj"]["kernel"]) for name in "qkv")
    q, k = rope(q), np.repeat(rope(k), 2, axis=1)
    scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(8)
    scores = np.where(np.tri(64, dtype=bool), scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    out = np.einsum("hts,shd->thd", scores, np.repeat(v, 2, axis=1))
    x = x + np.einsum("thd,hde->te", out, weights["o_proj"]["kernel"])
    h = norm(x, layer["post_attention_layernorm"]["scale"])
    gate, up = (h @ layer["mlp"][f"{name}_proj"]["kernel"] for name in ("gate", "up"))
    x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp"]["down_proj"]["kernel"]
  np.testing.assert_allclose(actual, norm(x, p["norm"]["scale"]), rtol=2e-3, atol=2e-3)


def test_alignment_is_reported_by_layer():
  transformer = small.make_model()
  params = small.make_params(transformer, scale=4.0)
  batch = small.make_batch()
  align = run(transformer, params, batch).align_L
  assert align.shape == (2,)
  assert (align > 0).all()
  moba = small.make_model(attention__method="moba")
  assert not run(moba, params, batch).align_L.any()


def test_the_coin_reaches_the_layers():
  transformer = small.make_model()
  params = small.make_params(transformer, scale=4.0)
  batch = small.make_batch()
  heads, tails = (run(transformer, params, batch, use_full=b).hidden_BTE for b in (True, False))
  full, sparse = (run(transformer, params, batch, s).hidden_BTE for s in ("full", "sparse"))
  np.testing.assert_array_equal(heads, full)
  np.testing.assert_array_equal(tails, sparse)
  assert jnp.abs(full - sparse).max() > 1e-3


def test_parameters_are_float32_under_bfloat16_compute():
  transformer = small.make_model(model__dtype="bfloat16")
  params = small.make_params(transformer)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  assert run(transformer, params, small.make_batch()).hidden_BTE.dtype == jnp.bfloat16


def test_initial_weights_have_the_configured_spread():
  transformer = small.make_model(model__hidden_size=256, model__initializer_range=0.02)
  params = small.make_params(transformer)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if path[-1].key == "scale":
      np.testing.assert_array_equal(leaf, jnp.ones_like(leaf))
    else:
      assert abs(float(leaf.std()) - 0.02) < 2e-3, path


def test_parameters_are_made_whatever_attention_runs_on():
  """Even where no kernel can run: that is for whoever runs the model to hear."""
  strict = small.make_model(attention__kernels="strict")
  jax.tree.map(
    np.testing.assert_array_equal,
    small.make_params(strict),
    small.make_params(small.make_model()),
  )


def test_half_local_selection_runs():
  """Parameters are made with rows of one block, which has no half."""
  transformer = small.make_model(attention__selection="half_local", attention__num_blocks=4)
  batch, params = small.make_batch(), small.make_params(transformer, scale=4.0)
  exact = small.make_model(attention__num_blocks=4)
  hidden = [run(t, params, batch, "sparse").hidden_BTE for t in (transformer, exact)]
  assert jnp.abs(hidden[0] - hidden[1]).max() > 1e-3


def test_weights_are_divided_as_the_rules_say():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  params = parameters.abstract(small.make_model(), mesh)
  specs = jax.tree.map(lambda x: tuple(x.sharding.spec), params)
  attn, mlp = specs["layers"]["self_attn"], specs["layers"]["mlp"]
  assert specs["embed_tokens"]["embedding"] == ("tensor", "fsdp")
  assert attn["q_proj"]["kernel"] == (None, "fsdp", "tensor", None)
  assert attn["o_proj"]["kernel"] == (None, "tensor", None, "fsdp")
  assert mlp["down_proj"]["kernel"] == (None, "tensor", "fsdp")


def test_a_budget_without_room_for_forced_blocks_is_refused():
  nosa = small.make_model(
    attention__method="ssa", attention__sparse_method="nosa", infllmv2__num_local=2
  )
  # Two local ones and one that the query chooses.
  assert build.with_budget(nosa, 24).options.num_blocks == 3
  with pytest.raises(
    errors.ConfigError,
    match=r"a budget of 16 keys is 2 blocks of 8, fewer than the 3 that .* take at least 24",
  ):
    build.with_budget(nosa, 16)


def test_a_budget_changes_the_blocks_and_nothing_else():
  transformer = small.make_model()
  wider = build.with_budget(transformer, 64)
  assert wider.options.num_blocks == 8
  assert dataclasses.replace(wider.options, num_blocks=3) == transformer.options
