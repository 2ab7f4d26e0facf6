"""What is compiled to decode: a prompt is read into a row, and every row takes a token.

Letters: B rows, T tokens, V vocabulary.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp

from sparsejax import model
from sparsejax.attention import method, pages, past
from sparsejax.decoding import cache as caches
from sparsejax.decoding import prefill


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Programs:
  """Functions to jit. None of them holds parameters or a cache: these go when their owner does.

  Attributes:
    transformer: as `cache.for_decoding` returns it.
    stream: of the cache, `full` or `sparse`.
    prefill_stream: by which prompts are read.
    room: of the cache.
    chunk: tokens of a prompt that are read at a time.
    num_devices: that divide rows among themselves.
    key: of all draws.
    draw: `(logits_BV, keys_B) -> ids_B`.
  """

  transformer: model.Transformer
  stream: method.Stream
  prefill_stream: method.Stream
  room: pages.Room
  chunk: int
  num_devices: int
  key: jax.Array
  draw: Callable[[jax.Array, jax.Array], jax.Array]

  def begin(self, params, cache: past.Cache, row, ids_1T, length, number):
    """Reads a prompt of so many ids into a row: the id drawn after it, and the cache."""
    # What devices divide among themselves is whole rows for each.
    ids_BT = jnp.repeat(ids_1T, self.num_devices, axis=0)
    logits_BV, filled = prefill.prefill(
      self.transformer,
      params,
      ids_BT,
      jnp.full(len(ids_BT), length),
      stream=self.stream,
      room=dataclasses.replace(self.room, batch=len(ids_BT)),
      chunk=self.chunk,
      prefill_stream=self.prefill_stream,
    )
    (token,) = self._draw(logits_BV[:1], number[None], jnp.zeros(1, jnp.int32))
    return token, cache.with_row(row, filled)

  def step(self, params, cache: past.Cache, ids_B, numbers_B, places_B):
    """Takes an id of every row: those drawn after them, and the cache."""
    logits_BV, cache = caches.step(self.transformer, params, cache, ids_B, stream=self.stream)
    return self._draw(logits_BV, numbers_B, places_B), cache

  def _draw(self, logits_BV, numbers_B, places_B):
    """By a key for each prompt and place in its text."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    keys_B = jax.vmap(jax.random.fold_in)(fold(self.key, numbers_B), places_B)
    return self.draw(logits_BV, keys_B)
