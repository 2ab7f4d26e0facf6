"""Rows that are used again: token by token what a forward pass says of each sequence alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import attention
from sparsejax.attention import past
from sparsejax.decoding import cache as caches
from sparsejax.decoding import prefill
from tests.sparsejax.decoding.models import SIZE, at_once, model_of

ROOM, ROWS = 40, 2
# Shorter than any memory of last tokens, beyond a chunk, and nearly as long as a row.
PROMPTS = 1, 33, 15, 2, 39, 9
# Tokens that a row is given: fewer than there is room for, or more, while others go on.
GIVEN = 9, 14, 20, 40, 3, 12


@pytest.mark.parametrize("name", ["nosa", "infllmv2", "nsa"])
def test_a_sequence_knows_nothing_of_the_one_before_it_in_its_row(name):
  transformer, params = model_of(name)
  room = caches.room(transformer, batch=ROWS, length=ROOM)
  alone = dataclasses.replace(room, batch=1)
  read = jax.jit(
    functools.partial(prefill.prefill, transformer, stream="sparse", room=alone, chunk=SIZE)
  )
  step = jax.jit(functools.partial(caches.step, transformer, stream="sparse"))
  put = jax.jit(past.Cache.with_row)
  ids = np.random.default_rng(0).integers(0, 256, (len(PROMPTS), ROOM)).astype(np.int32)
  expected = at_once(transformer, params, jnp.asarray(ids), "sparse")
  cache = caches.make(caches.spec(transformer, "sparse", room))
  waiting, rows, num_compared = list(range(len(PROMPTS))), {}, 0
  while waiting or rows:
    for row in range(ROWS):
      if row not in rows and waiting:
        number = waiting.pop(0)
        length = PROMPTS[number]
        padded = np.where(np.arange(ROOM) < length, ids[number], 7)[None]
        logits, filled = read(params, padded, jnp.array([length]))
        close = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-3)
        close(logits[0], expected[number, length - 1])
        cache = put(cache, row, filled)
        rows[row] = number, length
    tokens = [
      ids[number, min(length, ROOM - 1)]
      for number, length in (rows.get(row, (0, 0)) for row in range(ROWS))
    ]
    logits, cache = step(params, cache, jnp.array(tokens))
    for row, (number, length) in list(rows.items()):
      if length < ROOM:
        close(logits[row], expected[number, length], err_msg=f"{number} at {length}")
        num_compared += 1
      rows[row] = number, length + 1
      if length + 1 == PROMPTS[number] + GIVEN[number]:
        del rows[row]
  assert num_compared == sum(
    min(given, ROOM - prompt) for prompt, given in zip(PROMPTS, GIVEN, strict=True)
  )


@pytest.mark.parametrize("where", ["device", "host"])
def test_a_row_that_is_full_leaves_the_others_alone(where):
  """The last row ends in the last page of all, to which a row before it could count back."""
  transformer, params = model_of("nosa")
  most = attention.most_pages(transformer.options, "sparse", ROOM)
  num_slots = None if where == "device" else most
  room = caches.room(transformer, batch=ROWS, length=ROOM, num_slots=num_slots)
  alone = dataclasses.replace(room, batch=1)
  ids = np.random.default_rng(0).integers(0, 256, (ROWS, ROOM)).astype(np.int32)
  expected = at_once(transformer, params, jnp.asarray(ids), "sparse")[-1]
  cache = caches.make(caches.spec(transformer, "sparse", room))
  read = jax.jit(functools.partial(prefill.prefill, transformer, stream="sparse", room=alone))
  lengths = ROOM, ROOM - SIZE + 3
  for row, length in enumerate(lengths):
    _, filled = read(params, ids[row : row + 1], jnp.array([length]))
    cache = jax.jit(past.Cache.with_row)(cache, row, filled)
  step = jax.jit(functools.partial(caches.step, transformer, stream="sparse"))
  for length in range(lengths[-1], ROOM):
    logits, cache = step(params, cache, jnp.array([0, ids[-1, length]]))
    np.testing.assert_allclose(logits[-1], expected[length], rtol=2e-3, atol=2e-3)
