"""Token by token, a model with a cache computes what it computes with the whole row at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.decoding import cache as caches
from tests import small

LENGTH, SIZE = 43, 8
# Two rows that begin to decode before, at and behind the borders of blocks.
PROMPTS = np.array([15, 24])

METHODS = {
  "full": dict(attention__method="full"),
  "moba": dict(attention__method="moba"),
  "half_local": dict(
    attention__method="moba", attention__selection="half_local", attention__num_blocks=4
  ),
  "infllmv2": dict(attention__method="infllmv2"),
  "infllmv2_coarse": dict(
    attention__method="infllmv2",
    infllmv2__normalizer="coarse",
    infllmv2__first_window="released",
    infllmv2__num_windows=5,
  ),
  "ed_dma": dict(attention__method="ed_dma"),
  "nosa": dict(attention__method="nosa", nosa__num_query_aware=1, attention__num_blocks=4),
  "nsa": dict(attention__method="nsa"),
  "nsa_shared": dict(attention__method="nsa", nsa__kv="shared", nsa__compression="mean"),
  "sliding_window": dict(attention__method="sliding_window"),
  "ssa": dict(attention__method="ssa"),
  "ssa_nosa": dict(
    attention__method="ssa", attention__sparse_method="nosa", nosa__num_query_aware=1
  ),
  "in_turn": dict(
    attention__method="moba", attention__layer_methods=("sliding_window", "full")
  ),
}


@functools.cache
def model_of(name):
  transformer = caches.for_decoding(
    small.make_model(attention__block_size=SIZE, **METHODS[name])
  )
  params = small.make_params(transformer, scale=4.0)

  # Heads whose scores are all zero would hide mistakes.
  def shake(path, x):
    if "scale" in str(path[-1]) and "sparse" in str(path):
      return x + 0.5
    return x

  return transformer, jax.tree_util.tree_map_with_path(shake, params)


def tokens():
  return jax.random.randint(jax.random.key(5), (len(PROMPTS), LENGTH), 0, 256)


# Run full, methods differ by their biases and by NSA's other branches alone.
STREAMS = [(name, "sparse") for name in METHODS]
STREAMS += [(name, "full") for name in ("full", "ssa_nosa", "nsa", "in_turn")]


@pytest.mark.parametrize(("name", "stream"), STREAMS)
def test_token_by_token_is_all_at_once(name, stream):
  transformer, params = model_of(name)
  ids = tokens()
  room = caches.room(transformer, batch=len(PROMPTS), length=LENGTH)

  @jax.jit
  def whole(params, ids):
    positions = jnp.broadcast_to(jnp.arange(LENGTH), ids.shape)
    output = transformer.apply(
      {"params": params}, ids, positions, jnp.ones_like(ids), stream=stream
    )
    return caches.model.logits(params, output.hidden_BTE)

  expected = np.asarray(whole(params, ids))
  longest = int(PROMPTS.max())
  # Behind a row's prompt there may be anything.
  prompts = jnp.where(jnp.arange(longest)[None] < PROMPTS[:, None], ids[:, :longest], 7)
  run = functools.partial(caches.prefill, transformer, stream=stream, room=room)
  logits, cache = jax.jit(run)(params, prompts, jnp.asarray(PROMPTS))
  step = jax.jit(functools.partial(caches.step, transformer, stream=stream), donate_argnums=1)
  for taken in range(LENGTH - longest):
    at = PROMPTS + taken
    for row, position in enumerate(at):
      np.testing.assert_allclose(
        logits[row], expected[row, position - 1], rtol=2e-4, atol=2e-4, err_msg=str(position)
      )
    logits, cache = step(params, cache, ids[jnp.arange(len(at)), at])
  np.testing.assert_array_equal(cache.lengths_B, PROMPTS + LENGTH - longest)
