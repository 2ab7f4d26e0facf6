"""Prompts that are read in chunks give what the same rows give at once."""

import dataclasses
import functools

import jax
from jax.extend import core as jex
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_selection import xla as block_selection
from pallas_kernels.block_sparse_attention import xla_gathered as block_sparse_attention
from pallas_kernels.chunk_attention import xla as chunk_attention
from sparsejax import attention, errors, sharding
from sparsejax.attention import past
from sparsejax.decoding import cache as caches
from sparsejax.decoding import prefill
from tests import small
from tests.sparsejax.decoding.models import METHODS, SIZE, STREAMS, at_once, model_of

# At, before and behind the borders of chunks, blocks and windows.
LENGTHS = np.array([1, 7, 8, 9, 15, 30, 41, 24])
LENGTH = 45


def tokens(length=LENGTH):
  """Behind a row's end there is what would be noticed if it were read."""
  return jax.random.randint(jax.random.key(5), (len(LENGTHS), length), 0, 256)


def read(transformer, params, ids, lengths, chunk, *, stream="sparse", length=LENGTH):
  room = caches.room(transformer, batch=len(ids), length=length)
  run = functools.partial(prefill.prefill, transformer, stream=stream, room=room, chunk=chunk)
  return jax.tree.map(np.asarray, jax.jit(run)(params, ids, jnp.asarray(lengths)))


def assert_logits(logits, expected, lengths):
  """Those after the last token of every row, of whole rows' [B, T, V]."""
  wanted = expected[np.arange(len(lengths)), lengths - 1]
  np.testing.assert_allclose(logits, wanted, rtol=2e-4, atol=2e-4)


# Full attention that runs sparse is MoBA here.
@pytest.mark.parametrize(("name", "stream"), [x for x in STREAMS if x != ("full", "sparse")])
def test_rows_of_any_lengths_are_read_in_chunks(name, stream):
  """Windows of 12 tokens, and coarse ones of 16, span chunks of 8."""
  transformer, params = model_of(name)
  ids = tokens()
  expected = at_once(transformer, params, ids, stream)
  logits, cache = read(transformer, params, ids, LENGTHS, SIZE, stream=stream)
  assert_logits(logits, expected, LENGTHS)
  np.testing.assert_array_equal(cache.lengths_B, LENGTHS)


def test_exponentiated_scores_of_keys_choose_alike():
  transformer, params = model_of("ed_dma")
  transformer = transformer.clone(
    options=dataclasses.replace(transformer.options, method="dma")
  )
  ids = tokens()
  logits, _ = read(transformer, params, ids, LENGTHS, 2 * SIZE)
  assert_logits(logits, at_once(transformer, params, ids, "sparse"), LENGTHS)


def known(kind, x_LB, row, length, room):
  """What of an array of a cache stands for tokens of a row."""
  if isinstance(kind, past.Pages):
    rows = x_LB.reshape(-1, room.batch, room.num_kv_heads, room.length, *x_LB.shape[2:])
    return rows[:, row, :, :length]
  if isinstance(kind, past.Last):
    return x_LB[:, row, np.arange(max(0, length - kind.size), length) % kind.size]
  return x_LB[:, row, :, : kind.pooling.num_windows(length)]


# Every kind of memory, and every array that a layer keeps of prompts.
@pytest.mark.parametrize("name", ["infllmv2", "nosa", "nsa", "nsa_shared"])
def test_the_cache_is_that_of_prompts_read_at_once(name):
  transformer, params = model_of(name)
  ids = tokens()
  (_, ours), (_, expected) = (
    read(transformer, params, ids, LENGTHS, chunk) for chunk in (SIZE, 6 * SIZE)
  )
  assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, expected)
  seen = set()
  for own, wanted, kinds in zip(ours.arrays, expected.arrays, ours.kinds, strict=True):
    for (key, kind), (row, length) in (
      (x, y) for x in kinds.items() for y in enumerate(LENGTHS.tolist())
    ):
      x, y = (known(kind, of[key], row, length, ours.room) for of in (own, wanted))
      np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4, err_msg=f"{key} of {length}")
      seen.add((key, x.size > 0 and np.abs(x).max() > 0))
  assert {key for key, is_there in seen if is_there} == set().union(*ours.kinds)


def test_short_rows_are_read_whole_beside_long_ones():
  """Each as training's forward pass of that row alone reads it."""
  dense = 25
  transformer = caches.for_decoding(
    small.make_model(
      attention__method="nosa",
      attention__num_blocks=4,
      attention__block_size=4,
      infllmv2__window_size=2,
      infllmv2__window_stride=1,
      infllmv2__dense_length=dense,
      nosa__num_query_aware=1,
    )
  )
  params, ids = model_of("nosa")[1], tokens()
  lengths = np.array([24, 25, 3, 30, 41, 16, 26, 1])
  found, streams = {}, {}
  for chunk in (8, 48):
    found[chunk], _ = read(transformer, params, ids, lengths, chunk)
  for stream in ("full", "sparse"):
    streams[stream] = at_once(transformer, params, ids, stream)[range(8), lengths - 1]
  is_short = (lengths < dense)[:, None]
  expected = np.where(is_short, streams["full"], streams["sparse"])
  # Each row would come out otherwise by the other stream, but those of a budget or less.
  differ = np.abs(streams["full"] - streams["sparse"]).max(-1) > 1e-2
  np.testing.assert_array_equal(differ, lengths > 16)
  for logits in found.values():
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-4)
  # As training has it: by the length of the row.
  alone = at_once(transformer, params, ids[:1, : lengths[0]], "sparse")
  np.testing.assert_allclose(found[8][0], alone[0, -1], rtol=2e-4, atol=2e-4)


def test_pages_on_the_host_hold_the_same_prompt():
  transformer, params = model_of("nosa")
  slots = attention.most_pages(transformer.options, "sparse", LENGTH)
  held = []
  for num_slots in (slots, None):
    room = caches.room(transformer, batch=2, length=LENGTH, num_slots=num_slots)
    cache = caches.make(caches.spec(transformer, "sparse", room))
    one = dataclasses.replace(room, batch=1)

    def begin(params, ids, length, cache, one=one):
      _, filled = prefill.prefill(
        transformer, params, ids, length, stream="sparse", room=one, chunk=SIZE
      )
      return cache.with_row(1, filled)

    held.append(jax.jit(begin)(params, tokens()[:1], jnp.array([41]), cache))
  for name in ("k", "v", "bias"):
    ours, expected = (np.asarray(cache.arrays[0][name]) for cache in held)
    np.testing.assert_array_equal(ours, expected)
    assert np.abs(ours).max() > 0


def sizes(jaxpr):
  """Numbers of elements of all arrays that a program makes, and where."""
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      yield variable.aval.size, str(variable.aval)
    for inner in jex.jaxprs_in_params(equation.params):
      yield from sizes(inner)


@pytest.mark.parametrize(
  ("name", "stream"), [("nosa", "sparse"), ("nsa", "sparse"), ("full", "full")]
)
def test_activations_do_not_grow_with_prompts(name, stream, monkeypatch):
  """Nothing is larger than the keys of a stack of layers, in one program or another."""
  # What XLA is given to do at a time, so small that it is seen.
  monkeypatch.setattr(chunk_attention, "TILE_ELEMENTS", 2**16)
  monkeypatch.setattr(block_selection, "SCORE_ELEMENTS", 2**16)
  monkeypatch.setattr(block_sparse_attention, "GATHERED_ELEMENTS", 2**16)
  transformer, params = model_of(name)
  shape, chunk, length = transformer.shape, 256, 2**15
  room = caches.room(transformer, batch=1, length=length)
  run = functools.partial(prefill.prefill, transformer, stream=stream, room=room, chunk=chunk)
  ids_1T = jax.ShapeDtypeStruct((1, length), jnp.int32)
  traced = jax.jit(run).trace(params, ids_1T, jax.ShapeDtypeStruct((1,), jnp.int32))
  kept = shape.num_hidden_layers * length * shape.num_key_value_heads * shape.head_dim
  largest, what = max(sizes(traced.jaxpr.jaxpr))
  assert largest <= kept, what


def test_one_program_reads_all_prompts():
  transformer, params = model_of("full")
  room = caches.room(transformer, batch=1, length=LENGTH)
  run = jax.jit(
    functools.partial(prefill.prefill, transformer, stream="full", room=room, chunk=SIZE)
  )
  ids = tokens()[:1]
  expected = at_once(transformer, params, ids, "full")
  for length in (9, 16, 45):
    logits, _ = run(params, ids, jnp.array([length]))
    assert_logits(logits, expected, np.array([length]))
  assert run._cache_size() == 1


def test_devices_read_rows_of_their_own():
  transformer, params = model_of("nosa")
  ids = tokens()
  expected = at_once(transformer, params, ids, "sparse")
  mesh = sharding.make_mesh(data=4, fsdp=1, tensor=2)
  with sharding.use(mesh):
    logits, _ = read(transformer, params, ids, LENGTHS, SIZE)
  assert_logits(logits, expected, LENGTHS)


def test_bytes_beside_the_cache_are_what_a_prompt_takes():
  """Two layers, keys and values of 2 x 8 float32: 256 bytes a token, twice."""
  transformer, _ = model_of("full")
  transformer = transformer.clone(
    options=dataclasses.replace(transformer.options, layer_methods=("full",))
  )
  room = caches.room(transformer, batch=3, length=80)
  assert prefill.num_bytes(transformer, "full", room, 32) == 256 * (96 + 80)
  assert prefill.num_bytes(transformer, "full", room, 128) == 256 * (80 + 80)


def test_a_chunk_is_whole_blocks():
  assert prefill.chunk_size(16) == 4096
  assert prefill.chunk_size(48) == 4080
  assert prefill.chunk_size(5000) == 5000
  assert prefill.chunk_size(8, 24) == 24
  for wrong, near in ((-8, 8), (0, 8), (3, 8), (20, 16), (21, 24)):
    with pytest.raises(
      errors.ConfigError,
      match=f"prefill_chunk={wrong} is not a multiple of the 8 tokens of a block, from 8 up; "
      f"take {near}, or leave it out for 4096",
    ):
      prefill.chunk_size(8, wrong)
  transformer, params = model_of("full")
  with pytest.raises(errors.ConfigError, match="prefill_chunk=12 is not a multiple of the 8"):
    read(transformer, params, tokens(), LENGTHS, 12)


def rms(x):
  return np.sqrt(np.mean(np.square(x)))


@pytest.mark.gpu
@pytest.mark.parametrize(
  ("name", "stream"),
  [("nosa", "sparse"), ("ssa_nosa", "full"), ("nsa", "sparse"), ("sliding_window", "sparse")],
)
def test_on_kernels_chunks_are_as_near_to_float32_as_whole_rows(name, stream):
  """By the mean over all rows' logits: single blocks may be chosen another way."""
  changes = dict(
    attention__block_size=16,
    attention__num_blocks=8,
    attention__window=100,
    model__head_dim=64,
    infllmv2__num_local=2,
    infllmv2__window_size=8,
    infllmv2__window_stride=4,
    nsa__compress_length=32,
    nsa__compress_stride=16,
    nsa__window=100,
  )
  exact = caches.for_decoding(small.make_model(**METHODS[name] | changes))
  changes |= dict(attention__kernels="strict", model__dtype="bfloat16")
  rounded = caches.for_decoding(small.make_model(**METHODS[name] | changes))
  params, length, chunk = small.make_params(exact, scale=4.0), 1000, 256
  ids, lengths = tokens(length), np.array([1, 255, 256, 257, 500, 1000, 769, 16])
  truth = at_once(exact, params, ids, stream)
  whole = at_once(rounded, params, ids, stream)
  logits, _ = read(rounded, params, ids, lengths, chunk, stream=stream, length=length)
  last = np.arange(len(lengths)), lengths - 1
  assert 0 < rms(logits - truth[last]) <= 2 * rms(whole[last] - truth[last])
