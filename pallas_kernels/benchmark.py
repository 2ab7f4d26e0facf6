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
from importlib import metadata
import json
import os
import pathlib
import subprocess
import sys

import jax

from pallas_kernels import (
  benchmark_check,
  benchmark_clock,
  benchmark_lists,
  benchmark_passes,
  devices,
)
from pallas_kernels.benchmark_passes import GROUPS
from pallas_kernels.benchmark_shape import DEFAULT, SHAPES, Shape, make_inputs

PEAK_FLOPS = 989e12
# Bytes per second by what a device calls itself.
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12}


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


class Compiled:
  """Everything of a shape, compiled; most of the time goes into this.

  Args:
    shape: of the inputs.
    groups: what to measure.
  """

  def __init__(self, shape: Shape, groups: Collection[str]):
    self._shape = shape
    self.check = benchmark_check.Check(shape)
    self._passes = [*benchmark_passes.dense_passes(), *benchmark_passes.passes(shape, groups)]
    shapes, self._timed = benchmark_passes.inputs(shape), {}
    for p in self._passes:
      timed = benchmark_clock.Timed(p.function, *(shapes[name] for name in p.args))
      self._timed[p.what], shapes[p.what] = timed, timed.result_shape

  def rows(self, name: str, kind: str) -> list[Row]:
    """Measures every pass on one kind of lists."""
    shape = self._shape
    q, k, v, dout = make_inputs(shape)
    sizes = dict(block_size=shape.block_size, num_blocks=shape.num_blocks)
    blocks = benchmark_lists.make_lists(kind, q, k, **sizes)
    values = dict(q=q, k=k, v=v, dout=dout, blocks=blocks)
    ms = {}
    for p in self._passes:
      args, timed = [values[name] for name in p.args], self._timed[p.what]
      values[p.what] = timed.result(*args)
      if p.dense is not None or p.what.startswith("dense"):
        ms[p.what] = timed.milliseconds(*args)

    both = ms["dense forward and backward"]
    dense = dict(forward=ms["dense forward"], both=both, backward=both - ms["dense forward"])
    whole = 2.0 * shape.batch * shape.heads * shape.length**2 * shape.head_dim / 2
    rows = [
      Row(name, kind, f"dense {what}", dense[what], n * whole / dense[what] / 1e9)
      for what, n in (("forward", 2), ("backward", 5))
    ]
    pairs = benchmark_lists.num_pairs(blocks, shape.block_size)
    product = 2.0 * pairs * (shape.heads // shape.kv_heads) * shape.head_dim
    for p in self._passes:
      if p.dense is None:
        continue
      row = Row(name, kind, p.what, ms[p.what], ratio=ms[p.what] / dense[p.dense])
      if p.products:
        flops, moved = p.products * product, sum(values[x].nbytes for x in p.moved)
        least = 1e3 * max(flops / PEAK_FLOPS, moved / _bandwidth())
        row = dataclasses.replace(row, tflops=flops / row.ms / 1e9, roofline=least / row.ms)
      rows.append(row)
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
  for name in options.shapes:
    rows, compiled = [], Compiled(SHAPES[name], groups)
    with benchmark_clock.turn(options.turns):
      for kind in options.lists.split(","):
        errors = compiled.check.errors(kind)
        worst = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
        sys.stdout.write(f"\n{name}, {kind} lists; errors: {worst}\n")
        rows += compiled.rows(name, kind)
        sys.stdout.write(table([row for row in rows if row.lists == kind]) + "\n")
        path = save(pathlib.Path(options.out), name, rows)
        sys.stdout.write(f"saved in {path}\n")
        sys.stdout.flush()
  return 0


if __name__ == "__main__":
  sys.exit(main())
