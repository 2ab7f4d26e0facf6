"""NSA that takes half of its blocks near by, in rows shorter than those blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.decoding import cache as caches
from sparsejax.decoding import prefill
from tests import small
from tests.sparsejax.decoding.models import at_once

SIZE, M = 8, 4
# The first token that is decoded is before, and right behind, a border of blocks.
PROMPTS = np.array([2, 8])


@functools.cache
def make():
  transformer = caches.for_decoding(
    small.make_model(
      attention__method="nsa",
      attention__selection="half_local",
      attention__block_size=SIZE,
      attention__num_blocks=M,
      nsa__num_initial=0,
      nsa__num_local=1,
    )
  )
  return transformer, small.make_params(transformer, scale=4.0)


def tokens(length):
  return jax.random.randint(jax.random.key(5), (len(PROMPTS), length), 0, 256)


# Three blocks, fewer than M; all M of them; and more, of which halves are chosen.
@pytest.mark.parametrize("length", [20, M * SIZE, 44])
def test_token_by_token_is_all_at_once(length):
  transformer, params = make()
  ids = tokens(length)
  expected = at_once(transformer, params, ids, "sparse")
  room = caches.room(transformer, batch=len(PROMPTS), length=length)
  run = functools.partial(prefill.prefill, transformer, stream="sparse", room=room, chunk=SIZE)
  logits, cache = jax.jit(run)(params, ids[:, : PROMPTS.max()], jnp.asarray(PROMPTS))
  step = jax.jit(functools.partial(caches.step, transformer, stream="sparse"))
  for lengths in PROMPTS + np.arange(length - PROMPTS.max())[:, None]:
    for row, known in enumerate(lengths):
      np.testing.assert_allclose(
        logits[row], expected[row, known - 1], rtol=2e-4, atol=2e-4, err_msg=str(known)
      )
    logits, cache = step(params, cache, ids[jnp.arange(len(lengths)), lengths])


# One block, which has no halves; three; and M.
@pytest.mark.parametrize("length", [5, 20, M * SIZE])
def test_a_row_within_the_budget_is_read_whole(length):
  """As the full stream reads it, whose other branches are the same."""
  transformer, params = make()
  ids = tokens(length)
  streams = [at_once(transformer, params, ids, x) for x in ("train", "sparse", "full")]
  for logits in streams[:2]:
    np.testing.assert_allclose(logits, streams[2], rtol=2e-4, atol=2e-4)


def test_a_longer_row_is_not():
  transformer, params = make()
  ids = tokens(44)
  sparse, full = (at_once(transformer, params, ids, x) for x in ("sparse", "full"))
  assert np.abs(sparse - full).max() > 1e-2


def test_decoding_chooses_nothing_where_everything_is_read():
  """Its list of pages is that of the full stream, however blocks would score."""
  transformer, params = make()
  room = caches.room(transformer, batch=1, length=20)

  def step(stream):
    cache = caches.make(caches.spec(transformer, stream, room))
    run = functools.partial(caches.step, transformer, stream=stream)
    return str(jax.make_jaxpr(run)(params, cache, jnp.zeros(1, jnp.int32)))

  assert step("sparse") == step("full")
