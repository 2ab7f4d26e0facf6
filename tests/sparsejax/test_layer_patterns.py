"""Models whose layers run different methods."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import attention, cost, model, sharding
from sparsejax.attention import backends, rotary
from sparsejax.configuration import build
from sparsejax.evaluation import block_lists
from sparsejax.training import state as states
from sparsejax.training import step as steps
from tests import small

LAYERS = 4


def make(*layer_methods, **changes):
  return small.make_model(
    attention__layer_methods=layer_methods, model__num_hidden_layers=LAYERS, **changes
  )


def run(transformer, params, batch, stream, use_full_L=None):
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


def weights_of_layer(params, pattern, layer):
  """Of a layer, from the stack that it is in."""
  stack = params["layers"]
  if len(pattern) > 1:
    stack = stack[str(layer % len(pattern))]
  return jax.tree.map(lambda x: x[layer // len(pattern)], stack)


def one_by_one(transformer, params, batch, stream, use_full_L):
  """The layers as blocks of their own, each of a model that runs one method."""
  shape, names = transformer.shape, transformer.options.pattern
  angles = rotary.angles(batch.positions, shape.head_dim, shape.rope_theta, shape.rope_scaling)
  x = params["embed_tokens"]["embedding"][batch.inputs]
  aligns = []
  for layer in range(LAYERS):
    name = names[layer % len(names)]
    own = "full" if name == "full" else stream
    block = model.Block(shape, small.make_model(attention__method=name).options, own)
    weights = weights_of_layer(params, names, layer)
    apply = jax.jit(functools.partial(block.apply, {"params": weights}))
    # Neither what its stack remembers nor what it knows of the past: the model does not decode.
    (x, _), align = apply((x, None), angles, batch.segments, None, use_full_L[layer], layer)
    aligns.append(align)
  scale = params["norm"]["scale"]
  return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale[None, None], aligns


@pytest.mark.parametrize(
  ("names", "stream"),
  [
    (("sliding_window", "ssa"), "train"),
    (("sliding_window", "full"), "sparse"),
    (("moba", "moba", "moba", "full"), "sparse"),
  ],
)
def test_every_layer_runs_its_own_method(names, stream):
  """On its own weights and its own toss, and a layer that is to be full stays so."""
  transformer = make(*names)
  params = small.make_params(transformer, scale=4.0)
  batch = small.make_batch()
  use_full_L = jnp.asarray([True, True, True, False])
  actual = run(transformer, params, batch, stream, use_full_L)
  hidden, aligns = one_by_one(transformer, params, batch, stream, use_full_L)
  np.testing.assert_allclose(actual.hidden_BTE, hidden, atol=2e-4)
  np.testing.assert_allclose(actual.align_L, jnp.stack(aligns), rtol=1e-3, atol=1e-7)
  if stream == "train":
    aligned = [names[layer % len(names)] == "ssa" for layer in range(LAYERS)]
    np.testing.assert_array_equal(actual.align_L > 0, aligned)


@pytest.mark.parametrize(
  ("names", "pattern"),
  [
    ((), ("ssa",)),
    (("moba",), ("moba",)),
    (("moba",) * 4, ("moba",)),
    (("moba", "full") * 2, ("moba", "full")),
    (("moba", "moba", "full", "full"), ("moba", "moba", "full", "full")),
  ],
)
def test_a_pattern_is_its_shortest_period(names, pattern):
  transformer = make(*names)
  assert transformer.options.pattern == pattern
  params = small.make_params(transformer)
  if len(pattern) == 1:
    plain = small.make_params(
      small.make_model(attention__method=pattern[0], model__num_hidden_layers=LAYERS)
    )
    jax.tree.map(np.testing.assert_array_equal, params, plain)
  else:
    assert set(params["layers"]) == {str(place) for place in range(len(pattern))}
    leaf = params["layers"]["1"]["self_attn"]["q_proj"]["kernel"]
    assert leaf.shape == (LAYERS // len(pattern), 32, 4, 8)


@pytest.mark.parametrize(
  ("names", "home"), [(("full",), "full"), (("moba", "full"), "sparse"), ((), "sparse")]
)
def test_the_mode_of_inference_that_a_pattern_is_for(names, home):
  assert make(*names).options.home_stream == home


def test_only_a_pattern_keeps_full_attention_full():
  batch = small.make_batch()
  alone = make(attention__method="full")
  params = small.make_params(alone, scale=4.0)
  outs = {
    (name, stream): run(transformer, params, batch, stream).hidden_BTE
    for name, transformer in (("method", alone), ("pattern", make("full")))
    for stream in ("full", "sparse")
  }
  np.testing.assert_array_equal(outs["method", "full"], outs["pattern", "full"])
  np.testing.assert_array_equal(outs["pattern", "sparse"], outs["pattern", "full"])
  assert jnp.abs(outs["method", "sparse"] - outs["method", "full"]).max() > 1e-3


def test_rematerialisation_changes_no_gradient_and_keeps_less():
  batch = small.make_batch()

  def loss(transformer):
    def total(params):
      out = transformer.apply({"params": params}, batch.inputs, batch.positions, batch.segments)
      return (out.hidden_BTE**2).mean() + out.align_L.sum()

    return total

  plain, other = (make("moba", "full", model__remat=name) for name in ("none", "full"))
  params = small.make_params(plain)
  gradients = [jax.jit(jax.grad(loss(t)))(params) for t in (plain, other)]
  for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
  kept = [
    cost.num_parameters(jax.eval_shape(lambda p, t=t: jax.vjp(loss(t), p)[1], params))
    for t in (plain, other)
  ]
  assert kept[1] < 0.7 * kept[0]


def test_a_step_over_devices_counts_the_layers_that_align():
  config = small.make_config(
    attention__layer_methods=("full", "ssa"), model__num_hidden_layers=2, ssa__full_ratio=1.0
  )
  transformer = build.make_model(config, max_documents=4)
  optimizer, schedule = build.make_optimizer(config)
  step = steps.make_train_step(
    transformer, optimizer, schedule, build.make_loss_options(config), accumulate_steps=1
  )
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  state, batch = states.init_state(transformer, optimizer, mesh, 0), small.make_batch(rows=8)
  align_L = run(transformer, jax.device_get(state.params), batch, "train").align_L
  with sharding.use(mesh):
    rng = jax.device_put(jax.random.key(0), sharding.replicated(mesh))
    _, metrics = jax.jit(step)(state, sharding.put_batch(batch, mesh), rng)
  np.testing.assert_allclose(metrics["align"], align_L[1], rtol=1e-4)
  assert jnp.isfinite(metrics["grad_norm"])


def test_operations_of_all_layers_are_chosen_once():
  transformer = make("sliding_window", "full", "nsa", "ssa")
  shape = dict(dtype="float32", num_heads=4, num_kv_heads=2, head_dim=8, length=64)
  ops = [choice.op for choice in backends.choose(transformer.options, **shape)]
  assert sorted(ops) == [
    "block_selection",
    "block_sparse_attention",
    "compressed_attention",
    "dual_path_attention",
    "full_attention",
    "sliding_window_attention",
  ]
  only_full = backends.choose(make("full").options, **shape)
  assert [choice.op for choice in only_full] == ["full_attention"]


def test_a_pattern_costs_the_mean_of_its_methods():
  def flops(transformer):
    return cost.train_flops_per_token(transformer.shape, transformer.options, 64)

  names = ("sliding_window", "full", "nsa", "ssa")
  alone = [flops(make(attention__method=name)) for name in names]
  assert flops(make(*names)) == pytest.approx(np.mean(alone))


def test_lists_are_in_the_order_of_the_layers():
  """A layer that chooses none has an empty list."""
  transformer, batch = make("moba", "full"), small.make_batch(rows=1)
  params = small.make_params(transformer, scale=4.0)
  source = types.SimpleNamespace(validation=[jax.tree.map(lambda x: x[0], batch)])
  lists = block_lists.choose(
    types.SimpleNamespace(
      corpus=types.SimpleNamespace(sources=[source]),
      mesh=sharding.make_mesh(data=-1, fsdp=1, tensor=1),
      transformer=transformer,
      params=params,
      config=small.make_config(),
    )
  )
  assert lists.shape == (LAYERS, 64, 2, 3)
  np.testing.assert_array_equal((lists >= 0).any((1, 2, 3)), [True, False, True, False])
  # The first two layers alone.
  own = transformer.clone(shape=dataclasses.replace(transformer.shape, num_hidden_layers=2))
  first = params | {"layers": jax.tree.map(lambda x: x[:1], params["layers"])}
  _, seen = jax.jit(
    lambda params: own.apply(
      {"params": params},
      batch.inputs,
      batch.positions,
      batch.segments,
      stream="sparse",
      mutable=["intermediates"],
    )
  )(first)
  (blocks,) = seen["intermediates"]["layers"]["0"]["self_attn"]["sparse"]["blocks"]
  np.testing.assert_array_equal(lists[0], blocks[0, 0])
  assert (lists[0] != lists[2]).any()


def test_sparse_names_are_those_that_run():
  assert attention.sparse_names(make("full", "moba").options) == ("moba",)
  assert attention.sparse_names(make("ssa", "nsa").options) == ("moba", "nsa")
  assert attention.sparse_names(make().options) == ("moba",)
  assert attention.sparse_names(make("full").options) == ()
