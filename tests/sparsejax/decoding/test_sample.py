"""Sampled text is what the model's own logits say, token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import model, parameters, sharding
from sparsejax.decoding import sample
from tests import small

WINDOW = 16
PROMPT = (5, 9, 300)


@functools.cache
def make_parts():
  """A model so sharp that streams differ; its larger ids are the likelier ones."""
  transformer = small.make_model(attention__num_blocks=1)
  params = small.make_params(transformer, scale=6.0)
  table = params["embed_tokens"]["embedding"]
  return transformer, params | {"embed_tokens": {"embedding": table}}


@functools.cache
def make_mesh(*sizes):
  devices = jax.devices()[: int(np.prod(sizes))]
  auto = (jax.sharding.AxisType.Auto,) * 3
  return jax.make_mesh(sizes, sharding.AXES, axis_types=auto, devices=devices)


def run(mesh_sizes=(1, 1, 1), prompt=PROMPT, **changes):
  transformer, params = make_parts()
  mesh = make_mesh(*mesh_sizes)
  abstract = parameters.abstract(transformer, mesh)
  params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, abstract)
  options = dict(num_tokens=20, window=WINDOW, stream="full") | changes
  return sample.sample(transformer, params, prompt, mesh=mesh, **options)


@functools.cache
def next_logits(stream):
  """`(params, ids, length) -> logits of the id that comes next`."""
  transformer, _ = make_parts()

  @jax.jit
  def logits(params, ids_T, length):
    ids_1T = ids_T[None]
    output = transformer.apply(
      {"params": params},
      ids_1T,
      jnp.arange(WINDOW)[None],
      jnp.ones_like(ids_1T),
      stream=stream,
    )
    return model.logits(params, output.hidden_BTE)[0, length - 1]

  return logits


def expected(stream, choose, prompt=PROMPT, num_tokens=20, num_ids=320):
  """The same by hand: the last `WINDOW` ids are all that is seen of the text."""
  _, params = make_parts()
  text = list(prompt)[-(WINDOW - 1) :]
  start = len(text)
  for number in range(num_tokens):
    seen = text[-WINDOW:]
    ids_T = jnp.asarray(seen + [0] * (WINDOW - len(seen)), jnp.int32)
    logits_V = next_logits(stream)(params, ids_T, len(seen))[:num_ids]
    text.append(int(choose(number, logits_V)))
  return text[start:]


def greedy(number, logits_V):
  del number
  return logits_V.argmax()


@pytest.mark.parametrize("stream", ["full", "sparse"])
def test_at_temperature_0_it_is_the_most_likely_id(stream):
  """Twenty tokens through a window of sixteen: the window moves on."""
  by_hand = expected(stream, greedy)
  assert run(stream=stream, temperature=0.0) == by_hand
  other = "sparse" if stream == "full" else "full"
  assert by_hand != expected(other, greedy)


def test_draws_are_of_the_tempered_logits():
  keys = jax.random.split(jax.random.key(3), 20)

  def draw(number, logits_V):
    return jax.random.categorical(keys[number], logits_V / 1.5)

  drawn = run(temperature=1.5, seed=3, num_ids=64)
  assert drawn == expected("full", draw, num_ids=64)
  # The likeliest ids of all lie outside of those allowed.
  assert max(drawn) < 64 <= max(expected("full", draw))
  assert drawn != expected("full", greedy, num_ids=64)


def test_the_seed_decides_the_text():
  first, again, other = (run(temperature=1.5, seed=seed) for seed in (1, 1, 2))
  assert first == again
  assert first != other


def test_only_the_end_of_a_long_prompt_is_read():
  """One place of the window stays free for what is drawn."""
  rng = np.random.default_rng(0)
  prompts = [rng.integers(320, size=40).tolist() for _ in range(3)]
  by_hand = [expected("full", greedy, prompt=p, num_tokens=1) for p in prompts]
  for prompt, first in zip(prompts, by_hand, strict=True):
    assert run(prompt=prompt, temperature=0.0, num_tokens=1) == first
  # A window without a free place would have read one id more, and says otherwise.
  _, params = make_parts()
  fuller = [
    int(next_logits("full")(params, jnp.asarray(p[-WINDOW:], jnp.int32), WINDOW).argmax())
    for p in prompts
  ]
  assert [[token] for token in fuller] != by_hand


def test_many_devices_write_what_one_writes():
  """A single row, though rows are what devices divide among themselves."""
  assert run(mesh_sizes=(2, 2, 2), temperature=0.0) == expected("full", greedy)
