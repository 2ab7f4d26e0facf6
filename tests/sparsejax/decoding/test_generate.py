"""Texts that continue prompts, many at a time."""

import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import errors, model, sharding
from sparsejax.decoding import cache as caches
from sparsejax.decoding import generate as generation
from sparsejax.decoding import pinned, prefill
from sparsejax.decoding import sampling as samplings
from tests import small
from tests.sparsejax.decoding.models import model_of

PROMPTS = [[5, 6, 7], [9] * 13, list(range(20, 28)), [1]]
GREEDY = samplings.Sampling(temperature=0)


@functools.cache
def make():
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  transformer = small.make_model(attention__method="ssa")
  params = jax.device_put(small.make_params(transformer, scale=4.0), sharding.replicated(mesh))
  return transformer, params, mesh


def generate(prompts=PROMPTS, mesh=None, **options):
  transformer, params, all_devices = make()
  if mesh is None:
    mesh = all_devices
  else:
    params = jax.device_put(params, sharding.replicated(mesh))
  options = dict(max_new_tokens=6, stream="sparse", sampling=GREEDY, rows=2) | options
  return generation.generate(transformer, params, prompts, mesh=mesh, **options)


def make_decoder(transformer, params, mesh, **options):
  options = dict(stream="sparse", sampling=GREEDY, seed=0, num_ids=None) | options
  return generation.Decoder(transformer, params, mesh=mesh, **options)


def test_greedy_texts_are_those_of_the_whole_row():
  """More prompts than rows, so that rows are used again; one program for all prompts."""
  transformer, params, _ = make()

  @jax.jit
  def following(ids, length):
    positions = jnp.arange(len(ids))[None]
    output = transformer.apply(
      {"params": params}, ids[None], positions, jnp.ones_like(ids)[None], stream="sparse"
    )
    return model.logits(params, output.hidden_BTE)[0, length - 1].argmax()

  texts = generate()
  for prompt, text in zip(PROMPTS, texts, strict=True):
    assert len(text) == 6
    ids = np.zeros(32, np.int32)
    ids[: len(prompt) + 6] = prompt + text
    for n in range(6):
      assert text[n] == following(ids, len(prompt) + n)


def test_a_text_is_over_when_its_owner_says_so():
  """Asked after every id; rows that it frees are used again."""
  whole = generate()
  assert generate(is_over=lambda ids: len(ids) == 2) == [text[:2] for text in whole]
  assert generate(is_over=lambda ids: False) == whole
  ends = whole[0][:3]
  assert generate(is_over=lambda ids: list(ids) == ends)[0] == ends


def test_prompts_are_padded_to_few_lengths():
  """Powers of two up to a chunk; longer ones are as long as a row, by one program for all."""
  transformer, params, mesh = make()
  decoder = make_decoder(transformer, params, mesh, rows=1, length=38, prefill_chunk=16)
  read, begin = [], decoder._begin

  def remember(params, cache, row, padded, *rest):
    read.append(padded.shape[1])
    return begin(params, cache, row, padded, *rest)

  decoder._begin = remember
  for length in (3, 5, 16, 9, 17, 33):
    decoder.begin(0, [1] * length, 0)
  assert read == [4, 8, 16, 16, 40, 40]
  assert begin._cache_size() == 4


@pytest.mark.parametrize(("length", "is_whole"), [(3, True), (40, False)])
def test_what_reads_prompts_of_their_lengths_is_told(length, is_whole):
  """Rows have room for more than the budget either way."""
  told = []
  generate([[1] * length], length=48, max_new_tokens=2, on_choice=told.append)
  ops = {choice.op for choice in told}
  assert ("chunk_attention" in ops) == is_whole
  assert ("block_selection" in ops) == (not is_whole)


def test_chunks_change_no_text():
  prompts = [*PROMPTS, [3, 1, 4] * 9]
  assert generate(prompts, prefill_chunk=8) == generate(prompts)


def test_a_draw_depends_on_the_seed_and_the_prompt_alone():
  free = samplings.Sampling()
  texts = generate(sampling=free, seed=3)
  assert generate(sampling=free, seed=3, rows=4) == texts
  assert generate(sampling=free, seed=4) != texts


def test_a_stop_id_is_the_last_of_its_text():
  whole = generate()
  stop = whole[0][2]
  heard = []
  texts = generate(stop_ids=[stop], on_token=lambda *drawn: heard.append(drawn))
  for before, text in zip(whole, texts, strict=True):
    end = before.index(stop) + 1 if stop in before else len(before)
    assert text == before[:end]
  for number, text in enumerate(texts):
    assert [token for n, token in heard if n == number] == text


def test_ids_beyond_the_tokenizer_are_not_drawn():
  texts = generate(sampling=samplings.Sampling(temperature=50.0), num_ids=4)
  assert {i for text in texts for i in text} <= set(range(4))


def one_device():
  types = (jax.sharding.AxisType.Auto,) * 3
  return jax.make_mesh((1, 1, 1), sharding.AXES, types, devices=jax.devices()[:1])


def test_pages_on_the_host_change_no_text():
  """Rows are used again, so that slots and pages of the texts before must not be read."""
  texts = generate(mesh=one_device(), max_new_tokens=12)
  assert generate(mesh=one_device(), max_new_tokens=12, num_slots=3) == texts


@pytest.mark.parametrize("name", ["sliding_window", "nsa_shared"])
def test_windows_may_be_longer_than_rows(name):
  """12 tokens, of which no row has more than one page."""
  transformer, params = model_of(name)
  texts = [
    generation.generate(
      transformer,
      params,
      [[5, 6, 7]],
      max_new_tokens=5,
      stream="sparse",
      mesh=one_device(),
      sampling=GREEDY,
      offload=offload,
    )
    for offload in ("never", "always")
  ]
  assert texts[0] == texts[1]


def test_what_is_wrong_is_said_before_weights_are_touched():
  transformer, _, mesh = make()
  with pytest.raises(errors.ConfigError, match="num_slots=2 is less than the 3 pages"):
    make_decoder(transformer, None, mesh, rows=1, length=40, num_slots=2)


def test_no_prompt_no_text():
  assert generate([]) == []


@pytest.mark.parametrize(
  ("prompts", "options", "message"),
  [
    ([[1], []], {}, "prompt 1 is empty"),
    ([[1, 999]], {}, "prompt 0 has the id 999; the model knows 0 to 319. Encode it with"),
    ([[1, -1]], {}, "prompt 0 has the id -1; the model knows 0 to 319"),
    ([[1] * 9], dict(length=14), "prompt 0 has 9 ids and max_new_tokens=6, together more than"),
    ([1, 2], {}, "prompt 0 is no list of ids, which are whole numbers: '1'. .* a list of one"),
    (["abc"], {}, "prompt 0 is no list of ids, which are whole numbers: 'abc'"),
    ([[1], [2.5]], {}, "prompt 1 is no list of ids, which are whole numbers"),
    ([[1], [2, [3]]], {}, r"prompt 1 is no list of ids, which are whole .*: '\[2, \[3\]\]'"),
    ([[1]], dict(length="8"), "length='8' is not a whole number"),
    ([[1]], dict(stop_ids=5), "stop_ids=5 is no list of ids; give a list of one"),
    ([[1]], dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
    ([[1]], dict(max_new_tokens=2.5), "max_new_tokens=2.5 is not a whole number"),
    ([[1]], dict(rows=0), "rows=0 must be at least 1"),
    ([[1]], dict(stop_ids=(2, None)), "an id of stop_ids=None is not a whole number"),
    ([[1]], dict(stop_ids=(9999,)), "an id of stop_ids=9999 must be at most"),
    ([[1]], dict(seed=2**32), "seed=4294967296 must be at most 4294967295"),
    ([[1]], dict(seed=-1), "seed=-1 must be at least 0"),
    ([[1]], dict(num_ids=0), "num_ids=0 must be at least 1"),
    ([[1]], dict(num_ids=321), "num_ids=321 must be at most 320"),
    ([[1]], dict(stream="Full"), "unknown stream 'Full'.* There are: full, sparse"),
    ([[1]], dict(prefill_stream="dense"), "unknown prefill_stream 'dense'"),
    ([[1]], dict(offload="sometimes"), "unknown offload 'sometimes'"),
    ([[1]], dict(prefill_chunk=16.0), "prefill_chunk=16.0 is not a whole number"),
    ([[1] * 40], dict(num_slots=2), "num_slots=2 is less than the 3 pages of 8 tokens that a"),
    ([[1]], dict(num_slots=9), r"pages in the host's memory .* take one device and not 8"),
    ([[1]], dict(offload="always"), r"pages in .* take one device and not 8; hide the others"),
    ([[1] * 40], dict(num_slots=5, stream="full"), "num_slots=5 is less than the 6 pages"),
    ([[1]], dict(prefill_chunk=0), "prefill_chunk=0 is not a multiple of the 8 tokens of a"),
    ([[1]], dict(prefill_chunk=-8), "prefill_chunk=-8 is not a .*; take 8, or leave it out"),
    ([[1]], dict(prefill_chunk=13), "prefill_chunk=13 is not a .*; take 16, or leave it out"),
  ],
)
def test_what_cannot_be_continued_is_refused(prompts, options, message):
  with pytest.raises(errors.UserError, match=message):
    generate(prompts, **options)


def test_a_cache_that_does_not_fit_is_refused_before_anything_runs(monkeypatch):
  monkeypatch.setattr("sparsejax.decoding.cache.free_bytes", lambda: 100_000)
  message = (
    r"a cache of 8 rows takes \d\.\d\d MiB, a prompt that is read .*, and the device has "
    r"97\.66 KiB free; decode shorter rows\."
  )
  with pytest.raises(errors.UserError, match=message):
    generate(length=512)


def test_as_many_rows_as_fit_are_named():
  transformer, *_ = make()
  spec = caches.spec(transformer, "full", caches.room(transformer, batch=4, length=64))
  needed = caches.num_bytes(spec)
  caches.check_size(spec, needed + 7, None, beside=7)
  with pytest.raises(errors.UserError, match=r"a prompt that is .* 7 bytes,.*; decode 3 rows"):
    caches.check_size(spec, needed + 6, None, beside=7)
  with pytest.raises(errors.UserError, match=r"KiB, and the device has .*; decode 1 rows at a"):
    caches.check_size(spec, needed // 4, None)
  with pytest.raises(errors.UserError, match=r"free; decode shorter rows\."):
    caches.check_size(spec, needed // 4 - 1, None)


def test_a_cache_goes_with_its_decoder():
  """At once: who decodes again may have no room for two."""
  transformer, params, mesh = make()
  gc.collect()
  gc.disable()
  try:
    before = {id(x) for x in jax.live_arrays()}
    decoder = make_decoder(transformer, params, mesh, rows=1, length=16)
    decoder.begin(0, [1, 2], 0)
    decoder.step(*np.ones((3, 1), np.int32))
    sizes = {x.shape for x in jax.live_arrays() if id(x) not in before}
    assert decoder.cache.arrays[0]["k"].shape in sizes
    del decoder
    left = [x.shape for x in jax.live_arrays() if id(x) not in before]
    assert not any(len(shape) > 1 for shape in left), left
  finally:
    gc.enable()


def test_a_prompt_that_is_read_has_room_beside_the_cache(monkeypatch):
  transformer, *_ = make()
  room = caches.room(transformer, batch=8, length=64)
  needed = caches.num_bytes(caches.spec(transformer, "sparse", room))
  needed += prefill.num_bytes(transformer, "sparse", room, 16)
  options = dict(length=64, prefill_chunk=16, offload="never")
  monkeypatch.setattr("sparsejax.decoding.cache.free_bytes", lambda: needed - 1)
  with pytest.raises(errors.UserError, match="a cache of 8 rows takes"):
    generate(**options)
  monkeypatch.setattr("sparsejax.decoding.cache.free_bytes", lambda: needed)
  assert generate(**options) == generate()


@pytest.mark.parametrize("setting", [None, "1"])
def test_pages_that_the_host_has_no_room_for_are_refused(setting, monkeypatch):
  """By the limit of the GPU's runtime on pinned memory, and what raises it is named."""
  gpu = [dataclasses.make_dataclass("Gpu", [("platform", str)])("gpu")]
  monkeypatch.setattr(jax, "devices", lambda: gpu)
  name = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
  monkeypatch.delenv(name, raising=False)
  if setting is not None:
    monkeypatch.setenv(name, setting)
  limit = pinned.limit()
  assert limit == (64 if setting is None else 1) * 2**30
  monkeypatch.undo()
  transformer, *_ = make()
  # 2 layers, 2 heads, keys and values of 8 float32: 256 bytes a token.
  room = caches.room(transformer, batch=3, length=limit // 256 // 2, num_slots=3)
  spec = caches.spec(transformer, "sparse", room)
  message = (
    f"cache of 3 rows has arrays of .* decode 2 rows.*, or start the program with {name}"
  )
  with pytest.raises(errors.UserError, match=message):
    caches.check_size(spec, None, limit)
  caches.check_size(spec, None, 2 * limit)


def test_rows_stay_divided_over_devices():
  """What a device remembers is of its own rows, those that were read as prompts and others."""
  num_devices = len(jax.devices())
  assert num_devices > 1
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  transformer = small.make_model(attention__method="nsa")
  params = jax.device_put(small.make_params(transformer), sharding.replicated(mesh))
  decoder = make_decoder(transformer, params, mesh, rows=num_devices, length=64)
  decoder.begin(0, [1, 2, 3], 0)
  nothing = np.zeros(num_devices, np.int32)
  decoder.step(nothing, nothing, nothing)
  for arrays, kinds in zip(decoder.cache.arrays, decoder.cache.kinds, strict=True):
    for name in kinds.keys() - {"k", "v"}:
      assert arrays[name].sharding.spec[1] == "data", name
