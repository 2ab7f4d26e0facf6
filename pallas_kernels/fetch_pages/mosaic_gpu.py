"""The Hopper kernel: reads and writes pages where they are, be it in host memory.

Pinned host memory is mapped into the GPU's address space, so that ordinary loads and stores of
a thread reach it over the bus; copies by TMA refuse it. What they need is many of them under
way: an entry has a warpgroup to itself, whose threads load 16 bytes at a time, of all arrays,
before the first of them is stored. XLA hands a kernel operands in host memory as they are,
uncopied. Entries without a page cost next to nothing.

Threads are not in the interpreter's reach: there, a page is copied as an array.
"""

import itertools
import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import in_place
from pallas_kernels import mosaic_thread as thread

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)

# Bytes that a thread loads at a time, the most there are in one instruction.
_CHUNK = 16
_THREADS = 128
# Loads of a thread under way, four registers each: keys and values of 16 KiB, and a bias.
_UNDER_WAY = 17

_REF = plgpu.RefType()
_SCALAR = plgpu.Layout.WG_SPLAT


def why_not(stores) -> str | None:
  """Why the kernel cannot take such stores; None if it can."""
  for store in stores:
    if store.dtype not in DTYPES:
      names = ", ".join(jnp.dtype(dtype).name for dtype in DTYPES)
      return f"takes {names}, not {store.dtype.name}"
    if _page_bytes(store) % _CHUNK:
      return f"takes pages of a multiple of {_CHUNK} bytes, not {_page_bytes(store)}"
  return None


def fetch_pages(stores, slots, pages_R, rows_R, interpret=None):
  if interpret:
    return _move("fetch_pages", slots, stores, pages_R, rows_R, interpret)
  return in_place.replace(_fetch, slots, *stores, pages_R, rows_R)


def write_pages(stores, slots, pages_R, rows_R, interpret=None):
  if interpret:
    return _move("write_pages", stores, slots, rows_R, pages_R, interpret)
  return in_place.replace(_write, stores, *slots, rows_R, pages_R)


def _fetch(slots, *others):
  *stores, pages_R, rows_R = others
  return _move("fetch_pages", slots, stores, pages_R, rows_R)


def _write(stores, *others):
  *slots, rows_R, pages_R = others
  return _move("write_pages", stores, slots, rows_R, pages_R)


def _move(name, targets, sources, from_R, to_R, interpret=None):
  """The targets with `targets[to_R[r]] = sources[from_R[r]]` for every entry r.

  Each way has a name of its own, by which the trace of a program tells them apart.
  """
  n, num_sources, num_targets = len(sources), sources[0].shape[0], targets[0].shape[0]
  copy = _copy_arrays if interpret else _copy_bytes

  def body(from_gmem, to_gmem, *arrays_gmem):
    r = lax.axis_index("entry")
    source, target = from_gmem[r], to_gmem[r]
    is_source = (source >= 0) & (source < num_sources)
    is_target = (target >= 0) & (target < num_targets)
    pl.when(is_source & is_target)(
      lambda: copy(arrays_gmem[:n], arrays_gmem[n:], source, target)
    )

  # Pallas aliases an output with what a reference holds: targets that keep their content.
  target_refs = [jax.new_ref(target) for target in targets]
  plgpu.kernel(
    body,
    grid=(to_R.size,),
    grid_names=("entry",),
    kernel_name=name,
    interpret=interpret,
  )(from_R, to_R, *sources, *target_refs)
  return tuple(jax.freeze(ref) for ref in target_refs)


def _copy_arrays(sources_gmem, targets_gmem, source, target) -> None:
  for source_gmem, target_gmem in zip(sources_gmem, targets_gmem, strict=True):
    target_gmem[target] = source_gmem[source]


def _copy_bytes(sources_gmem, targets_gmem, source, target) -> None:
  sizes = [_page_bytes(source_gmem) for source_gmem in sources_gmem]
  refs = (*sources_gmem, *targets_gmem)

  @plgpu.inline_mgpu(arg_types=(*[_REF] * len(refs), _SCALAR, _SCALAR), return_type=None)
  def copy(context, *args):
    del context
    *refs, source, target = args
    numbers = [source] * len(sizes) + [target] * len(sizes)
    addresses = [
      _address(ref, thread.value(number), size)
      for ref, number, size in zip(refs, numbers, 2 * sizes, strict=True)
    ]
    pairs = zip(addresses[: len(sizes)], addresses[len(sizes) :], strict=True)
    # From where, to where, how many bytes further on, and in how many threads.
    moves = [
      (source, target, first * _CHUNK, min(_THREADS, size // _CHUNK - first))
      for (source, target), size in zip(pairs, sizes, strict=True)
      for first in range(0, size // _CHUNK, _THREADS)
    ]
    for batch in itertools.batched(moves, _UNDER_WAY):
      loaded = [_load(source, offset, count) for source, _, offset, count in batch]
      for words, (_, target, offset, count) in zip(loaded, batch, strict=True):
        _store(target, offset, count, words)

  copy(*refs, source, target)


def _page_bytes(x) -> int:
  return math.prod(x.shape[1:]) * jnp.dtype(x.dtype).itemsize


def _address(ref, number, size: int) -> ir.Value:
  """Where this thread's first chunk of a page lies; stores may have more than 2 GiB."""
  i64 = ir.IntegerType.get_signless(64)
  base = llvm.ptrtoint(i64, mgpu_utils.memref_ptr(ref))
  page = arith.muli(arith.extui(i64, number), mgpu_utils.c(size, i64))
  chunk = arith.extui(i64, thread.multiply(mgpu_utils.thread_idx(), _CHUNK))
  return arith.addi(arith.addi(base, page), chunk)


def _load(address, offset: int, count: int) -> tuple[ir.Value, ...]:
  """A chunk; anything in threads from `count` on, which have none."""
  load = f"ld.global.v4.b32 {{$0, $1, $2, $3}}, [$4 + {offset}];"
  if count < _THREADS:
    load = f"{{ .reg .pred p; setp.lt.s32 p, $5, {count}; @p {load} }}"
  return mgpu_utils.inline_ptx(
    load,
    address,
    *[mgpu_utils.thread_idx()] * (count < _THREADS),
    result_types=[thread.int32()] * 4,
    # All loads are to be issued before the first store waits for one of them.
    has_side_effects=True,
  )


def _store(address, offset: int, count: int, words) -> None:
  is_there = thread.is_less(mgpu_utils.thread_idx(), thread.i32(count))
  mgpu_utils.inline_ptx(
    f"st.global.v4.b32 [$0 + {offset}], {{$1, $2, $3, $4}};",
    address,
    *words,
    predicate=is_there if count < _THREADS else None,
    has_side_effects=True,
  )
