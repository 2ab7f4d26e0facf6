"""The Hopper kernels of block-sparse attention: interpreted, lowered, and on a GPU.

Where there is no GPU, the kernels run in Pallas' interpreter of GPU kernels, which finds
races, missing waits and deadlocks; each warp is a thread there. And every shape that is
promised is lowered for CUDA, which the instructions that the interpreter does not know
(see `mosaic_inline`) take part in.
"""

import dataclasses
import functools
import re

import jax
from jax import export
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_attention, devices
from pallas_kernels.block_lists import key_tiles, mosaic_gpu_deal, query_tiles
from pallas_kernels.block_sparse_attention import (
  mosaic_gpu,
  mosaic_gpu_call,
  mosaic_gpu_dkv,
  mosaic_gpu_walk,
)
from pallas_kernels.block_sparse_attention.problem import Problem
from tests.pallas_kernels import problems


def attend(q, k, v, blocks, *, block_size, query_offset, segments_BS, key_bias_BSK, interpret):
  problem = Problem(q, k, v, blocks, jnp.int32(query_offset), segments_BS, key_bias_BSK)
  return mosaic_gpu.block_sparse_attention(
    problem, None, block_size, q.shape[-1] ** -0.5, interpret
  )


def assert_matches_reference(problem, actual):
  exact = problems.run(problem, dtype=jnp.float32, attend=problems.reference)
  low = problems.run(problem, dtype=jnp.bfloat16, attend=problems.plain)
  assert actual.keys() == exact.keys()
  for name in exact:
    problems.assert_no_worse(name, actual[name], low[name], exact[name])


@pytest.fixture
def small(monkeypatch):
  """One warpgroup, and rings so short that they go round several times."""
  query = mosaic_gpu_walk.Config(warpgroups=1, stages=3, registers=208)
  key = mosaic_gpu_dkv.Config(
    warpgroups=1,
    stages=3,
    units_per_stage=4,
    registers=208,
    keys_in_registers=False,
    rounds=2,
  )
  whole = dataclasses.replace(key, warpgroups=2, whole_blocks=True)
  monkeypatch.setattr(mosaic_gpu_call, "query_config", lambda *_: query)
  monkeypatch.setattr(
    mosaic_gpu_call,
    "key_config",
    lambda d, num_rows, whole_blocks: whole if whole_blocks else key,
  )
  yield
  gpu_callbacks.reset_gpu_interpret_mode_state()


INTERPRETED = {  # B, T, H, K, D, block_size, M, and extras
  "several_tiles": ((1, 43, 16, 1, 64, 16, 5), {}),
  "tokens_share_a_unit": ((1, 22, 3, 1, 64, 64, 2), dict(offset=120, bias=True)),
  "a_token_has_two_units": ((1, 9, 32, 1, 64, 32, 2), dict(offset=60)),
  "warps_as_one": ((1, 34, 16, 1, 64, 64, 2), dict(offset=150, bias=True)),
  "scores_grow": ((1, 7, 16, 1, 64, 16, 7), dict(offset=120)),
  "keys_behind_a_chunk": ((1, 16, 4, 1, 64, 16, 4), dict(offset=32, ahead=48)),
}


def with_a_border_inside_a_block(problem):
  """A document begins at position 5, and late queries read blocks 0 to 3 in one step."""
  segments = (jnp.arange(problem.k.shape[1]) >= 5).astype(jnp.int32)[None]
  blocks = problem.blocks.at[..., :4].set(jnp.arange(4))
  return dataclasses.replace(problem, segments=segments, blocks=blocks)


def whose_first_query_reads_block_0(problem):
  return dataclasses.replace(problem, blocks=problem.blocks.at[:, 0].set(0))


def assert_room_brings_nothing_in(run, problem, clean):
  """Room that is left in a window of a block's units is filled with the first query's.

  A NaN in its cotangent spoils the block that it reads, and no others.
  """
  spoiled = run(dataclasses.replace(problem, dout=problem.dout.at[:, 0].set(jnp.nan)))
  first, size = problem.query_offset, problem.block_size
  for name in ("dk", "dv"):
    assert jnp.isnan(spoiled[name][:, : min(first, size)]).all(), name
    np.testing.assert_array_equal(spoiled[name][:, size:], clean[name][:, size:])


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_it_matches_the_reference_without_races(name, small, monkeypatch):
  case, extras = INTERPRETED[name]
  problem = problems.make(*case, **extras)
  if name == "tokens_share_a_unit":
    # As with head size 128.
    monkeypatch.setattr(mosaic_gpu_call, "DQ_FINDS_DELTA", ())
  if name == "several_tiles":
    # More than there is work for: those without any must not be counted in.
    monkeypatch.setattr(mosaic_gpu_call, "INTERPRETED_WORKERS", 5)
    problem = with_a_border_inside_a_block(problem)
    # Lists count as long, and are copied in pieces.
    monkeypatch.setattr(query_tiles, "COPY", 2)
  if name == "warps_as_one":
    problem = whose_first_query_reads_block_0(problem)
  if name == "scores_grow":
    # By hundreds along the keys: the maximum has to follow, more than once.
    growth = jnp.linspace(1.0, 100.0, problem.k.shape[1])[None, :, None, None]
    problem = dataclasses.replace(problem, k=problem.k * growth)
  interpret = plgpu.InterpretGPUParams(detect_races=True)
  run = problems.program(
    problem, dtype=jnp.bfloat16, attend=functools.partial(attend, interpret=interpret)
  )
  actual = run(problem)
  assert not gpu_callbacks.get_races().races_found
  assert_matches_reference(problem, actual)
  if name == "warps_as_one":
    assert_room_brings_nothing_in(run, problem, actual)


EVERYTHING = dict(documents=True, bias=True)
PROMISED = [
  *((heads, 64, 16, {}) for heads in (1, 2, 3, 8, 16, 32)),
  *((heads, 64, 16, EVERYTHING) for heads in (4, 16)),
  *((16, 64, size, {}) for size in (32, 64, 128)),
  *((16, 128, size, {}) for size in (16, 32, 64, 128)),
  (32, 128, 64, {}),
  (4, 128, 64, EVERYTHING),
]


@pytest.mark.parametrize(
  ("heads", "d", "block_size", "extras"),
  PROMISED,
  ids=lambda x: "_".join(x) if isinstance(x, dict) else str(x),
)
def test_what_is_promised_is_lowered_for_cuda(heads, d, block_size, extras):
  # Forward, dq, dkv, the two sums of parts, and three kernels for lists of single tokens.
  assert num_kernels(heads, d, block_size, extras) == 5 + (heads > 8) * 3


def test_where_there_is_no_room_units_are_dealt_by_sorting(monkeypatch):
  """Above 1.3 million keys with head size 64, 0.9 million with 128."""
  tiling = functools.partial(key_tiles.Tiling, block_size=64)
  assert mosaic_gpu_deal.has_room(tiling(num_blocks=3 * 7168, keys_per_tile=192))
  assert not mosaic_gpu_deal.has_room(tiling(num_blocks=3 * 7168 + 1, keys_per_tile=192))
  monkeypatch.setattr(mosaic_gpu_deal, "has_room", lambda _: False)
  assert num_kernels(16, 64, 16, {}) == 5 + 1


def num_kernels(heads, d, block_size, extras) -> int:
  """How many kernels outputs and all gradients take, lowered for CUDA."""
  b, t, k, s = 2, 203, 2, 267
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  q, kv = shape((b, t, heads * k, d)), shape((b, s, k, d))
  bias = jax.ShapeDtypeStruct((b, s, k), jnp.float32) if "bias" in extras else None
  segments = jax.ShapeDtypeStruct((b, s), jnp.int32) if "documents" in extras else None
  blocks = jax.ShapeDtypeStruct((b, t, k, 5), jnp.int32)
  lse = jax.ShapeDtypeStruct((b, t, heads * k), jnp.float32)

  def outputs_and_gradients(q, k, v, bias, blocks, segments, offset, dout, dlse):
    def of(q, k, v, bias):
      problem = Problem(q, k, v, blocks, offset, segments, bias)
      return mosaic_gpu.block_sparse_attention(problem, None, block_size, d**-0.5)

    out, vjp = jax.vjp(of, q, k, v, bias)
    return out, vjp((dout, dlse))

  offset = jax.ShapeDtypeStruct((), jnp.int32)
  lowered = export.export(
    jax.jit(outputs_and_gradients),
    platforms=["cuda"],
    disabled_checks=[export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
  )(q, kv, kv, bias, blocks, segments, offset, q, lse)
  return lowered.mlir_module().count("custom_call @mosaic_gpu_v2")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(dtype=jnp.float32), "takes bfloat16, not float32"),
    (dict(d=96), r"head sizes \(64, 128\), not 96"),
    (dict(block_size=8), r"blocks of \(16, 32, 64, 128\) keys, not 8"),
    (dict(heads=33), "up to 32 query heads per key head, not 33"),
    (dict(heads=2, length=16384, num_blocks=200), "no room in shared memory for lists of 1024"),
    (dict(heads=1, length=8192, num_blocks=16), None),
    (dict(), None),
  ],
)
def test_what_it_cannot_take_is_said(change, message):
  d, heads = change.get("d", 64), change.get("heads", 16)
  length, num_blocks = change.get("length", 16), change.get("num_blocks", 1)
  q = jnp.zeros((1, length, heads, d), change.get("dtype", jnp.bfloat16))
  k = jnp.zeros((1, length, 1, d), q.dtype)
  blocks = jnp.zeros((1, length, 1, num_blocks), int)
  problem = Problem(q, k, k, blocks, jnp.int32(0), None, None)
  why = mosaic_gpu.why_not(problem, change.get("block_size", 16))
  if message is None:
    assert why is None
  else:
    assert re.search(message, why)


def test_it_is_refused_where_it_cannot_run(monkeypatch):
  q = jnp.zeros((1, 16, 16, 64), jnp.bfloat16)
  k, blocks = q[:, :, :1], jnp.zeros((1, 16, 1, 1), int)
  attend = functools.partial(
    block_sparse_attention, blocks_BTKM=blocks, block_size=16, implementation="mosaic_gpu"
  )
  if jax.devices()[0].platform == "cpu":
    with pytest.raises(ValueError, match="needs a Hopper GPU, this is cpu"):
      attend(q, k, k)
  monkeypatch.setattr(devices, "why_not_hopper", lambda: None)
  with pytest.raises(ValueError, match="takes bfloat16, not float32; 'xla' runs anywhere"):
    attend(*(x.astype(jnp.float32) for x in (q, k, k)))


ON_GPU = {  # B, T, H, K, D, block_size, M, and extras
  "ssa": ((2, 1024, 32, 2, 64, 16, 16), {}),
  "nosa": ((1, 1024, 32, 2, 128, 64, 8), {}),
  "everything": ((2, 900, 32, 2, 64, 16, 16), dict(documents=True, offset=300, bias=True)),
  "everything_at_128": ((1, 500, 8, 2, 128, 64, 4), dict(documents=True, offset=77, bias=True)),
  "long_lists": ((1, 200, 4, 2, 64, 16, 40), dict(offset=4096, bias=True)),
  "long_lists_of_a_token": ((1, 60, 32, 2, 64, 16, 300), dict(offset=5000)),
  **{f"{g}_heads": ((1, 333, g * 2, 2, 64, 16, 6), {}) for g in (1, 2, 3, 4, 8, 16, 32)},
  **{
    f"blocks_of_{size}_at_{d}": ((1, 777, 16, 1, d, size, 4), {})
    for size in (16, 32, 64, 128)
    for d in (64, 128)
  },
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu_it_matches_the_reference(name):
  case, extras = ON_GPU[name]
  problem = problems.make(*case, **extras)
  run = functools.partial(
    problems.run, problem, dtype=jnp.bfloat16, attend=functools.partial(attend, interpret=None)
  )
  actual = run()
  assert_matches_reference(problem, actual)
  # No sum depends on who came first.
  for name, value in run().items():
    np.testing.assert_array_equal(value, actual[name], err_msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ssa", "everything", "long_lists", "1_heads"])
def test_on_a_gpu_the_kernel_of_dq_finds_delta(name, monkeypatch):
  case, extras = ON_GPU[name]
  problem = problems.make(*case, **extras)
  results = []
  for sizes in ((), (64,)):
    monkeypatch.setattr(mosaic_gpu_call, "DQ_FINDS_DELTA", sizes)
    run = functools.partial(attend, interpret=None)
    results.append(problems.run(problem, dtype=jnp.bfloat16, attend=run))
  for name, value in results[0].items():
    # Sums of delta are in another order.
    x, y = (np.asarray(r, np.float32) for r in (value, results[1][name]))
    # lse is -inf where a query reads nothing.
    size = np.abs(x[np.isfinite(x)]).max()
    np.testing.assert_allclose(y, x, rtol=0, atol=2**-7 * size, err_msg=name)


@pytest.mark.gpu
def test_on_a_gpu_unlisted_blocks_are_never_read():
  problem = problems.make(1, 512, 16, 1, 64, 16, 1)
  q, k, v = (x.astype(jnp.bfloat16) for x in (problem.q, problem.k, problem.v))
  own_block = (jnp.arange(512) // 16)[None, :, None, None]
  run = functools.partial(
    attend, block_size=16, query_offset=0, segments_BS=None, key_bias_BSK=None, interpret=None
  )
  clean, _ = run(q, k, v, own_block)
  nan = jnp.nan
  poisoned, _ = run(q, k.at[:, :496].set(nan), v.at[:, :496].set(nan), own_block)
  np.testing.assert_array_equal(clean[:, 496:], poisoned[:, 496:])


@pytest.mark.gpu
@pytest.mark.parametrize(("d", "size"), [(64, 16), (64, 64), (128, 16), (128, 64)])
def test_on_a_gpu_room_that_is_left_brings_nothing_in(d, size):
  problem = problems.make(1, 333, 16, 1, d, size, 4, offset=77)
  problem = whose_first_query_reads_block_0(problem)
  run = problems.program(
    problem, dtype=jnp.bfloat16, attend=functools.partial(attend, interpret=None)
  )
  assert_room_brings_nothing_in(run, problem, run(problem))


@pytest.mark.gpu
def test_on_a_gpu_long_runs_of_sinks_are_shared_out():
  """All queries read the first block: its gradient is the sum over every worker's part."""
  t = 4096
  problem = problems.make(1, t, 16, 1, 64, 16, 4)
  blocks = problem.blocks.at[..., 0].set(0).at[..., 1].set((jnp.arange(t) // 16)[None, :, None])
  problem = dataclasses.replace(problem, blocks=blocks)
  actual = problems.run(
    problem, dtype=jnp.bfloat16, attend=functools.partial(attend, interpret=None)
  )
  exact = problems.run(problem, dtype=jnp.float32, implementation="xla")
  for name in exact:
    error = jnp.abs(actual[name].astype(jnp.float32) - exact[name]).max()
    assert error <= 2e-2 * jnp.abs(exact[name]).max(), name
