"""Models of every method, small enough to decode in tests, and what they give whole rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import model
from sparsejax.decoding import cache as caches
from tests import small

SIZE = 8

METHODS = {
  "full": dict(attention__method="full"),
  "moba": dict(attention__method="moba"),
  "half_local": dict(
    attention__method="moba", attention__selection="half_local", attention__num_blocks=4
  ),
  "infllmv2": dict(
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


# Run full, methods differ by their biases and by NSA's other branches alone.
STREAMS = [(name, "sparse") for name in METHODS]
STREAMS += [(name, "full") for name in ("full", "ssa_nosa", "nsa", "in_turn")]


def at_once(transformer, params, ids, stream):
  """Logits after every token of whole rows."""

  @jax.jit
  def run(params, ids):
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    output = transformer.apply(
      {"params": params}, ids, positions, jnp.ones_like(ids), stream=stream
    )
    return model.logits(params, output.hidden_BTE)

  return np.asarray(run(params, ids))
