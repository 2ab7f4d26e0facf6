"""Times the kernels against dense attention, after checking that they are right.

  python -m pallas_kernels.benchmark
  python -m pallas_kernels.benchmark ssa_8k nosa_16k --lists=clustered --what=op,layers

Prints and saves, in a file for each shape and for every pass: milliseconds, useful TFLOP/s
(those of the listed keys), the share of the roofline (useful operations at the tensor cores'
peak, or the bytes of inputs and outputs at the memory's), and the time over that of cuDNN's
dense causal attention on the same queries, keys and values in the same run.
"""

import argparse
from collections.abc import Collection
import dataclasses
import functools
from importlib import metadata
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp

from pallas_kernels import benchmark_clock, benchmark_layer, benchmark_lists, devices
from pallas_kernels.block_sparse_attention import mosaic_gpu, mosaic_gpu_call, reference, xla
from pallas_kernels.block_sparse_attention.problem import Problem

# Largest root mean square of an error over that of the value, for bfloat16 results.
TOLERANCE = 5e-3
PEAK_FLOPS = 989e12
# Bytes per second by what a device calls itself.
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12}


@dataclasses.dataclass(frozen=True)
class Shape:
  """What is measured: queries of `heads` over `kv_heads`, `num_blocks` blocks each."""

  batch: int
  length: int
  heads: int
  kv_heads: int
  head_dim: int
  block_size: int
  num_blocks: int


SHAPES = {
  "ssa_2k": Shape(8, 2048, 32, 2, 64, 16, 16),
  "ssa_8k": Shape(2, 8192, 32, 2, 64, 16, 16),
  "ssa_32k": Shape(1, 32768, 32, 2, 64, 16, 16),
  "nosa_16k": Shape(1, 16384, 32, 2, 128, 64, 64),
  "nosa_32k": Shape(1, 32768, 32, 2, 128, 64, 64),
  **{
    f"length_{length // 1024}k": Shape(1, length, 32, 2, 64, 16, 16)
    for length in (4096, 8192, 16384, 32768, 65536, 131072)
  },
}
DEFAULT = ("ssa_2k", "ssa_8k", "ssa_32k", "nosa_16k", "nosa_32k")
GROUPS = {  # of what is measured
  "kernels": "each kernel and each making of lists alone",
  "op": "block-sparse attention from its lists on",
  "xla": "the same in XLA, up to 8192 tokens",
  "selection": "block selection, alone and with lists",
  "layers": "a sparse layer, and SSA's dual path",
  "mosaic": "dense attention in Mosaic, which a fused dual path could at best equal",
}


@dataclasses.dataclass(frozen=True)
class Row:
  """One measurement.

  Attributes:
    shape, lists: what was measured.
    what: the pass.
    ms: median time.
    tflops: useful operations per second, 1e12; None where a pass has none.
    roofline: the least time over the measured one; None likewise.
    ratio: time over that of the dense pass that it stands beside; None for those.
  """

  shape: str
  lists: str
  what: str
  ms: float
  tflops: float | None = None
  roofline: float | None = None
  ratio: float | None = None


def make_inputs(shape: Shape, seed: int = 0) -> tuple[jax.Array, ...]:
  """Random queries, keys, values and cotangents of the output, bfloat16."""
  keys = jax.random.split(jax.random.key(seed), 4)

  def draw(key, heads):
    size = shape.batch, shape.length, heads, shape.head_dim
    return jax.random.normal(key, size, jnp.bfloat16)

  heads = shape.heads, shape.kv_heads, shape.kv_heads, shape.heads
  return tuple(draw(key, h) for key, h in zip(keys, heads, strict=True))


def check(shape: Shape, kind: str, clock: benchmark_clock.Clock) -> dict[str, float]:
  """Errors of every output and gradient at a length that the definition can take.

  Raises:
    AssertionError: one of them is too large.
  """
  short = dataclasses.replace(shape, batch=1, length=max(1024, 4 * shape.block_size))
  q, k, v, dout = make_inputs(short, seed=1)
  with clock.turn():
    blocks = benchmark_lists.make_lists(
      "clustered" if ".npy" in kind else kind,
      q,
      k,
      block_size=short.block_size,
      num_blocks=short.num_blocks,
    )

  def outputs(attend, dtype):
    @jax.jit
    def run(q, k, v, dout):
      def of(q, k, v):
        problem = Problem(q, k, v, blocks, jnp.int32(0), None, None)
        return attend(problem, 0, short.block_size, short.head_dim**-0.5)

      (out, lse), vjp = jax.vjp(of, q, k, v)
      return out, lse, *vjp((dout.astype(out.dtype), jnp.zeros_like(lse)))

    return run(*(x.astype(dtype) for x in (q, k, v, dout)))

  different = benchmark_layer.check_selection(
    q, k, block_size=short.block_size, num_blocks=short.num_blocks
  )
  exact = outputs(reference.block_sparse_attention, jnp.float32)
  actual = outputs(mosaic_gpu.block_sparse_attention, jnp.bfloat16)
  errors = {"lists": different}
  for name, a, e in zip(("out", "lse", "dq", "dk", "dv"), actual, exact, strict=True):
    difference = a.astype(jnp.float32) - e
    errors[name] = float(jnp.sqrt(jnp.square(difference).mean() / jnp.square(e).mean()))
    assert errors[name] <= TOLERANCE, f"{name} of {kind} lists is off by {errors[name]:.1e}"
  return errors


def dense_times(clock: benchmark_clock.Clock, q, k, v, dout) -> tuple[float, float]:
  """Milliseconds of cuDNN's causal attention, forward and backward."""

  def attend(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

  measure = clock.milliseconds
  forward = measure(attend, q, k, v)
  both = measure(lambda q, k, v, d: jax.vjp(attend, q, k, v)[1](d), q, k, v, dout)
  return forward, both - forward


def make_passes(problem: Problem, dout, block_size: int, scale: float):
  """Every step of the op by name: a function and arguments that it computes from."""
  call = mosaic_gpu_call.Call(problem, block_size, scale)
  bounds = jax.jit(call.bounds)(problem)
  unit_lists, tiles = jax.jit(call.make_lists)(problem.blocks_BTKM, bounds)
  walk_lists = jax.jit(call.make_walk_lists)(problem, tiles, bounds)
  q, dout = call.packing.pack(problem.q_BTHD), call.packing.pack(dout)
  out, lse = jax.jit(call.forward)(q, walk_lists)
  cotangents = problem.q_BTHD, jnp.zeros(problem.q_BTHD.shape[:3])
  lines = mosaic_gpu.backward_lines(
    call, call.packing.unpack(out), call.packing.from_lines(lse), *cotangents
  )
  key_tiles = jax.jit(call.make_key_tiles)(unit_lists)
  numbers = call.line_numbers(*lines, bounds)
  sums = jax.jit(call.dkv)(q, dout, numbers, problem, key_tiles)
  return {
    "lists of query tiles": (call.make_lists, (problem.blocks_BTKM, bounds)),
    "lists of key tiles": (call.make_key_tiles, (unit_lists,)),
    "forward": (call.forward, (q, walk_lists)),
    "dq": (call.dq, (q, dout, *lines, walk_lists)),
    "dk dv": (call.dkv, (q, dout, numbers, problem, key_tiles)),
    "dk dv, adding parts": (call.add_parts, (sums, key_tiles)),
  }


def run(
  name: str,
  shape: Shape,
  kind: str,
  groups: Collection[str],
  clock: benchmark_clock.Clock,
) -> list[Row]:
  """Measures every pass of some groups on one kind of lists."""
  measure = clock.milliseconds
  with clock.turn():
    q, k, v, dout = make_inputs(shape)
    blocks = benchmark_lists.make_lists(
      kind, q, k, block_size=shape.block_size, num_blocks=shape.num_blocks
    )
    jax.block_until_ready((q, k, v, dout, blocks))
  scale = shape.head_dim**-0.5
  dense_forward, dense_backward = dense_times(clock, q, k, v, dout)
  pairs = benchmark_lists.num_pairs(blocks, shape.block_size)
  group = shape.heads // shape.kv_heads
  product = 2.0 * pairs * group * shape.head_dim
  dense_product = shape.batch * shape.heads * shape.length**2 * shape.head_dim
  row = functools.partial(Row, name, kind)

  def rated(what, ms, products, arrays, ratio):
    flops, num_bytes = products * product, sum(x.nbytes for x in arrays)
    least = max(flops / PEAK_FLOPS, num_bytes / _bandwidth())
    return row(what, ms, flops / ms / 1e9, 1e3 * least / ms, ratio)

  rows = [
    row("dense forward", dense_forward, 2 * dense_product / dense_forward / 1e9),
    row("dense backward", dense_backward, 5 * dense_product / dense_backward / 1e9),
  ]

  problem = Problem(q, k, v, blocks, jnp.int32(0), None, None)
  passes = {}
  if "kernels" in groups:
    passes = make_passes(problem, dout, shape.block_size, scale)
  work = {
    "forward": (2, (q, k, v, q), dense_forward),
    "dq": (3, (q, k, v, dout, q), dense_backward),
    "dk dv": (4, (q, k, v, dout, k, v), dense_backward),
  }
  for what, (function, args) in passes.items():
    ms = measure(function, *args)
    if what in work:
      products, arrays, dense = work[what]
      rows.append(rated(what, ms, products, arrays, ms / dense))
    else:
      rows.append(row(what, ms, ratio=ms / dense_forward))

  def attend(run, q, k, v, blocks):
    problem = Problem(q, k, v, blocks, jnp.int32(0), None, None)
    return run(problem, 0, shape.block_size, scale)[0]

  def gradient(run, q, k, v, blocks, dout):
    return jax.vjp(lambda *x: attend(run, *x, blocks), q, k, v)[1](dout)

  for group, label, implementation in (("op", "", mosaic_gpu), ("xla", " in XLA", xla)):
    # In XLA, longer ones take minutes, and gigabytes.
    if group not in groups or (group == "xla" and shape.length > 8192):
      continue
    op = implementation.block_sparse_attention
    forward = measure(functools.partial(attend, op), q, k, v, blocks)
    both = measure(functools.partial(gradient, op), q, k, v, blocks, dout)
    ratio = forward / dense_forward
    rows.append(rated(f"op{label}, forward", forward, 2, (q, k, v, q), ratio))
    total = dense_forward + dense_backward
    arrays = (q, k, v, q, q, k, v, dout, q, k, v)
    rows.append(rated(f"op{label}, forward and backward", both, 7, arrays, both / total))
  dense = dense_forward, dense_backward
  return rows + _around(row, measure, shape, (q, k, v, dout), blocks, dense, groups)


def _around(row, measure, shape: Shape, inputs, blocks, dense, groups) -> list[Row]:
  """Selection, and whole layers; lists of the latter are those of the inputs."""
  q, k, v, dout = inputs
  scale, sizes = shape.head_dim**-0.5, dict(block_size=shape.block_size)
  problem = Problem(q, k, v, blocks, jnp.int32(0), None, None)
  call = mosaic_gpu_call.Call(problem, shape.block_size, scale)
  bounds = jax.jit(call.bounds)(problem)
  rows = []
  if "mosaic" in groups:
    ms = measure(benchmark_layer.dense_in_mosaic, q, k, v)
    rows.append(row("dense forward in Mosaic", ms, ratio=ms / dense[0]))
  passes = {}
  if "selection" in groups:
    passes = benchmark_layer.selection_passes(
      call, bounds, num_blocks=shape.num_blocks, **sizes
    )
  for what, function in passes.items():
    ms = measure(function, q, k)
    rows.append(row(what, ms, ratio=ms / dense[0]))

  def attend(q, k, v, blocks):
    problem = Problem(q, k, v, blocks, jnp.int32(0), None, None)
    return mosaic_gpu.block_sparse_attention(problem, 0, shape.block_size, scale)[0]

  layer = functools.partial(
    benchmark_layer.layer, attend=attend, num_blocks=shape.num_blocks, **sizes
  )
  dual = functools.partial(benchmark_layer.dual_path, **sizes)
  layers = (
    ("sparse layer, forward and backward", layer, (q, k, v, dout)),
    ("dual path, forward and backward", dual, (q, k, v, blocks, dout, dout)),
  )
  for what, function, args in layers if "layers" in groups else ():
    ms = measure(function, *args)
    rows.append(row(what, ms, ratio=ms / sum(dense)))
  return rows


def table(rows: list[Row]) -> str:
  """Rows for people."""
  lines = [f"{'pass':36} {'ms':>9} {'TFLOP/s':>8} {'roofline':>8} {'/ dense':>8}"]
  for r in rows:
    tflops = "" if r.tflops is None else f"{r.tflops:8.0f}"
    roofline = "" if r.roofline is None else f"{r.roofline:8.1%}"
    ratio = "" if r.ratio is None else f"{r.ratio:8.3f}"
    lines.append(f"{r.what:36} {r.ms:9.4f} {tflops:>8} {roofline:>8} {ratio:>8}")
  return "\n".join(lines)


def environment() -> dict:
  """What the numbers depend on."""
  commit = os.environ.get("SPARSEJAX_COMMIT")
  if commit is None:
    root = str(pathlib.Path(__file__).parents[1])
    describe = ["git", "-C", root, "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(describe, capture_output=True, text=True, check=False)
    commit = found.stdout.strip() or "unknown"
  return dict(
    device=jax.devices()[0].device_kind,
    commit=commit,
    command=sys.argv[1:],
    versions={name: metadata.version(name) for name in ("jax", "jaxlib")},
  )


def save(directory: pathlib.Path, name: str, rows: list[Row]) -> pathlib.Path:
  """Writes the rows of a shape, with what they depend on, in a file of their own."""
  directory.mkdir(parents=True, exist_ok=True)
  # "NVIDIA H100 80GB HBM3" -> "h100"
  device = jax.devices()[0].device_kind.split()[:2][-1].lower()
  path = directory / f"{device}_{name}.json"
  content = dict(
    environment=environment(),
    shape=dataclasses.asdict(SHAPES[name]),
    rows=[dataclasses.asdict(r) for r in rows],
  )
  path.write_text(json.dumps(content, indent=1) + "\n")
  return path


def _bandwidth() -> float:
  kind = jax.devices()[0].device_kind
  return next((rate for name, rate in BANDWIDTH.items() if name in kind), 3.35e12)


def main(arguments: list[str] | None = None) -> int:
  """The command line; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m pallas_kernels.benchmark",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("shapes", nargs="*", default=DEFAULT, help=", ".join(SHAPES))
  parser.add_argument("--lists", default="clustered,independent")
  parser.add_argument("--what", default=",".join(GROUPS), help=", ".join(GROUPS))
  parser.add_argument("--turns", help="file that benchmarks side by side lock for the GPU")
  parser.add_argument("--out", default="results/kernels", help="directory to write")
  options = parser.parse_args(arguments)
  unknown = [name for name in options.shapes if name not in SHAPES]
  if unknown:
    parser.error(f"no shape {unknown[0]!r}; there are {', '.join(SHAPES)}")
  groups = options.what.split(",")
  unknown = [name for name in groups if name not in GROUPS]
  if unknown:
    parser.error(f"--what={unknown[0]} is none of {', '.join(GROUPS)}")
  why_not = devices.why_not_hopper()
  if why_not is not None:
    sys.stderr.write(f"error: the benchmark {why_not}\n")
    return 2
  clock = benchmark_clock.Clock(options.turns)
  for name in options.shapes:
    rows = []
    for kind in options.lists.split(","):
      errors = check(SHAPES[name], kind, clock)
      worst = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
      sys.stdout.write(f"\n{name}, {kind} lists; errors: {worst}\n")
      new = run(name, SHAPES[name], kind, groups, clock)
      sys.stdout.write(table(new) + "\n")
      rows += new
    path = save(pathlib.Path(options.out), name, rows)
    sys.stdout.write(f"saved in {path}\n")
    sys.stdout.flush()
  return 0


if __name__ == "__main__":
  sys.exit(main())
