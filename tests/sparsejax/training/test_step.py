"""The training step: what it computes, what it refuses, and that devices do not matter."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import losses, model, sharding
from sparsejax.attention import ssa
from sparsejax.configuration import build
from sparsejax.training import state as states
from sparsejax.training import step as steps
from tests import small

ROWS, LENGTH = 16, 32
KEY = jax.random.key(5)


def make_config(method):
  # A gradient clip far away, so that a wrong scale of the gradients cannot hide behind it.
  return small.make_config(
    attention__method=method, loss__z_loss_weight=1e-3, optimizer__clip=1e3
  )


@functools.cache
def make_mesh(data=1, fsdp=1, tensor=1):
  devices = jax.devices()[: data * fsdp * tensor]
  types_ = (jax.sharding.AxisType.Auto,) * 3
  return jax.make_mesh((data, fsdp, tensor), sharding.AXES, axis_types=types_, devices=devices)


@functools.cache
def make_parts(method):
  config = make_config(method)
  transformer = build.make_model(config, max_documents=4)
  optimizer, schedule = build.make_optimizer(config)
  return transformer, optimizer, schedule, build.make_loss_options(config)


@functools.cache
def make_step(method, accumulate_steps=1, mesh_sizes=(1, 1, 1)):
  """The jitted step, taking and returning what lies on the mesh."""
  transformer, optimizer, schedule, loss_options = make_parts(method)
  step = steps.make_train_step(
    transformer, optimizer, schedule, loss_options, accumulate_steps=accumulate_steps
  )
  jitted = jax.jit(step)
  mesh = make_mesh(*mesh_sizes)

  def run(state, batch, rng=KEY):
    with sharding.use(mesh):
      rng = jax.device_put(rng, sharding.replicated(mesh))
      return jitted(state, sharding.put_batch(batch, mesh), rng)

  return run


@functools.cache
def make_state():
  """On one device; past the warm-up's zero, and sharp enough for attention to matter.

  One for all methods: they have the same parameters.
  """
  transformer, optimizer, _, _ = make_parts("ssa")
  state = states.init_state(transformer, optimizer, make_mesh(), 0)
  params = jax.tree.map(lambda x: x * 4.0, state.params)
  return state.replace(params=params, opt_state=_age(state.opt_state))


def _age(opt_state):
  """As if one update had been made: the schedule begins at a rate of 0."""
  return jax.tree.map(lambda x: x + 1 if x.dtype == jnp.int32 else x, opt_state)


def move(method, state, mesh):
  """A state laid out as `abstract_state` says."""
  transformer, optimizer, _, _ = make_parts(method)
  abstract = states.abstract_state(transformer, optimizer, mesh)
  return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, abstract)


def make_batch(seed=0):
  """Rows whose weights are uneven: every fourth row hardly counts, none is whole."""
  batch = small.make_batch(rows=ROWS, length=LENGTH, seed=seed)
  rng = np.random.default_rng(seed)
  share = np.where(np.arange(ROWS) % 4 == 0, 0.1, 0.8)[:, None]
  weights = (
    np.asarray(batch.weights)
    * rng.random((ROWS, LENGTH))
    * (rng.random((ROWS, LENGTH)) < share)
  )
  return batch._replace(weights=weights.astype(np.float32))


def poison(batch, value=np.nan):
  weights = np.array(batch.weights)
  weights[3, 4] = value
  return batch._replace(weights=weights)


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, rtol=1e-4, atol=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def at(state, number):
  """The state as if `number` steps had been taken, laid out as before."""
  return state.replace(step=jax.device_put(jnp.int32(number), state.step.sharding))


def step_with(is_full, options):
  """A step number at which the coin falls as asked."""
  tosses = [bool(ssa.toss(KEY, jnp.int32(s), 1, options)[0]) for s in range(20)]
  return tosses.index(is_full)


@functools.cache
def direct_losses():
  """`(params, batch) -> cross-entropy under full and sparse inference`, without the step."""
  transformer = make_parts("ssa")[0]

  @jax.jit
  def run(params, batch):
    losses_ = {}
    for stream in ("full", "sparse"):
      output = transformer.apply(
        {"params": params}, batch.inputs, batch.positions, batch.segments, stream=stream
      )
      log_probability = jax.nn.log_softmax(model.logits(params, output.hidden_BTE))
      nll = -jnp.take_along_axis(log_probability, batch.targets[..., None], -1)[..., 0]
      losses_[stream] = (nll * batch.weights).sum() / batch.weights.sum()
    return losses_

  return run


@pytest.mark.parametrize(("method", "stream"), [("full", "full"), ("moba", "sparse")])
def test_the_loss_is_that_of_the_methods_own_stream(method, stream):
  state, batch = make_state(), make_batch()
  _, metrics = make_step(method)(state, batch)
  direct = direct_losses()(state.params, batch)
  assert abs(direct["full"] - direct["sparse"]) > 1e-3
  assert float(metrics["ce"]) == pytest.approx(float(direct[stream]), rel=1e-5)
  assert metrics["align"] == 0


@pytest.mark.parametrize("is_full", [True, False])
def test_the_coin_decides_the_stream(is_full):
  """SSA's cross-entropy is that of the stream on which the coin fell, not of the other."""
  options = make_parts("ssa")[0].options.ssa
  state = at(make_state(), step_with(is_full, options))
  batch = make_batch()
  _, metrics = make_step("ssa")(state, batch)
  direct = direct_losses()(state.params, batch)
  assert float(metrics["full_share"]) == is_full
  assert float(metrics["ce"]) == pytest.approx(
    float(direct["full" if is_full else "sparse"]), rel=1e-5
  )
  assert abs(direct["full"] - direct["sparse"]) > 1e-3
  assert metrics["align"] > 0


def test_the_coin_depends_on_the_key_and_the_step():
  step, state, batch = make_step("ssa"), make_state(), make_batch()
  options = make_parts("ssa")[0].options.ssa
  for seed in (5, 6):
    key, seen = jax.random.key(seed), []
    for number in range(6):
      _, metrics = step(at(state, number), batch, key)
      seen.append(bool(metrics["full_share"]))
    expected = [bool(ssa.toss(key, jnp.int32(n), 1, options)[0]) for n in range(6)]
    assert seen == expected
    assert len(set(seen)) == 2


def test_the_step_is_a_pure_function():
  step, state, batch = make_step("ssa"), make_state(), make_batch()
  before = jax.device_get(state)
  first, second = step(state, batch), step(state, batch)
  assert_same(first, second)
  assert_same(jax.device_get(state), before)
  assert int(first[0].step) == int(state.step) + 1


def test_parts_add_up_to_the_whole_batch():
  """However unevenly the tokens that count lie over the parts.

  SSA's loss has every term that there is.
  """
  state, batch = make_state(), make_batch()
  part_weights = batch.weights.reshape(-1, 4, LENGTH).sum((0, 2))
  assert part_weights.max() > 3 * part_weights.min()
  whole, whole_metrics = make_step("ssa")(state, batch)
  summed, summed_metrics = make_step("ssa", accumulate_steps=4)(state, batch)
  assert_close(summed_metrics, whole_metrics)
  # Adam's update is the sign of the gradient where that is tiny; its moments are not.
  for name in ("mu", "nu"):
    assert_close(
      optax.tree.get(summed.opt_state, name),
      optax.tree.get(whole.opt_state, name),
      rtol=2e-3,
      atol=1e-7,
    )
  assert_close(summed.params, whole.params, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
  ("sizes", "accumulate_steps"),
  [((8, 1, 1), 1), ((2, 2, 2), 2)],
)
def test_eight_devices_train_as_one_does(sizes, accumulate_steps):
  """Losses and gradient norms of three steps agree to a relative 1e-4 in float32.

  Of SSA, whose steps are those of both streams.
  """
  alone = make_state()
  spread = move("ssa", alone, make_mesh(*sizes))
  together = make_step("ssa", accumulate_steps, sizes)
  is_full = []
  rules = {"rtol": 1e-4, "atol": 1e-6}
  for number in range(3):
    batch = make_batch(seed=number)
    alone, one = make_step("ssa")(alone, batch)
    spread, eight = together(spread, batch)
    is_full.append(bool(one["full_share"]))
    for name in one:
      np.testing.assert_allclose(eight[name], one[name], err_msg=name, **rules)
  assert set(is_full) == {True, False}
  assert len(jax.tree.leaves(spread.params)[0].sharding.device_set) == 8


def test_a_state_is_born_the_same_wherever_it_lives():
  transformer, optimizer, _, _ = make_parts("ssa")
  born_alone = jax.tree.map(lambda x: np.asarray(x) / 4.0, make_state().params)
  mesh = make_mesh(2, 2, 2)
  born_apart = states.init_state(transformer, optimizer, mesh, 0)
  assert_same(born_alone, jax.device_get(born_apart.params))
  abstract = states.abstract_state(transformer, optimizer, mesh)
  for x, like in zip(jax.tree.leaves(born_apart), jax.tree.leaves(abstract), strict=True):
    assert (x.shape, x.dtype) == (like.shape, like.dtype)
    assert x.sharding.is_equivalent_to(like.sharding, x.ndim)
  kernel = born_apart.params["layers"]["mlp"]["up_proj"]["kernel"]
  assert kernel.addressable_shards[0].data.size == kernel.size // 4
  # Adam's moments lie where their parameters do.
  moment = optax.tree.get(born_apart.opt_state, "mu")
  assert moment["layers"]["mlp"]["up_proj"]["kernel"].sharding == kernel.sharding
  assert not jax.tree.leaves(moment)[0].any()


def test_the_seed_decides_the_parameters():
  transformer, optimizer, _, _ = make_parts("ssa")
  of_0 = model.unembedding(make_state().params) / 4.0
  of_1 = model.unembedding(states.init_state(transformer, optimizer, make_mesh(), 1).params)
  assert (of_0 != of_1).mean() > 0.99
  assert float(of_0.std()) == pytest.approx(float(of_1.std()), rel=0.05)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(value):
  step, state, batch = make_step("full"), make_state(), make_batch()
  after, metrics = step(state, poison(batch, value))
  assert not np.isfinite(metrics["loss"])
  assert_same(after.params, state.params)
  assert_same(after.opt_state, state.opt_state)
  assert int(after.step) == int(state.step) + 1
  assert (int(after.num_skipped), int(after.num_skipped_in_a_row)) == (1, 1)
  again, metrics = step(after, poison(batch, value))
  assert_same(again.params, state.params)
  assert (int(metrics["num_skipped"]), int(metrics["num_skipped_in_a_row"])) == (2, 2)


def test_the_next_good_step_is_as_if_there_had_been_no_bad_one():
  step, state, batch = make_step("full"), make_state(), make_batch()
  skipped, _ = step(state, poison(batch))
  recovered, metrics = step(skipped, batch)
  straight, expected = step(state, batch)
  assert_same(recovered.params, straight.params)
  assert_same(recovered.opt_state, straight.opt_state)
  assert_same(metrics["learning_rate"], expected["learning_rate"])
  assert (int(recovered.num_skipped), int(recovered.num_skipped_in_a_row)) == (1, 0)
  assert (int(straight.num_skipped), int(straight.num_skipped_in_a_row)) == (0, 0)
  with pytest.raises(AssertionError):
    assert_same(recovered.params, state.params)


class Bare:
  """A transformer of one table, whose alignment is what the test says it is."""

  shape = types.SimpleNamespace(num_hidden_layers=3)

  def __init__(self, align, pattern):
    self.options = types.SimpleNamespace(ssa=make_config("ssa").ssa, pattern=pattern)
    self._align = align

  def apply(self, variables, inputs, positions, segments, *, stream, use_full_L):
    del positions, segments
    assert stream == "train"
    assert use_full_L.shape == (3,)
    table = variables["params"]["embed_tokens"]["embedding"]
    return model.Output(table[inputs], self._align(table))


def run_bare(align, accumulate_steps=1, num_skipped=0, pattern=("ssa",), **weights):
  options = losses.Options(chunk_length=8, **weights)
  optimizer = optax.sgd(0.5, momentum=0.9)
  step = jax.jit(
    steps.make_train_step(
      Bare(align, pattern),
      optimizer,
      lambda n: n * 1.0,
      options,
      accumulate_steps=accumulate_steps,
    )
  )
  table = jnp.asarray(np.random.default_rng(0).normal(size=(320, 8)), jnp.float32)
  params = {"embed_tokens": {"embedding": table}}
  zero = jnp.int32(0)
  state = states.TrainState(
    jnp.int32(7), params, optimizer.init(params), zero + num_skipped, zero
  )
  batch = make_batch()
  return state, batch, *step(state, batch, KEY)


@pytest.mark.parametrize(
  ("accumulate_steps", "pattern", "align_L", "align"),
  [
    (1, ("ssa",), [1.0, 2.0, 6.0], 3.0),
    (4, ("ssa",), [1.0, 2.0, 6.0], 3.0),
    (1, ("ssa", "full", "ssa"), [1.0, 0.0, 6.0], 3.5),
    (1, ("moba",), [0.0, 0.0, 0.0], 0.0),
  ],
)
def test_the_loss_is_the_weighted_sum_of_its_terms(accumulate_steps, pattern, align_L, align):
  """Against numpy. The alignment counts once for the batch, not once for every part, and is the
  mean over the layers that have one."""
  state, batch, _, metrics = run_bare(
    lambda table: jnp.array(align_L),
    accumulate_steps,
    num_skipped=2,
    pattern=pattern,
    z_loss_weight=0.25,
    align_weight=10.0,
  )
  table = np.asarray(state.params["embed_tokens"]["embedding"], np.float64)
  logits = table[np.asarray(batch.inputs)] @ table.T
  log_normalizer = np.log(np.exp(logits).sum(-1))
  targets = np.asarray(batch.targets)
  nll = log_normalizer - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
  total = batch.weights.sum()
  expected = {
    "ce": (nll * batch.weights).sum() / total,
    "z_loss": (log_normalizer**2 * batch.weights).sum() / total,
    "align": align,
    "accuracy": ((logits.argmax(-1) == targets) * batch.weights).sum() / total,
    "num_tokens": total,
    "learning_rate": 5.0,
    "num_skipped": 2,
  }
  expected["loss"] = expected["ce"] + 0.25 * expected["z_loss"] + 10.0 * align
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_a_gradient_that_is_not_finite_is_enough_to_skip():
  """The loss is finite, but the square root's slope at 0 is not."""
  state, _, after, metrics = run_bare(
    lambda table: jnp.sqrt(jnp.abs(table[:3, 0]) * 0.0), z_loss_weight=0.0, align_weight=1.0
  )
  assert np.isfinite(metrics["loss"])
  assert not np.isfinite(metrics["grad_norm"])
  assert_same(after.params, state.params)
  assert_same(after.opt_state, state.opt_state)
  assert int(after.num_skipped) == 1


def test_a_batch_without_any_token_is_no_division_by_zero():
  step, state, batch = make_step("full"), make_state(), make_batch()
  _, metrics = step(state, batch._replace(weights=np.zeros_like(batch.weights)))
  assert metrics["num_tokens"] == 1
  assert metrics["ce"] == 0
  assert metrics["num_skipped"] == 0
