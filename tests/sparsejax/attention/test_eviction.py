"""The eviction head: its formula, how it begins, and how it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import optimizer, parameters, sharding
from sparsejax.attention import eviction
from tests import small
from tests.sparsejax.attention import by_hand, lists

BIASED = ("dma", "ed_dma", "nosa")


@pytest.mark.parametrize("kind", eviction.KINDS)
def test_scores_follow_the_formula(kind):
  """The product is with the values of all key heads of a token, concatenated."""
  _, _, v, _ = lists.make_arrays()
  params = lists.make_head()["head"]
  scores = eviction.EvictionHead(kind).apply({"params": params}, v)
  expected = by_hand.head_scores(v[0], params["kernel"], params["scale"], kind)
  np.testing.assert_allclose(scores[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", eviction.KINDS)
def test_at_first_every_key_scores_the_same(kind):
  _, _, v, _ = lists.make_arrays(length=16)
  head = eviction.EvictionHead(kind)
  scores, variables = head.init_with_output(jax.random.key(0), v)
  np.testing.assert_array_equal(scores, 1.0 if kind == "dma" else 0.0)
  assert variables["params"]["kernel"].unbox().any()


def test_scores_are_float32_whatever_the_values():
  _, _, v, _ = lists.make_arrays()
  params = lists.make_head()["head"]
  scores = eviction.EvictionHead("ed_dma").apply({"params": params}, v.astype(jnp.bfloat16))
  assert scores.dtype == jnp.float32
  assert (scores != scores.astype(jnp.bfloat16)).mean() > 0.9


@pytest.mark.parametrize("stream", ["full", "sparse"])
@pytest.mark.parametrize("name", BIASED)
def test_step_0_is_attention_without_a_bias(name, stream):
  """With A at 0, and its gradient not: the head can leave where it begins."""
  q, k, v, _ = arrays = lists.make_arrays(length=112)
  module = lists.make(name)
  zero = jax.tree.map(lambda x: x, lists.make_head())
  zero["head"]["scale"] *= 0.0
  out, blocks = lists.run(module, arrays, stream, zero)
  listed = by_hand.everything(112, lists.K, lists.BLOCK)
  if stream == "sparse":
    listed = lists.as_sets(blocks[0])
  np.testing.assert_allclose(
    out[0], by_hand.attention(q[0], k[0], v[0], listed, lists.BLOCK), atol=1e-5
  )

  def total(params):
    return (module.apply({"params": params}, *arrays, stream).out_BTHD ** 2).sum()

  gradient = jax.jit(jax.grad(total))(zero)["head"]
  assert (gradient["scale"] != 0.0).all()
  assert not gradient["kernel"].any()


@pytest.mark.parametrize("name", BIASED)
def test_the_head_learns_through_the_bias_alone(name):
  """Its gradient is what it is when lists are given, by the definition of attention."""
  arrays = lists.make_arrays(length=112)
  module, params = lists.make(name), lists.make_head()
  _, blocks = lists.run(module, arrays, "sparse", params)
  q, k, v = (x[0] for x in arrays[:3])
  listed = jnp.asarray((np.asarray(blocks)[0, ..., None] == np.arange(7)).any(2))
  listed = jnp.repeat(listed, lists.BLOCK, axis=-1)
  seen = listed & jnp.tri(112, dtype=bool)[:, None]
  kind = "dma" if name == "dma" else "ed_dma"

  def total(params):
    return (module.apply({"params": params}, *arrays, "sparse").out_BTHD ** 2).sum()

  def by_definition(params):
    head = params["head"]
    x = jnp.einsum("tkd,kdj->tj", v, head["kernel"])
    bias = head["scale"][None] * jax.nn.softplus(x)
    bias = jnp.exp(bias) if kind == "dma" else bias
    scores = jnp.einsum("tkgd,skd->tkgs", q.reshape(112, 2, 2, 8), k) * 8**-0.5
    scores = scores + bias.T[None, :, None]
    weights = jax.nn.softmax(jnp.where(seen[:, :, None], scores, -jnp.inf))
    return (jnp.einsum("tkgs,skd->tkgd", weights, v) ** 2).sum()

  actual, expected = (jax.jit(jax.grad(f))(params)["head"] for f in (total, by_definition))
  for key in ("kernel", "scale"):
    size = float(jnp.abs(expected[key]).max())
    assert size > 1e-2
    np.testing.assert_allclose(actual[key], expected[key], atol=1e-3 * size)


def test_weight_decay_leaves_the_scale_alone():
  params = small.make_params(small.make_model(attention__method="nosa"))
  head = optimizer.decayed(params)["layers"]["self_attn"]["sparse"]["head"]
  assert head == dict(kernel=True, scale=False)


def test_the_head_is_divided_with_the_key_heads():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  params = parameters.abstract(small.make_model(attention__method="nosa"), mesh)
  head = params["layers"]["self_attn"]["sparse"]["head"]
  specs = {name: tuple(x.sharding.spec) for name, x in head.items()}
  assert specs == dict(kernel=(None, "tensor", None, None), scale=(None, "tensor"))


@pytest.mark.parametrize("method", ["full", "ssa"])
def test_a_head_is_there_whatever_training_runs(method):
  """So that a dense model can be run sparse, and go on as a sparse one."""
  own = small.make_params(small.make_model(attention__method="nosa"))
  other = small.make_model(attention__method=method, attention__sparse_method="nosa")
  assert jax.tree.all(jax.tree.map(jnp.array_equal, small.make_params(other), own))
