"""The program of a step, as XLA makes it: pages on the host stay there, nothing copies them."""

import re

import jax
import jax.numpy as jnp
import pytest

from sparsejax.attention import pages
from sparsejax.decoding import cache as caches
from sparsejax.evaluation import decode_timing
from tests import small

# What may have all pages as its result: it moves nothing.
HANDS_ON = {"parameter", "get-tuple-element", "tuple", "while", "custom-call", "bitcast"}


def make_step(**changes):
  """A jitted step of NOSA with slots, and its arguments."""
  transformer = small.make_model(
    attention__method="nosa",
    attention__kernels="strict",
    attention__block_size=16,
    attention__num_blocks=4,
    nosa__num_query_aware=1,
    model__dtype="bfloat16",
    model__head_dim=64,
    **changes,
  )
  room = caches.room(transformer, batch=2, length=16 * 4000, num_slots=6)
  spec = caches.spec(transformer, "sparse", room)
  params = caches.cast("bfloat16", small.make_params(transformer))
  arguments = params, caches.make(spec), jnp.zeros(2, jnp.int32), None
  stores = [x for x in jax.tree.leaves(spec) if x.sharding is not None]
  return decode_timing.make_step(caches.for_decoding(transformer), "sparse"), arguments, stores


def shape_of(store):
  kind = {"bfloat16": "bf16", "float32": "f32"}[store.dtype.name]
  return f"{kind}[{','.join(map(str, store.shape))}]"


def moves(text, store):
  """Instructions of optimised HLO that make an array like a store."""
  made = re.findall(rf"= \(?{re.escape(shape_of(store))}[^=]*? ([\w-]+)\(", text)
  return [name for name in made if name not in HANDS_ON]


def test_what_moves_pages_is_found():
  store = jax.ShapeDtypeStruct((64, 16, 8), jnp.bfloat16)
  text = """
  %a = bf16[64,16,8]{2,1,0:S(5)} get-tuple-element(%t), index=1
  %k = (bf16[64,16,8]{2,1,0:S(5)}, f32[64,16]{1,0}) custom-call(%x), custom_call_target="m"
  %c = bf16[64,16,8]{2,1,0} copy(%a)
  %s = (bf16[64,16,8]{2,1,0:S(5)}, bf16[1,16,8]{2,1,0}, u32[]) fusion-start(%a)
  """
  assert moves(text, store) == ["copy", "fusion-start"]


def test_lowered_for_cuda_kernels_alone_have_pages_of_the_host(monkeypatch):
  monkeypatch.setattr("pallas_kernels.devices.why_not_hopper", lambda: None)
  step, arguments, stores = make_step()
  text = step.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
  for store in stores:
    kind = {"bfloat16": "bf16", "float32": "f32"}[store.dtype.name]
    tensor = "x".join(map(str, store.shape)) + "x" + kind
    made = re.findall(
      rf"^ *%\S+ = (?:stablehlo\.)?\"?([\w.]+)[^\n]*-> [^\n]*tensor<{tensor}>", text, re.M
    )
    assert set(made) <= {"custom_call", "call", "func.call"}, made
    assert "custom_call" in made


@pytest.mark.gpu
def test_on_a_gpu_no_page_of_the_host_is_copied():
  step, arguments, stores = make_step()
  compiled = step.lower(*arguments).compile()
  text = compiled.as_text()
  for store in stores:
    assert shape_of(store) in text
    assert moves(text, store) == []
  memory = compiled.memory_analysis()
  temporary = memory.temp_size_in_bytes + memory.host_temp_size_in_bytes
  # Products take 32 MiB to work in, more than all biases and less than all keys.
  keys = max(x.size * x.dtype.itemsize for x in stores)
  assert temporary < keys


@pytest.mark.gpu
def test_on_a_gpu_donated_pages_of_the_host_stay_where_they_are():
  step, (params, cache, ids, lists), _ = make_step()
  where = None
  for _ in range(3):
    ids, cache = step(params, cache, ids, lists)
    held = {name: cache.arrays[0][name] for name in ("k", "v", "bias")}
    assert {x.sharding.memory_kind for x in held.values()} == {pages.HOST}
    now = {name: x.unsafe_buffer_pointer() for name, x in held.items()}
    assert where in (None, now)
    where = now
