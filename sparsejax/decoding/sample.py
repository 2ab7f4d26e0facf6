"""Continues text by running the model over the whole window for every token.

The plain way, without a cache: right for every method, and meant for a glance at what a
model writes.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import model, sharding
from sparsejax.attention import method


def sample(
  transformer: model.Transformer,
  params: dict,
  prompt: Sequence[int],
  *,
  num_tokens: int,
  window: int,
  mesh: jax.sharding.Mesh,
  stream: method.Stream,
  temperature: float = 0.8,
  num_ids: int | None = None,
  seed: int = 0,
) -> list[int]:
  """Returns the ids that follow a prompt.

  Args:
    transformer, params: the model.
    prompt: at least one id; only the last `window - 1` are read.
    num_tokens: how many to draw.
    window: tokens the model sees at a time; older ones are forgotten.
    mesh: where the parameters are.
    stream: `full` or `sparse`.
    temperature: divides the logits; 0 takes the most likely id.
    num_ids: ids that may be drawn; None is the whole vocabulary. Tables are often padded
      beyond the tokenizer's last id.
    seed: of the draws.
  """
  prompt = list(prompt)[-(window - 1) :]
  ids_1T = np.zeros((1, window), np.int32)
  ids_1T[0, : len(prompt)] = prompt
  num_ids = num_ids or transformer.shape.vocab_size
  # Rows are what devices divide among themselves; each gets this one.
  shape_BT = (mesh.size, window)
  positions_BT = jnp.broadcast_to(jnp.arange(window), shape_BT)

  @jax.jit
  def run(params, ids_1T, length, rng):
    def draw(carry, rng):
      ids_1T, length = carry
      ids_BT = jnp.broadcast_to(ids_1T, shape_BT)
      output = transformer.apply(
        {"params": params}, ids_BT, positions_BT, jnp.ones_like(ids_BT), stream=stream
      )
      last_B1E = jax.lax.dynamic_slice_in_dim(output.hidden_BTE, length - 1, 1, axis=1)
      logits_V = model.logits(params, last_B1E)[0, 0, :num_ids]
      if temperature:
        token = jax.random.categorical(rng, logits_V / temperature)
      else:
        token = logits_V.argmax()
      # A full window forgets its first token.
      is_full = length == window
      ids_1T = jnp.where(is_full, jnp.roll(ids_1T, -1, axis=1), ids_1T)
      length = jnp.where(is_full, length, length + 1)
      ids_1T = jax.lax.dynamic_update_slice(
        ids_1T, token.astype(jnp.int32)[None, None], (0, length - 1)
      )
      return (ids_1T, length), token

    _, tokens = jax.lax.scan(draw, (ids_1T, length), jax.random.split(rng, num_tokens))
    return tokens

  with sharding.use(mesh):
    arguments = jax.device_put(
      (ids_1T, np.int32(len(prompt)), jax.random.key(seed)), sharding.replicated(mesh)
    )
    return jax.device_get(run(params, *arguments)).tolist()
