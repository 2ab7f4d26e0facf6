"""Prompts that are read by full attention and continued sparse."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import errors, sharding
from sparsejax.attention import layer
from sparsejax.decoding import cache as caches
from sparsejax.decoding import generate as generation
from sparsejax.decoding import prefill
from sparsejax.decoding import sampling as samplings
from tests.sparsejax.decoding.models import METHODS, SIZE, at_once, model_of

# At, before and behind the borders of chunks, blocks and windows; most are longer than budgets.
LENGTHS = np.array([1, 15, 40, 41, 24, 50, 33, 63])
NUM_STEPS = 9
LENGTH = 72


def tokens():
  return jax.random.randint(jax.random.key(5), (len(LENGTHS), LENGTH), 0, 256)


def with_sparse(sparse_method):
  """Full attention that runs sparse by some method."""
  transformer, params = model_of("nsa" if sparse_method == "nsa" else "nosa")
  options = transformer.options
  options = dataclasses.replace(options, method="full", sparse_method=sparse_method)
  return transformer.clone(options=options), params


def in_two(transformer, params, ids, monkeypatch):
  """Logits of whole rows whose layers give prompts the full stream, and the rest the sparse.

  That is what decoding is to give: later tokens change nothing of what a prompt has.
  """
  is_prompt = np.arange(ids.shape[1])[None] < LENGTHS[:, None]
  make = layer.make_method

  def make_both(*args):
    method = make(*args)

    def attend(q, k, v, tokens, stream, past):
      assert (stream, past) == ("sparse", None)
      full, sparse = (method(q, k, v, tokens, x) for x in ("full", "sparse"))
      out = jnp.where(is_prompt[..., None, None], full.out_BTHD, sparse.out_BTHD)
      return sparse._replace(out_BTHD=out)

    return attend

  with monkeypatch.context() as patch:
    patch.setattr(layer, "make_method", make_both)
    return at_once(transformer, params, ids, "sparse")


def decode(transformer, params, ids, chunk):
  """Logits after every prompt, and after each of the steps behind it, [B, S, V]."""
  room = caches.room(transformer, batch=len(ids), length=LENGTH)
  read = functools.partial(
    prefill.prefill, transformer, stream="sparse", room=room, chunk=chunk, prefill_stream="full"
  )
  step = jax.jit(functools.partial(caches.step, transformer, stream="sparse"))
  logits, cache = jax.jit(read)(params, ids, jnp.asarray(LENGTHS))
  found = [logits]
  for number in range(NUM_STEPS):
    ids_B = ids[np.arange(len(ids)), LENGTHS + number]
    logits, cache = step(params, cache, ids_B)
    found.append(logits)
  return np.stack(found, axis=1)


# Those that read and remember prompts in ways of their own.
CASES = {name: functools.partial(model_of, name) for name in METHODS if name != "half_local"}
CASES |= {f"full_{name}": functools.partial(with_sparse, name) for name in ("nosa", "dma")}


@pytest.mark.parametrize("name", CASES)
def test_prompts_are_read_full_and_continued_sparse(name, monkeypatch):
  transformer, params = CASES[name]()
  ids = tokens()
  wanted_BT = LENGTHS[:, None] - 1 + np.arange(NUM_STEPS + 1)
  rows = np.arange(len(LENGTHS))[:, None]
  expected, sparse, full = (
    logits[rows, wanted_BT]
    for logits in (
      in_two(transformer, params, ids, monkeypatch),
      at_once(transformer, params, ids, "sparse"),
      at_once(transformer, params, ids, "full"),
    )
  )
  # What follows is of both streams: it would be seen if either had read or continued alone.
  for other in (sparse, full):
    assert (np.abs(expected - other)[:, 1:].max((1, 2)) > 1e-2).sum() >= 4
  np.testing.assert_allclose(expected[:, 0], full[:, 0], rtol=2e-4, atol=2e-4)
  found = decode(transformer, params, ids, SIZE)
  np.testing.assert_allclose(found, expected, rtol=5e-4, atol=5e-4)


def test_short_rows_are_continued_whole_whatever_read_them():
  """Of `infllmv2.dense_length`: it is no prompt's length that counts, but a row's."""
  transformer, params = model_of("infllmv2")
  options = transformer.options
  infllmv2 = dataclasses.replace(options.infllmv2, dense_length=36)
  dense = transformer.clone(options=dataclasses.replace(options, infllmv2=infllmv2))
  ids = tokens()
  found = decode(dense, params, ids, 3 * SIZE)
  sparse = decode(transformer, params, ids, 3 * SIZE)
  full = at_once(transformer, params, ids, "full")
  for row, length in enumerate(LENGTHS):
    for number in range(NUM_STEPS + 1):
      if length + number < 36:
        expected = full[row, length - 1 + number]
        np.testing.assert_allclose(found[row, number], expected, rtol=5e-4, atol=5e-4)
    if length >= 36:
      np.testing.assert_allclose(found[row], sparse[row], rtol=5e-4, atol=5e-4)


def generate(prompts, transformer, params, mesh, **options):
  return generation.generate(
    transformer,
    jax.device_put(params, sharding.replicated(mesh)),
    prompts,
    max_new_tokens=6,
    sampling=samplings.Sampling(temperature=0),
    mesh=mesh,
    **options,
  )


def test_texts_follow_prompts_read_full(monkeypatch):
  transformer, params = model_of("nosa")
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  ids = np.asarray(tokens())
  prompts = [row[:length].tolist() for row, length in zip(ids, LENGTHS, strict=True)]
  texts = generate(prompts, transformer, params, mesh, stream="sparse", prefill_stream="full")
  whole = ids.copy()
  for row, (length, text) in enumerate(zip(LENGTHS, texts, strict=True)):
    whole[row, length : length + 6] = text
  expected = in_two(transformer, params, whole, monkeypatch).argmax(-1)
  for row, (length, text) in enumerate(zip(LENGTHS, texts, strict=True)):
    assert text == expected[row, length - 1 : length + 5].tolist()
  both = generate(prompts, transformer, params, mesh, stream="sparse")
  assert texts != both
  assert both == generate(
    prompts, transformer, params, mesh, stream="sparse", prefill_stream="sparse"
  )


def test_backends_are_those_of_the_stream_that_reads():
  transformer, params = model_of("nosa")
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  found = {}
  for stream in ("full", "sparse"):
    choices = []
    options = dict(stream="sparse", prefill_stream=stream, on_choice=choices.append)
    generate([[1] * 40], transformer, params, mesh, length=LENGTH, **options)
    found[stream] = {choice.op for choice in choices}
  assert found["full"] - found["sparse"] == {"chunk_attention"}
  assert found["sparse"] - found["full"] == {"block_selection", "block_sparse_attention"}


def test_streams_that_do_not_go_together_are_refused():
  transformer, params = model_of("nosa")
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  with pytest.raises(
    errors.ConfigError,
    match="prompts that are read sparse are continued sparse, not full; read them full to",
  ):
    generate([[1]], transformer, params, mesh, stream="full", prefill_stream="sparse")
  transformer, params = with_sparse("nsa")
  with pytest.raises(errors.ConfigError, match="'full' has no keys of NSA's branches, which"):
    decode(transformer, params, tokens(), SIZE)
