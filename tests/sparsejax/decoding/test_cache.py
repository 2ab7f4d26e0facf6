"""Token by token, a model with a cache computes what it computes with the whole row at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import attention
from sparsejax.attention import pages, past
from sparsejax.decoding import cache as caches
from sparsejax.decoding import prefill
from tests import small
from tests.sparsejax.decoding.models import SIZE, STREAMS, at_once, model_of

LENGTH = 43
# Two rows that begin to decode before, at and behind the borders of blocks.
PROMPTS = np.array([15, 24])


def tokens():
  return jax.random.randint(jax.random.key(5), (len(PROMPTS), LENGTH), 0, 256)


def token_by_token(transformer, params, ids, stream):
  """Numbers of tokens that rows have, and logits after the last of them: prompts, then more."""
  room = caches.room(transformer, batch=len(PROMPTS), length=LENGTH)
  longest = int(PROMPTS.max())
  # Behind a row's prompt there may be anything.
  prompts = jnp.where(jnp.arange(longest)[None] < PROMPTS[:, None], ids[:, :longest], 7)
  run = functools.partial(prefill.prefill, transformer, stream=stream, room=room)
  logits, cache = jax.jit(run)(params, prompts, jnp.asarray(PROMPTS))
  step = jax.jit(functools.partial(caches.step, transformer, stream=stream), donate_argnums=1)
  for lengths in PROMPTS + np.arange(LENGTH - longest)[:, None]:
    np.testing.assert_array_equal(cache.lengths_B, lengths)
    yield lengths, logits
    logits, cache = step(params, cache, ids[jnp.arange(len(lengths)), lengths])


@pytest.mark.parametrize(("name", "stream"), STREAMS)
def test_token_by_token_is_all_at_once(name, stream):
  transformer, params = model_of(name)
  ids = tokens()
  expected = at_once(transformer, params, ids, stream)
  for lengths, logits in token_by_token(transformer, params, ids, stream):
    for row, length in enumerate(lengths):
      np.testing.assert_allclose(
        logits[row], expected[row, length - 1], rtol=2e-4, atol=2e-4, err_msg=str(length)
      )


@pytest.mark.parametrize(
  ("name", "stream"), [("infllmv2", "sparse"), ("nsa", "sparse"), ("ssa_nosa", "full")]
)
def test_in_bfloat16_token_by_token_is_as_near_as_all_at_once(name, stream):
  """To float32, by the mean over all logits: single blocks may be chosen another way."""
  transformer, params = model_of(name)
  ids = tokens()
  exact = at_once(transformer, params, ids, stream)
  rounded = transformer.clone(shape=dataclasses.replace(transformer.shape, dtype="bfloat16"))
  whole = at_once(rounded, params, ids, stream)
  cast = caches.cast("bfloat16", params)
  errors = []
  for lengths, logits in token_by_token(rounded, cast, ids, stream):
    for row, length in enumerate(lengths):
      reference = exact[row, length - 1]
      errors.append(
        [rms(x - reference) for x in (np.asarray(logits[row]), whole[row, length - 1])]
      )
  ours, theirs = np.mean(errors, axis=0)
  assert 0 < ours <= 2 * theirs


def rms(x):
  return np.sqrt(np.mean(np.square(x)))


def test_rows_that_are_still_short_are_read_whole():
  """With one layer, whose keys do not depend on what was read before."""
  dense, ids = 30, tokens()
  changes = dict(attention__method="infllmv2", attention__block_size=SIZE)
  long, short = (
    caches.for_decoding(
      small.make_model(**changes, model__num_hidden_layers=1, infllmv2__dense_length=length)
    )
    for length in (0, dense)
  )
  params = small.make_params(long, scale=4.0)
  expected = {stream: at_once(long, params, ids, stream) for stream in ("full", "sparse")}
  assert not np.allclose(expected["full"][:, dense:], expected["sparse"][:, dense:], atol=1e-2)
  read = set()
  for lengths, logits in token_by_token(short, params, ids, "sparse"):
    for row, length in enumerate(lengths):
      stream = "full" if length < dense else "sparse"
      read.add((row, stream))
      np.testing.assert_allclose(
        logits[row], expected[stream][row, length - 1], rtol=2e-4, atol=2e-4
      )
  assert len(read) == 4  # each row when it is short, and when it is long


# Bits are promised of optimised programs, as there are everywhere but in tests.
OPTIMISED = {"xla_backend_optimization_level": 3}


@pytest.mark.parametrize("name", ["nosa", "nsa_shared", "in_turn"])
def test_pages_on_the_host_give_the_same_bits(name):
  """With no more slots than a token reads; the last pages of prompts are full and not."""
  transformer, params = model_of(name)
  ids, num_rows = tokens(), len(PROMPTS)
  options = transformer.options
  if name == "in_turn":
    # Full layers read everything, and leave nothing to fetch.
    transformer = transformer.clone(
      options=dataclasses.replace(options, layer_methods=("sliding_window", "moba"))
    )
  num_slots = attention.most_pages(transformer.options, "sparse", LENGTH)
  assert num_slots < -(-LENGTH // SIZE)
  room = caches.room(transformer, batch=num_rows, length=LENGTH, num_slots=num_slots)
  one = dataclasses.replace(room, batch=1)
  longest = int(PROMPTS.max())
  run = jax.jit(functools.partial(prefill.prefill, transformer, stream="sparse", room=one))

  def begin(room):
    cache = caches.make(caches.spec(transformer, "sparse", room))
    for row, length in enumerate(PROMPTS):
      _, filled = run(params, ids[row : row + 1, :longest], jnp.array([length]))
      cache = jax.jit(past.Cache.with_row)(cache, row, filled)
    return cache

  step = functools.partial(caches.step, transformer, stream="sparse")
  found = []
  for own_room in (room, dataclasses.replace(room, num_slots=None)):
    cache, logits = begin(own_room), []
    take = jax.jit(step, donate_argnums=1, compiler_options=OPTIMISED)
    for taken in range(LENGTH - longest):
      at = PROMPTS + taken
      step_logits, cache = take(params, cache, ids[jnp.arange(num_rows), at])
      logits.append(step_logits)
    found.append((np.stack(logits), cache))
  (ours, offloaded), (expected, resident) = found
  np.testing.assert_array_equal(ours, expected)
  for place, arrays in enumerate(offloaded.arrays):
    assert arrays["k"].sharding.memory_kind == pages.HOST
    # Pages that are full have come back to the host; the last ones are in slots alone.
    k = np.asarray(arrays["k"]).reshape(-1, num_rows, 2, room.num_pages, SIZE, 8)
    wanted = np.asarray(resident.arrays[place]["k"]).reshape(k.shape)
    for row, length in enumerate(PROMPTS + LENGTH - longest):
      whole = length // SIZE
      np.testing.assert_array_equal(k[:, row, :, :whole], wanted[:, row, :, :whole])
    assert (arrays["slots/misses"] > 0).all()
    assert (arrays["slots/hits"] > arrays["slots/misses"]).all()
