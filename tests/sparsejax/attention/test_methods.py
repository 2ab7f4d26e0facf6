"""One battery for every entry of METHODS."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import attention, sharding
from sparsejax.attention import layer, rotary
from tests import small

STREAMS = ("train", "full", "sparse")
# Of the methods that train sparse, training is left out: it is the same program.
RUNS = [
  (name, stream)
  for name in attention.METHODS
  for stream in STREAMS
  if stream != "train" or name not in attention.SPARSE_METHODS
]
T, E = 64, 32
KERNEL_INIT = jax.nn.initializers.normal(0.5)


def make_layer(method, dtype="float32", **changes):
  sections = {key: changes.pop(key) for key in list(changes) if "__" in key}
  options = small.make_model(attention__method=method, **sections).options
  options = dataclasses.replace(options, **changes)
  return layer.Attention(
    width=E,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    options=options,
    kernel_init=KERNEL_INIT,
    dtype=dtype,
  )


@functools.cache
def make_inputs(rows=2, seed=0):
  batch = small.make_batch(rows=rows, length=T, seed=seed)
  x_BTE = jax.random.normal(jax.random.key(seed), (rows, T, E))
  scaling = rotary.Scaling(
    rope_type="default",
    factor=1.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=T,
  )
  return x_BTE, rotary.angles(batch.positions, 8, 1e4, scaling), batch.segments


@functools.cache
def make_run(module, stream, use_full=True, rows=2):
  """A jitted function of the layer's input, and the input of `make_inputs`."""
  x_BTE, angles, segments = make_inputs(rows)
  arguments = (angles, segments, jnp.asarray(use_full), stream)
  params = make_params(module.options.method)
  # Without a past, which there is while decoding.
  return jax.jit(lambda x_BTE: module.apply(params, x_BTE, *arguments)[:2]), x_BTE


@functools.cache
def make_gradient(method, stream, use_full=True):
  """A jitted function of cotangents: outputs, and the gradient of the input, in bfloat16."""
  run, x_BTE = make_run(make_layer(method, dtype="bfloat16"), stream, use_full)

  @jax.jit
  def gradient(dout_BTE, dalign):
    outputs, vjp = jax.vjp(run, x_BTE)
    return outputs, *vjp((dout_BTE, dalign))

  return gradient


@functools.cache
def make_params(method):
  """Of a method's layer in any precision and with any budget."""
  module, inputs = make_layer(method), make_inputs(rows=1)
  make = jax.jit(lambda rng: module.init(rng, *inputs, jnp.asarray(True), "train"))
  params = make(jax.random.key(1))
  if "head" in params["params"].get("sparse", {}):
    # Else an eviction head would have nothing to say.
    head = params["params"]["sparse"]["head"]
    head["scale"] = head["scale"].replace_boxed(jnp.asarray([0.4, -0.7]))
  return params


@pytest.mark.parametrize(
  ("method", "stream", "use_full"),
  [*((*run, True) for run in RUNS), ("ssa", "train", False)],
)
def test_the_future_has_no_gradient(method, use_full, stream):
  """The gradient of output t with respect to inputs after t is zero, to the last bit."""
  run = make_gradient(method, stream, use_full)
  for t in (0, 7, 8, 30, T - 2):
    dout_BTE = np.zeros((2, T, E), jnp.bfloat16)
    dout_BTE[:, t] = 1.0
    _, gradient = run(dout_BTE, np.float32(0.0))
    gradient = np.asarray(gradient)
    assert gradient[:, : t + 1].any()
    assert not gradient[:, t + 1 :].any()


@pytest.mark.parametrize(("method", "stream"), RUNS)
def test_gradients_are_finite_in_bfloat16(method, stream):
  dout_BTE = np.ones((2, T, E), jnp.bfloat16)
  (out_BTE, align), gradient = make_gradient(method, stream)(dout_BTE, np.float32(1.0))
  assert out_BTE.dtype == jnp.bfloat16
  assert align.dtype == jnp.float32
  assert jnp.isfinite(gradient).all()
  assert gradient.any()


@pytest.mark.parametrize(("method", "stream"), RUNS)
def test_documents_do_not_see_each_other(method, stream):
  """A packed row gives what each of its documents gives alone."""
  module = make_layer(method)
  run, x_BTE = make_run(module, stream)
  packed = run(x_BTE)[0]
  segments = np.asarray(make_inputs()[2][0])
  for document in range(1, segments.max() + 1):
    others = jnp.asarray(segments != document)[None, :, None]
    changed = run(jnp.where(others, 100.0 + x_BTE, x_BTE))[0]
    own = segments == document
    np.testing.assert_allclose(packed[0, own], changed[0, own], atol=1e-5)


@pytest.mark.parametrize("mask", ["full", "none"])
def test_the_released_behaviour_crosses_documents(mask):
  """`full`: only the sparse stream crosses documents; `none`: both do."""
  inputs = make_inputs(rows=1)
  segments = np.asarray(inputs[2][0])
  last = segments == segments.max()
  crosses = {}
  for stream in ("full", "sparse"):
    run, x_BTE = make_run(make_layer("moba", document_mask=mask), stream, rows=1)
    before = run(x_BTE)[0]
    after = run(jnp.where(jnp.asarray(~last)[None, :, None], 3.0 - x_BTE, x_BTE))[0]
    crosses[stream] = bool(jnp.abs(before - after)[0, last].max() > 1e-3)
  assert crosses == dict(full=mask == "none", sparse=True)


@pytest.mark.parametrize("method", attention.METHODS)
def test_everything_allowed_is_full_attention(method):
  sparse, x_BTE = make_run(make_layer(method, num_blocks=T // 8, window=T), "sparse")
  full, _ = make_run(make_layer(method, window=T), "full")
  np.testing.assert_allclose(sparse(x_BTE)[0], full(x_BTE)[0], atol=1e-5)


@pytest.mark.parametrize("method", attention.METHODS)
def test_a_small_budget_is_not_full_attention(method):
  sparse, x_BTE = make_run(make_layer(method), "sparse")
  full, _ = make_run(make_layer(method), "full")
  assert jnp.abs(sparse(x_BTE)[0] - full(x_BTE)[0]).max() > 1e-2


def test_training_runs_the_stream_that_the_method_is_for():
  """full trains full, moba trains sparse, ssa what the coin says; with one set of weights."""

  def run(*case):
    layer_run, x_BTE = make_run(make_layer(case[0]), *case[1:])
    return layer_run(x_BTE)[0]

  expected = {("full", True): "full", ("full", False): "full"}
  expected |= {("ssa", True): "full", ("ssa", False): "sparse"}
  expected |= {("moba", coin): "sparse" for coin in (True, False)}
  for (method, coin), stream in expected.items():
    np.testing.assert_array_equal(
      run(method, "train", coin), run("ssa", stream, True), err_msg=f"{method} {coin}"
    )


@pytest.mark.parametrize("method", attention.SPARSE_METHODS)
def test_methods_that_select_train_sparse(method):
  module = make_layer(method)
  arguments = make_params(method), *make_inputs(rows=1), jnp.asarray(True)

  def program(stream):
    return str(jax.make_jaxpr(lambda *x: module.apply(*x, stream))(*arguments))

  assert program("train") == program("sparse") != program("full")


@pytest.mark.parametrize("method", attention.METHODS)
def test_the_gate_is_a_switch(method):
  """Off, its parameter is gone; on, it multiplies every head's output by a sigmoid."""
  inputs = *make_inputs(), jnp.asarray(True)
  on, off = make_layer(method), make_layer(method, gate=False)
  params = make_params(method)["params"]
  init = functools.partial(off.init, stream="full")
  assert "g_proj" not in jax.eval_shape(init, jax.random.key(1), *inputs)["params"]
  # sigmoid(0) = 1/2 for every head.
  closed = params | {"g_proj": jax.tree.map(jnp.zeros_like, params["g_proj"])}
  bare = {name: value for name, value in params.items() if name != "g_proj"}
  halved, whole = (
    jax.jit(functools.partial(module.apply, stream="full"))({"params": weights}, *inputs)[0]
    for module, weights in ((on, closed), (off, bare))
  )
  np.testing.assert_allclose(2 * halved, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", attention.METHODS)
def test_eight_devices_equal_one(method):
  inputs = make_inputs(rows=8)
  module = make_layer(method)
  x_BTE, angles, segments = inputs
  arguments = (angles, segments, jnp.asarray(True))
  params = make_params(method)

  @functools.partial(jax.jit, static_argnames="stream")
  def run(params, x_BTE, angles, segments, use_full, stream):
    def loss(x_BTE):
      out, align, _ = module.apply(params, x_BTE, angles, segments, use_full, stream)
      return (out**2).sum() + align, out

    return jax.value_and_grad(loss, has_aux=True)(x_BTE)

  alone = run(params, x_BTE, *arguments, stream="train")
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  rows = sharding.batch_sharding(mesh)
  divided = [jax.device_put(x, rows) for x in (x_BTE, angles, segments)]
  params = jax.device_put(params, sharding.replicated(mesh))
  with sharding.use(mesh):
    together = run(params, *divided, arguments[2], stream="train")
  for one, eight in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
    # Sums in another order: float32's rounding of the largest element.
    atol = 1e-5 * float(jnp.abs(one).max())
    np.testing.assert_allclose(one, eight, rtol=0, atol=atol)


def test_lists_can_be_looked_at():
  """The blocks that queries chose are there for whoever asks, layer by layer."""
  transformer = small.make_model()
  params = small.make_params(transformer)
  batch = small.make_batch()
  apply = functools.partial(transformer.apply, stream="sparse", mutable=["intermediates"])
  _, seen = jax.jit(apply)({"params": params}, batch.inputs, batch.positions, batch.segments)
  (blocks,) = seen["intermediates"]["layers"]["self_attn"]["sparse"]["blocks"]
  assert blocks.shape == (2, 2, 64, 2, 3)
  own = np.arange(64) // 8
  assert (np.asarray(blocks) == own[None, None, :, None, None]).any(-1).all()
