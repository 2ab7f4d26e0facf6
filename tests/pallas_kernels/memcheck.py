"""One run of every kernel, for NVIDIA's checker of memory accesses.

  compute-sanitizer --tool memcheck .venv/bin/python -m tests.pallas_kernels.memcheck [RUN ...]

Every kernel for Hopper GPUs, and those in Triton where the extra is installed; or only the
runs named. The checker itself dies of a segmentation fault now and then: a run of its own
for each, and another try, get through.
"""

import functools
import importlib.util
import os
import sys

# Under the checker, CUDA graphs (XLA's command buffers) end in a segmentation fault.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="

import jax
import jax.numpy as jnp

from pallas_kernels import (
  Slots,
  block_sparse_attention,
  decode_attention,
  devices,
  fetch_pages,
  plan_slots,
  release_slots,
  select_blocks,
  select_blocks_of_token,
  write_pages,
)
from pallas_kernels.block_selection import pooling
from tests.pallas_kernels import problems

ATTENTION = {  # B, T, H, K, D, block_size, M, and extras
  "single_tokens": ((1, 500, 32, 2, 64, 16, 8), {}),
  "whole_blocks": ((1, 500, 16, 1, 128, 64, 4), dict(offset=77)),
  "several_tokens": ((1, 300, 8, 2, 64, 32, 4), dict(documents=True, offset=77, bias=True)),
  "heads_of_128": ((1, 300, 16, 1, 128, 16, 4), dict(documents=True, bias=True)),
}
SELECTION = {  # D, block_size, and rules
  "select_blocks": (64, 16, {}),
  "select_windows": (128, 64, dict(pooling=pooling.infllm_v2(64), num_initial=1, num_local=4)),
  "select_weighted": (64, 64, dict(pooling=pooling.nsa_windows(64, 32, 16), num_local=2)),
}


def attention(backend: str, name: str) -> dict:
  """Output and gradients."""
  case, extras = ATTENTION[name]
  attend = functools.partial(block_sparse_attention, implementation=backend)
  return problems.run(problems.make(*case, **extras), dtype=jnp.bfloat16, attend=attend)


def selection(name: str) -> dict:
  """Block lists."""
  d, block_size, rules = SELECTION[name]
  keys = jax.random.split(jax.random.key(0))
  q = jax.random.normal(keys[0], (1, 700, 16, d), jnp.bfloat16)
  k = jax.random.normal(keys[1], (1, 700, 1, d), jnp.bfloat16)
  sizes = dict(block_size=block_size, num_blocks=8)
  return dict(blocks=select_blocks(q, k, **sizes, **rules, implementation="mosaic_gpu"))


def decoding() -> dict:
  """One query per row, by pages in any order, with a bias."""
  keys = jax.random.split(jax.random.key(0), 4)
  k, v = (jax.random.normal(key, (60, 64, 128), jnp.bfloat16) for key in keys[:2])
  q = jax.random.normal(keys[2], (3, 32, 128), jnp.bfloat16)
  pages = jax.random.permutation(keys[3], 60)[:48].reshape(3, 2, 8) - 5
  out, lse = decode_attention(
    q,
    k,
    v,
    pages,
    begin_BKM=jnp.full_like(pages, 3),
    end_BKM=jnp.full_like(pages, 50),
    key_bias_PX=jnp.ones((60, 64)),
    implementation="mosaic_gpu",
  )
  return dict(out=out, lse=lse)


def moving() -> dict:
  """Pages of keys, values and biases from the host's memory, and back to others there."""
  host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
  shapes = ((64, 128), jnp.bfloat16), ((64, 128), jnp.bfloat16), ((64,), jnp.float32)
  stores = tuple(jax.device_put(jnp.ones((40, *x), dtype), host) for x, dtype in shapes)
  slots = tuple(jnp.zeros((16, *x), dtype) for x, dtype in shapes)
  fetch = jax.jit(functools.partial(fetch_pages, implementation="mosaic_gpu"))
  fetched = fetch(stores, slots, jnp.array([39, -1, 0, 7]), jnp.array([15, 2, 0, 3]))
  write = jax.jit(functools.partial(write_pages, implementation="mosaic_gpu"), donate_argnums=0)
  written = write(stores, fetched, jnp.array([5, 6, -1, 39]), jnp.array([15, 15, 2, 0]))
  return dict(zip(("keys", "values", "biases"), written, strict=True))


def listing() -> dict:
  """Lists of single tokens, by scores of keys, too."""
  windows = pooling.infllm_v2(64)
  q, k = jnp.ones((3, 32, 128), jnp.bfloat16), jnp.ones((3, 1027, 2, 128), jnp.bfloat16)
  blocks = select_blocks_of_token(
    q,
    k * jnp.arange(1027)[None, :, None, None] / 1000,
    jnp.array([0, 9000, 16_443]),
    num_keys=16_444,
    block_size=64,
    num_blocks=64,
    num_initial=1,
    num_local=16,
    num_by_query=33,
    pooling=windows,
    window_score_BWK=jax.random.normal(jax.random.key(0), (3, 1027, 2)),
    implementation="mosaic_gpu",
  )
  return dict(blocks=blocks)


def planning() -> dict:
  """Slots for lists longer than a thread compares at once, of rows amid others."""
  rows, num_slots = 9, 300
  numbers = (jnp.zeros((rows, num_slots), jnp.int32) for _ in range(2))
  counts = (jnp.zeros(rows, jnp.int32) for _ in range(2))
  slots = release_slots(Slots(*numbers, *counts), jnp.ones(rows, bool))
  wanted = jax.random.randint(jax.random.key(0), (4, 130), -3, 420)
  own, is_new = jnp.arange(4), jnp.arange(4) % 2 == 0
  plan = functools.partial(plan_slots, pages_per_row=420, implementation="mosaic_gpu")
  step = jax.jit(functools.partial(plan, first_row=3), donate_argnums=0)
  for now in range(4):  # from the third on pages are driven out
    slots = step(slots, (wanted + 110 * now) % 420, own, is_new, step=now).slots
  return dict(slots=slots)


def main(names: list[str]) -> int:
  """The command line; returns the exit status."""
  backends = ["mosaic_gpu"]
  if importlib.util.find_spec("jax_triton") is not None:
    backends.append("triton")
  runs = {name: functools.partial(selection, name) for name in SELECTION}
  runs |= dict(select_blocks_of_token=listing, plan_slots=planning)
  runs |= dict(decode_attention=decoding, move_pages=moving)
  for backend in backends:
    runs |= {
      f"{name}/{backend}": functools.partial(attention, backend, name) for name in ATTENTION
    }
  unknown = [name for name in names if name not in runs]
  if unknown:
    sys.stderr.write(f"error: no run {unknown[0]!r}; there are {', '.join(runs)}\n")
    return 2
  why_not = devices.why_not_hopper()
  if why_not is not None:
    sys.stderr.write(f"error: memcheck {why_not}\n")
    return 2
  for name in names or runs:
    found = jax.block_until_ready(runs[name]())
    sys.stdout.write(f"ran {name}: {', '.join(found)}\n")
    sys.stdout.flush()
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
