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


def test_nothing_in_a_decoding_model_is_for_training():
  transformer = small.make_model(max_documents=4, model__remat="full")
  decoding = caches.for_decoding(transformer)
  assert (decoding.shape.remat, decoding.options.max_documents) == ("none", 1)
  changed = dict(remat="none"), dict(max_documents=1)
  for name, changes in zip(("shape", "options"), changed, strict=True):
    assert getattr(decoding, name) == dataclasses.replace(getattr(transformer, name), **changes)


def test_scales_are_not_rounded():
  """Those of norms and of eviction heads, which multiply in float32; matrices are."""
  _, params = model_of("nosa")
  cast = caches.cast("bfloat16", params)
  scales = set()
  leaves = map(jax.tree.leaves_with_path, (params, cast))
  for (path, before), (_, after) in zip(*leaves, strict=True):
    if path[-1].key == "scale":
      scales.add(path[-2].key)
      assert after.dtype == "float32", path
      np.testing.assert_array_equal(after, before)
    else:
      assert after.dtype == "bfloat16", path
  assert scales > {"norm", "head"}


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


def test_pages_that_begin_are_fetched_from_nowhere():
  """With slots for all pages, those that prompts began are fetched, each once; no other is."""
  transformer, params = model_of("sliding_window")
  num_pages = -(-LENGTH // SIZE)
  room = caches.room(transformer, batch=len(PROMPTS), length=LENGTH, num_slots=num_pages)
  spec = caches.spec(transformer, "sparse", room)
  cache = caches.make(spec).replace(lengths_B=jnp.asarray(PROMPTS, jnp.int32))
  step = jax.jit(functools.partial(caches.step, transformer, stream="sparse"))
  for _ in range(LENGTH - PROMPTS.max()):
    _, cache = step(params, cache, jnp.zeros(len(PROMPTS), jnp.int32))
  # A window of 12 lies in three pages of 8 at most, that of the token among them.
  begun_B, first_B = -(-PROMPTS // SIZE), np.maximum(PROMPTS // SIZE - 2, 0)
  misses_LBK = np.asarray(cache.arrays[0]["slots/misses"])
  expected_LBK = np.broadcast_to((begun_B - first_B)[None, :, None], misses_LBK.shape)
  np.testing.assert_array_equal(misses_LBK, expected_LBK)


def test_slots_go_by_when_pages_were_wanted_though_a_step_has_two_lists():
  """What the second list of a step wanted is older than what the first of the next wants."""
  transformer = caches.for_decoding(small.make_model(attention__method="full"))
  room = caches.room(transformer, batch=1, length=64, num_slots=3)
  cache = caches.make(caches.spec(transformer, "full", room))
  # All tokens are in the last of eight pages.
  cache = cache.replace(lengths_B=jnp.array([60]))
  heads, size = room.num_kv_heads, room.head_dim

  @jax.jit
  def take(cache, lists):
    (past,) = cache.pasts()
    token = jnp.ones((1, heads, size))
    past = past.replace(arrays=cache.arrays[0]).add(keys=token, values=token)
    for pages_M in lists:
      pages_BKM = jnp.broadcast_to(pages_M, (1, heads, len(pages_M)))
      _, past = past.read(jnp.ones((1, heads, size)), pages_BKM)
    return cache.after((past.arrays,))

  cache = take(cache, jnp.array([[7, 0], [7, 1]]))
  cache = take(cache, jnp.array([[7, 0], [7, 2]]))
  np.testing.assert_array_equal(cache.arrays[0]["slots/page"][0, 0, 0], [7, 0, 2])
