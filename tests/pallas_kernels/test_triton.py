"""The Triton kernels of block-sparse attention: lists, interpreted, compiled, and on a GPU.

The lists are plain XLA and are tested anywhere. Where Triton is installed, the kernels run in
its interpreter on the CPU, in a process of their own because Triton decides for good between
interpreting and compiling when it is imported; and every shape that is promised is compiled.
"""

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_attention
from pallas_kernels.block_sparse_attention import (
  triton_call,
  triton_gpu,
  triton_lists,
  triton_shape,
)
from pallas_kernels.block_sparse_attention.problem import Problem
from tests.pallas_kernels import problems

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
  importlib.util.find_spec("triton") is None, reason="needs jax-triton, the extra triton"
)
only_compiled = pytest.mark.skipif(IS_INTERPRETED, reason="Triton interprets in this process")
TYPES = {"bfloat16": "bf16", "float32": "fp32", "int32": "i32"}
# Shared memory of a program, in bytes: what GPUs of capability 8.6 and 8.9 have for one.
MOST_SHARED = 99 * 1024


def attend(q, k, v, blocks, *, block_size, query_offset, segments_BS, key_bias_BSK):
  problem = Problem(q, k, v, blocks, jnp.int32(query_offset), segments_BS, key_bias_BSK)
  return triton_gpu.block_sparse_attention(problem, None, block_size, q.shape[-1] ** -0.5)


def assert_matches_reference(problem, actual, dtype):
  exact = problems.run(problem, dtype=jnp.float32, attend=problems.reference)
  low = problems.run(problem, dtype=dtype, attend=problems.plain)
  assert actual.keys() == exact.keys()
  for name in exact:
    problems.assert_no_worse(name, actual[name], low[name], exact[name])


LISTS = {  # B, T, H, K, D, block_size, M, and extras
  "one_token_per_unit": ((2, 40, 16, 1, 32, 16, 3), dict(offset=30, documents=True)),
  "tokens_share_a_unit": ((1, 45, 6, 2, 32, 16, 4), dict(documents=True)),
  "many_units_per_block": ((1, 600, 16, 1, 32, 128, 3), {}),
}


@pytest.fixture(params=LISTS)
def lists(request):
  """A problem, its shape, what every unit lists by a loop, and the lists of both kinds."""
  case, extras = LISTS[request.param]
  made = problems.make(*case, **extras)
  problem = Problem(
    made.q, made.k, made.v, made.blocks, jnp.int32(made.query_offset), made.segments, None
  )
  shape = triton_shape.of(problem, made.block_size, 1.0)

  @jax.jit
  def lists_of(problem):
    first_BT = triton_lists.first_keys(problem)
    query = triton_lists.query_lists(problem, first_BT, shape)
    return first_BT, query, triton_lists.key_lists(query, shape)

  first_BT, query, key = lists_of(problem)
  first_BT = np.asarray(first_BT)
  per_unit = shape.grouping.tokens_per_unit
  listed = [{} for _ in range(shape.num_rows * shape.grouping.num_units)]
  blocks = np.asarray(problem.blocks_BTKM)
  for b, t, k, m in np.ndindex(*blocks.shape):
    block, last = blocks[b, t, k, m], made.query_offset + t
    if made.segments is not None:
      segments = np.asarray(made.segments)[b]
      assert first_BT[b, t] == np.flatnonzero(segments == segments[last])[0]
    begin = block * made.block_size
    if 0 <= begin <= last and begin + made.block_size > first_BT[b, t]:
      row = b * shape.num_kv_heads + k
      tokens = listed[row * shape.grouping.num_units + t // per_unit]
      tokens[block] = tokens.get(block, 0) | 1 << t % per_unit

  return shape, listed, query, key


def test_units_list_what_their_tokens_see(lists):
  _, listed, query, _ = lists
  blocks, tokens = (
    np.asarray(x).reshape(-1, x.shape[-1]) for x in (query.blocks_RUE, query.tokens_RUE)
  )
  for unit, count in enumerate(np.asarray(query.count_RU).reshape(-1)):
    assert list(zip(blocks[unit, :count], tokens[unit, :count], strict=True)) == sorted(
      listed[unit].items()
    )


def test_every_pair_of_a_unit_and_a_block_is_in_one_chunk(lists):
  shape, listed, _, key = lists
  num_units = shape.grouping.num_units
  expected = [[] for _ in range(shape.num_rows * shape.num_blocks)]
  for i, blocks in enumerate(listed):
    for block, tokens in blocks.items():
      expected[i // num_units * shape.num_blocks + block].append((i % num_units, tokens))

  units_P, tokens_P, bounds_C2, block_C, first_chunk_X = (np.asarray(x) for x in key)
  length = triton_lists.chunk_length(len(units_P), len(expected))
  actual = [[] for _ in expected]
  for chunk, (begin, end) in enumerate(bounds_C2):
    if chunk >= first_chunk_X[-1]:
      assert begin >= end
      continue
    block = block_C[chunk]
    assert first_chunk_X[block] <= chunk < first_chunk_X[block + 1]
    assert 0 < end - begin <= length
    actual[block] += zip(units_P[begin:end], tokens_P[begin:end], strict=True)
  assert actual == expected


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(dtype=jnp.float16), "takes bfloat16 and float32, not float16"),
    (dict(d=96), "takes head sizes (32, 64, 128), not 96"),
    (dict(block_size=8), "takes blocks of (16, 32, 64, 128) keys, not 8"),
    (dict(heads=33), "takes up to 32 query heads per key head, not 33"),
    (dict(installed=False), "needs jax-triton: pip install -e '.[triton]' in the repository"),
    (dict(dtype=jnp.float32), None),
    (dict(), None),
  ],
)
def test_what_it_cannot_take_is_said(change, message, monkeypatch):
  d, heads = change.get("d", 64), change.get("heads", 16)
  installed = change.get("installed", True)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if installed else None)
  q = jnp.zeros((1, 16, heads, d), change.get("dtype", jnp.bfloat16))
  k = jnp.zeros((1, 16, 1, d), q.dtype)
  problem = Problem(q, k, k, jnp.zeros((1, 16, 1, 1), int), jnp.int32(0), None, None)
  assert triton_gpu.why_not(problem, change.get("block_size", 16)) == message


@pytest.mark.parametrize(
  ("platform", "kind", "capability", "message"),
  [
    ("cpu", "cpu", None, "needs an NVIDIA GPU, this is cpu"),
    ("gpu", "AMD MI300X", "gfx942", "needs an NVIDIA GPU, AMD MI300X is gfx942"),
    (
      "gpu",
      "Tesla T4",
      "7.5",
      "needs compute capability 8.0 or later (Ampere), Tesla T4 has 7.5",
    ),
    ("gpu", "NVIDIA A100", "8.0", None),
    ("gpu", "NVIDIA B200", "10.0", None),
  ],
)
def test_where_it_cannot_run_is_said(platform, kind, capability, message, monkeypatch):
  class Device:
    pass

  Device.platform, Device.device_kind = platform, kind
  Device.compute_capability = capability
  monkeypatch.setattr(jax, "devices", lambda: [Device])
  assert triton_gpu.why_not_here() == message


INTERPRETED = {  # B, T, H, K, D, block_size, M, extras, dtype
  "everything": (
    (2, 37, 6, 2, 32, 16, 3),
    dict(documents=True, offset=24, bias=True),
    jnp.float32,
  ),
  "two_tiles_of_heads": ((1, 20, 32, 1, 64, 32, 2), dict(offset=60), jnp.float32),
  "sixteen_tokens_share": ((2, 40, 1, 1, 32, 16, 3), dict(documents=True), jnp.float32),
  "several_chunks": ((1, 270, 16, 1, 32, 128, 2), {}, jnp.float32),
  "wide_blocks": ((1, 9, 16, 2, 64, 128, 2), dict(offset=300, bias=True), jnp.float32),
  "bfloat16": (
    (1, 30, 4, 2, 128, 16, 3),
    dict(documents=True, offset=20, bias=True),
    jnp.bfloat16,
  ),
}


class HostTensor:
  """Just enough of a tensor of PyTorch for Triton's interpreter to find an array by."""

  def __init__(self, array):
    self._array = array
    self.dtype = TYPES[array.dtype.name]

  def data_ptr(self):
    return self._array.ctypes.data

  def _itself(self, *args, **kwargs):
    return self

  untyped_storage = cpu = new_empty = set_ = copy_ = size = stride = storage_offset = _itself


@pytest.fixture
def interpreter(monkeypatch):
  """Makes `triton_call.call` interpret kernels, with what Triton's interpreter lacks."""
  import triton.language as tl
  from triton.runtime import interpreter

  builder = interpreter.InterpreterBuilder
  plain_dot, plain_cast = builder.create_dot, builder.cast_impl
  plain_patch = interpreter._patch_lang_tensor

  def cast(self, x, dtype):
    # It would cut digits off where GPUs round to nearest.
    if x.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
      data = x.data.astype(jnp.bfloat16).view(np.uint16)
      return interpreter.TensorHandle(data, tl.bfloat16)
    return plain_cast(self, x, dtype)

  def dot(self, a, b, *args):
    # It would multiply the bits of bfloat16 as integers.
    a, b = (x if x.dtype.scalar == tl.float32 else cast(self, x, tl.float32) for x in (a, b))
    return plain_dot(self, a, b, *args)

  def patch(tensor, scope):
    plain_patch(tensor, scope)
    # Arrays of one number, which NumPy no longer takes for a number.
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

  for name in ("cast_impl", "create_fp_trunc"):
    monkeypatch.setattr(builder, name, cast)
  monkeypatch.setattr(
    builder, "create_fp_to_fp", lambda self, x, dtype, _: cast(self, x, dtype)
  )
  monkeypatch.setattr(builder, "create_dot", dot)
  monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
  # The interpreter keeps its place in the grid in one global, and JAX calls from threads.
  lock = threading.Lock()

  def call(kernel, *arrays, out_type, grid, num_warps, num_stages, **constants):
    del num_warps, num_stages
    types, tree = jax.tree.flatten(out_type)

    def on_host(*arrays):
      arrays = [np.ascontiguousarray(x) for x in arrays]
      # What a kernel forgets to write is found by NaN.
      outputs = [np.full(x.shape, np.nan, x.dtype) for x in types]
      with lock:
        kernel[grid](*map(HostTensor, (*arrays, *outputs)), **constants)
      return outputs

    return jax.tree.unflatten(tree, jax.pure_callback(on_host, types, *arrays))

  monkeypatch.setattr(triton_call, "call", call)


@pytest.mark.skipif(not IS_INTERPRETED, reason="run by test_interpreted_it_matches")
@pytest.mark.parametrize("name", INTERPRETED)
def test_in_the_interpreter(name, interpreter):
  case, extras, dtype = INTERPRETED[name]
  problem = problems.make(*case, **extras)
  actual = problems.run(problem, dtype=dtype, attend=attend)
  assert_matches_reference(problem, actual, dtype)


@needs_triton
@only_compiled
def test_interpreted_it_matches_the_reference():
  command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
  done = subprocess.run(
    [*command, "-k", "test_in_the_interpreter"],
    cwd=pathlib.Path(__file__).parents[2],
    env={**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout[-4000:]
  assert f"{len(INTERPRETED)} passed" in done.stdout


PROMISED = [
  *((heads, 64, 16, jnp.bfloat16, {}) for heads in (1, 3, 8, 32)),
  *((16, d, size, jnp.bfloat16, {}) for d in (32, 64, 128) for size in (16, 32, 64, 128)),
  (32, 128, 128, jnp.bfloat16, dict(documents=True, bias=True)),
  (4, 128, 64, jnp.bfloat16, dict(documents=True, bias=True)),
  (16, 64, 16, jnp.float32, dict(documents=True, bias=True)),
  (32, 128, 128, jnp.float32, dict(bias=True)),
]


@needs_triton
@only_compiled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
  ("heads", "d", "block_size", "dtype", "extras"),
  PROMISED,
  ids=lambda x: "_".join(x) if isinstance(x, dict) else getattr(x, "__name__", str(x)),
)
def test_what_is_promised_compiles_and_fits(
  heads, d, block_size, dtype, extras, capability, monkeypatch, tmp_path
):
  import triton
  from triton.backends import compiler as targets

  # jax_triton, once imported, leaves an empty name in its place.
  monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
  compiled = []

  def call(kernel, *arrays, out_type, grid, num_warps, num_stages, **constants):
    outputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_type)
    types = [f"*{TYPES[x.dtype.name]}" for x in (*arrays, *jax.tree.leaves(outputs))]
    names = kernel.arg_names
    assert names[len(types) :] == [n for n in names if n in constants]
    source = triton.compiler.ASTSource(
      kernel,
      dict(zip(names, types, strict=False)) | dict.fromkeys(constants, "constexpr"),
      {(names.index(name),): value for name, value in constants.items()},
      {(i,): [["tt.divisibility", 16]] for i in range(len(types))},
    )
    target = targets.GPUTarget("cuda", capability, 32)
    options = dict(num_warps=num_warps, num_stages=num_stages)
    compiled.append(triton.compile(source, target=target, options=options))
    return outputs

  monkeypatch.setattr(triton_call, "call", call)
  b, t, k, s = 2, 200, 2, 264
  q = jax.ShapeDtypeStruct((b, t, heads * k, d), dtype)
  kv = jax.ShapeDtypeStruct((b, s, k, d), dtype)
  bias = jax.ShapeDtypeStruct((b, s, k), jnp.float32) if "bias" in extras else None
  segments = jax.ShapeDtypeStruct((b, s), jnp.int32) if "documents" in extras else None
  blocks = jax.ShapeDtypeStruct((b, t, k, 5), jnp.int32)
  lse = jax.ShapeDtypeStruct((b, t, heads * k), jnp.float32)
  offset = jax.ShapeDtypeStruct((), jnp.int32)

  def outputs_and_gradients(q, k, v, bias, blocks, segments, offset, dout, dlse):
    def of(q, k, v, bias):
      problem = Problem(q, k, v, blocks, offset, segments, bias)
      return triton_gpu.block_sparse_attention(problem, None, block_size, d**-0.5)

    out, vjp = jax.vjp(of, q, k, v, bias)
    return out, vjp((dout, dlse))

  jax.eval_shape(outputs_and_gradients, q, kv, kv, bias, blocks, segments, offset, q, lse)
  # Forward, dq, dkv, and the sum of parts.
  assert len(compiled) == 4
  assert max(kernel.metadata.shared for kernel in compiled) <= MOST_SHARED


ON_GPU = {  # B, T, H, K, D, block_size, M, and extras
  "ssa": ((2, 1024, 32, 2, 64, 16, 16), {}),
  "nosa": ((1, 1024, 32, 2, 128, 64, 8), {}),
  "everything": ((2, 900, 32, 2, 64, 16, 16), dict(documents=True, offset=300, bias=True)),
  "everything_at_128": ((1, 500, 8, 2, 128, 64, 4), dict(documents=True, offset=77, bias=True)),
  **{f"{g}_heads": ((1, 333, g * 2, 2, 64, 16, 6), {}) for g in (1, 2, 3, 4, 8, 16, 32)},
  **{
    f"blocks_of_{size}_at_{d}": ((1, 777, 16, 1, d, size, 4), {})
    for size in (16, 32, 64, 128)
    for d in (32, 64, 128)
  },
}


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu_it_matches_the_reference(name, dtype):
  case, extras = ON_GPU[name]
  problem = problems.make(*case, **extras)
  run = functools.partial(problems.run, problem, dtype=dtype, attend=attend)
  actual = run()
  # What float32 is compared with must not round to TF32 either.
  with jax.default_matmul_precision("highest"):
    assert_matches_reference(problem, actual, dtype)
  # No sum depends on who came first.
  for name, value in run().items():
    np.testing.assert_array_equal(value, actual[name], err_msg=name)


@needs_triton
@pytest.mark.gpu
def test_on_a_gpu_unlisted_blocks_are_never_read():
  problem = problems.make(1, 512, 16, 1, 64, 16, 1)
  q, k, v = (x.astype(jnp.bfloat16) for x in (problem.q, problem.k, problem.v))
  own_block = (jnp.arange(512) // 16)[None, :, None, None]
  run = functools.partial(
    attend, block_size=16, query_offset=0, segments_BS=None, key_bias_BSK=None
  )
  clean, _ = run(q, k, v, own_block)
  nan = jnp.nan
  poisoned, _ = run(q, k.at[:, :496].set(nan), v.at[:, :496].set(nan), own_block)
  np.testing.assert_array_equal(clean[:, 496:], poisoned[:, 496:])


@needs_triton
@pytest.mark.gpu
def test_on_a_gpu_long_runs_of_sinks_are_shared_out():
  """All queries read the first block: its gradient is the sum over many chunks."""
  t = 4096
  problem = problems.make(1, t, 16, 1, 64, 16, 4)
  blocks = problem.blocks.at[..., 0].set(0).at[..., 1].set((jnp.arange(t) // 16)[None, :, None])
  q, k, v = problem.q, problem.k, problem.v

  def gradients(dtype, attend):
    _, vjp = jax.vjp(
      lambda *x: attend(
        *x, blocks, block_size=16, query_offset=0, segments_BS=None, key_bias_BSK=None
      ),
      *(x.astype(dtype) for x in (q, k, v)),
    )
    return vjp((problem.dout.astype(dtype), problem.dlse))

  exact = gradients(
    jnp.float32, functools.partial(block_sparse_attention, implementation="xla")
  )
  for name, actual, wanted in zip("qkv", gradients(jnp.bfloat16, attend), exact, strict=True):
    error = jnp.abs(actual.astype(jnp.float32) - wanted).max()
    assert error <= 2e-2 * jnp.abs(wanted).max(), name
