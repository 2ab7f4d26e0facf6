"""What the benchmark measures, pass by pass, each from inputs or results of earlier ones."""

from collections.abc import Callable, Collection, Iterator
import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import benchmark_layer
from pallas_kernels.benchmark_shape import Shape, make_inputs
from pallas_kernels.block_sparse_attention import mosaic_gpu, mosaic_gpu_call, xla
from pallas_kernels.block_sparse_attention.problem import Problem

GROUPS = {  # of what is measured
  "kernels": "each kernel and each making of lists alone",
  "op": "block-sparse attention from its lists on",
  "xla": "the same in XLA, up to 8192 tokens",
  "selection": "block selection, alone and with lists",
  "layers": "a sparse layer, and SSA's dual path",
  "mosaic": "dense attention in Mosaic, which a fused dual path could at best equal",
}
# In XLA, longer ones take minutes, and gigabytes.
_MOST_IN_XLA = 8192
_ATTENDED = ("q", "k", "v", "q")  # arrays as large as what attention reads and writes
_ALL_GRADIENTS = (*_ATTENDED, "q", "k", "v", "dout", "q", "k", "v")


@dataclasses.dataclass(frozen=True)
class Pass:
  """A function by the names of its arguments.

  Attributes:
    what: its name, and that of its result.
    function: of arrays.
    args: names of inputs (q, k, v, dout, blocks) or of passes before it.
    dense: the dense pass that its time is set against: forward, backward or both; None
      where it is not timed.
    products: of queries with the keys that they read, and the like; 0 where it has none.
    moved: names of arrays as large as what it has to read and to write.
  """

  what: str
  function: Callable
  args: tuple[str, ...]
  dense: str | None = None
  products: int = 0
  moved: tuple[str, ...] = ()


def inputs(shape: Shape) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of the inputs by name."""
  q, k, v, dout = jax.eval_shape(lambda: make_inputs(shape))
  blocks = jax.ShapeDtypeStruct((*k.shape[:3], shape.num_blocks), jnp.int32)
  return dict(q=q, k=k, v=v, dout=dout, blocks=blocks)


def dense_passes() -> tuple[Pass, Pass]:
  """cuDNN's causal attention, and the same with gradients."""

  def attend(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

  def gradients(q, k, v, dout):
    return jax.vjp(attend, q, k, v)[1](dout)

  return (
    Pass("dense forward", attend, ("q", "k", "v")),
    Pass("dense forward and backward", gradients, ("q", "k", "v", "dout")),
  )


def passes(shape: Shape, groups: Collection[str]) -> Iterator[Pass]:
  """What is measured of some groups."""
  scale, block_size = shape.head_dim**-0.5, shape.block_size
  arrays = inputs(shape)
  problem = _problem(*(arrays[name] for name in ("q", "k", "v", "blocks")))
  call = mosaic_gpu_call.Call(problem, block_size, scale)
  yield Pass("problem", _problem, ("q", "k", "v", "blocks"))
  yield Pass("bounds", call.bounds, ("problem",))
  if "kernels" in groups:
    yield from _kernels(call)

  def attend(op, q, k, v, blocks):
    return op(_problem(q, k, v, blocks), 0, block_size, scale)[0]

  def gradients(op, q, k, v, blocks, dout):
    return jax.vjp(lambda *x: attend(op, *x, blocks), q, k, v)[1](dout)

  args = "q", "k", "v", "blocks"
  for group, label, module in (("op", "", mosaic_gpu), ("xla", " in XLA", xla)):
    if group not in groups or (group == "xla" and shape.length > _MOST_IN_XLA):
      continue
    op = module.block_sparse_attention
    run = functools.partial(attend, op)
    yield Pass(f"op{label}, forward", run, args, "forward", 2, _ATTENDED)
    run = functools.partial(gradients, op)
    what = f"op{label}, forward and backward"
    yield Pass(what, run, (*args, "dout"), "both", 7, _ALL_GRADIENTS)

  sizes = dict(block_size=block_size, num_blocks=shape.num_blocks)
  if "selection" in groups:
    for what, run in benchmark_layer.selection_passes(call, **sizes).items():
      yield Pass(what, run, ("q", "k", "bounds"), "forward")
  if "layers" in groups:
    run = functools.partial(
      benchmark_layer.layer,
      attend=functools.partial(attend, mosaic_gpu.block_sparse_attention),
      **sizes,
    )
    yield Pass("sparse layer, forward and backward", run, ("q", "k", "v", "dout"), "both")
    run = functools.partial(benchmark_layer.dual_path, block_size=block_size)
    args = "q", "k", "v", "blocks", "dout", "dout"
    yield Pass("dual path, forward and backward", run, args, "both")
  if "mosaic" in groups:
    names = [f"{name} in float16" for name in ("q", "k", "v")]
    for name in names:
      yield Pass(name, lambda x: x.astype(jnp.float16), (name[0],))
    run = benchmark_layer.dense_in_mosaic
    yield Pass("dense forward in Mosaic", run, tuple(names), "forward")


def _problem(q, k, v, blocks) -> Problem:
  return Problem(q, k, v, blocks, jnp.int32(0), None, None)


def _kernels(call: mosaic_gpu_call.Call) -> Iterator[Pass]:
  """Every step of the operation."""

  def make_walk_lists(problem, lists, bounds):
    return call.make_walk_lists(problem, lists[1], bounds)

  def make_lines(q_BTHD, forward):
    out_BVXD, lse_RL = forward
    out_BTHD, lse_BTH = call.packing.unpack(out_BVXD), call.packing.from_lines(lse_RL)
    return mosaic_gpu.backward_lines(call, out_BTHD, lse_BTH, q_BTHD, jnp.zeros_like(lse_BTH))

  tiles, keys = "lists of query tiles", "lists of key tiles"
  yield Pass(tiles, call.make_lists, ("blocks", "bounds"), "forward")
  yield Pass("walk", make_walk_lists, ("problem", tiles, "bounds"))
  yield Pass("packed q", call.packing.pack, ("q",))
  yield Pass("packed dout", call.packing.pack, ("dout",))
  yield Pass("forward", call.forward, ("packed q", "walk"), "forward", 2, _ATTENDED)
  yield Pass("lines", make_lines, ("q", "forward"))
  args = "packed q", "packed dout", "lines", "walk"
  yield Pass("dq", call.dq, args, "backward", 3, ("q", "k", "v", "dout", "q"))
  yield Pass(keys, lambda lists: call.make_key_tiles(lists[0]), (tiles,), "forward")
  yield Pass(
    "numbers",
    lambda lines, dq, bounds: call.line_numbers(lines.lse_RL, dq[1], bounds),
    ("lines", "dq", "bounds"),
  )
  yield Pass(
    "dk dv",
    call.dkv,
    ("packed q", "packed dout", "numbers", "problem", keys),
    "backward",
    4,
    ("q", "k", "v", "dout", "k", "v"),
  )
  yield Pass("dk dv, adding parts", call.add_parts, ("dk dv", keys), "forward")
