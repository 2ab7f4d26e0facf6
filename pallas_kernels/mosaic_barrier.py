"""Barriers on which single lanes arrive, and the copies that complete them.

A barrier of Pallas counts lanes: at every copy 32 of them arrive, or 128, and twice where a
single warp copies. Arrivals on one barrier are served one after the other by the same
memory that products read their operands from. Copies of a few kilobytes, as kernels with
lists make them, then cost more in arrivals than in bytes. Here one lane speaks for all.

The interpreter knows only Pallas' barriers: there, and where `own` is false, these are used.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, scf

from pallas_kernels import mosaic_inline
from pallas_kernels import mosaic_thread as thread

_PLAIN = plgpu.RefType()
_TILED = plgpu.RefType(mosaic_inline.TRANSFORMS)
_SCALAR = plgpu.Layout.WG_SPLAT
_TILING = mgpu.TileTransform((8, 64))
_SWIZZLE = 128
_WORDS = 2  # of a barrier, 32 bits each


@dataclasses.dataclass(frozen=True)
class Barriers:
  """Barriers that a fixed number of copies completes, again and again.

  Attributes:
    ref: of `scratch`.
    own: whether they are those of this file, or those of Pallas.
    by_warp: whether copies are started by a single warp (in `plgpu.warp_map`), or by a
      warpgroup.
  """

  ref: Any
  own: bool
  by_warp: bool = False

  def copy(self, number, source, index: tuple, target) -> None:
    """Starts to copy `source[index]` in device memory to shared memory.

    Args:
      number: of the barrier.
      source: array in device memory.
      index: of numbers and `pl.ds`, one for each axis.
      target: shared memory of the shape of `source[index]`.
    """
    if not self.own:
      plgpu.copy_gmem_to_smem(source.at[index], target, self.ref.at[number])
      return
    sizes = [i.size if isinstance(i, pl.Slice) else None for i in index]
    starts = [i.start if isinstance(i, pl.Slice) else i for i in index]
    is_tiled = target.dtype == jnp.bfloat16
    refs = _PLAIN, _TILED if is_tiled else _PLAIN, _PLAIN

    @plgpu.inline_mgpu(arg_types=(*refs, *[_SCALAR] * (1 + len(index))), return_type=None)
    def start(context, source, target, barriers, number, *starts):
      barrier = _barrier(barriers, thread.value(number))
      scope = mgpu.ThreadSubset.WARP if self.by_warp else mgpu.ThreadSubset.WARPGROUP
      predicate = mgpu_utils.single_thread_predicate(scope)
      barrier.arrive_expect_tx(_num_bytes(target), predicate=predicate)
      places = [arith.index_cast(ir.IndexType.get(), thread.value(x)) for x in starts]
      context.async_copy(
        src_ref=source,
        dst_ref=target,
        gmem_slice=tuple(
          place if size is None else mgpu.DynamicSlice(place, size)
          for place, size in zip(places, sizes, strict=True)
        ),
        gmem_transform=(_TILING,) if is_tiled else (),
        swizzle=_SWIZZLE if is_tiled else None,
        barrier=barrier,
        arrive=False,
        predicate=predicate,
      )

    start(source, target, self.ref, jnp.int32(number), *map(jnp.int32, starts))

  def wait(self, number, parity) -> None:
    """Waits for the copies.

    Args:
      number: of the barrier.
      parity: of how often it has been completed before these copies.
    """
    if not self.own:
      plgpu.barrier_wait(self.ref.at[number])
      return

    @plgpu.inline_mgpu(arg_types=(_PLAIN, _SCALAR, _SCALAR), return_type=None)
    def wait(context, barriers, number, parity):
      del context
      is_odd = thread.is_equal(thread.value(parity), thread.i32(1))
      _barrier(barriers, thread.value(number)).wait_parity(is_odd)

    wait(self.ref, jnp.int32(number), jnp.int32(parity))


def scratch(num_barriers: int, num_copies: int, own: bool):
  """Shared memory for barriers that `num_copies` complete."""
  if own:
    return plgpu.SMEM((_WORDS * num_barriers,), jnp.int32)
  return plgpu.Barrier(num_arrivals=num_copies, num_barriers=num_barriers)


def initialize(barriers: Sequence[tuple[Any, int]], counters: Sequence[Any]) -> None:
  """Sets up barriers of this file, and counters at 0; the work of one warpgroup.

  Nobody may touch either before all warpgroups have met (`plgpu.barrier_arrive`) after it.

  Args:
    barriers: `scratch` of every kind of barrier, and how many copies complete it.
    counters: see `set_counter`.
  """
  refs = [ref for ref, _ in barriers] + list(counters)

  @plgpu.inline_mgpu(arg_types=(_PLAIN,) * len(refs), return_type=None)
  def run(context, *refs):
    del context
    predicate = mgpu_utils.single_thread_predicate(mgpu.ThreadSubset.WARPGROUP)
    with mgpu_utils.when(predicate):
      for ref, (_, num_copies) in zip(refs, barriers, strict=False):
        for i in range(_length(ref) // _WORDS):
          barrier = _barrier(ref, thread.i32(i))
          nvvm.mbarrier_init(barrier.get_ptr(), thread.i32(num_copies))
      for ref in refs[len(barriers) :]:
        for i in range(_length(ref)):
          thread.store_shared(thread.smem_address(ref), thread.i32(0), offset=4 * i)
      # Copies, too, must find them set up.
      fences = "fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;"
      mgpu_utils.inline_ptx(fences, has_side_effects=True)

  run(*refs)


def set_counter(ref, number, value) -> None:
  """Says how far a warp is; what it read of shared memory before, it needs no more.

  Args:
    ref: int32 shared-memory vector with a place for every warp.
    number: of the warp's place.
    value: not less than before.
  """

  @plgpu.inline_mgpu(arg_types=(_PLAIN, _SCALAR, _SCALAR), return_type=None)
  def store(context, ref, number, value):
    del context
    place = thread.multiply(thread.value(number), 4)
    place = thread.add(thread.smem_address(ref), place)
    mgpu_utils.warp_barrier()
    mgpu_utils.inline_ptx(
      "st.release.cta.shared::cta.b32 [$0], $1;",
      place,
      thread.value(value),
      predicate=thread.is_equal(thread.lane(), thread.i32(0)),
      has_side_effects=True,
    )

  store(ref, jnp.int32(number), jnp.int32(value))


def wait_for_counters(ref, value) -> None:
  """Waits, in a single warp, until all of up to 32 counters have come to `value`."""

  @plgpu.inline_mgpu(arg_types=(_PLAIN, _SCALAR), return_type=None)
  def wait(context, ref, value):
    del context
    num_counters, value = _length(ref), thread.value(value)
    lane = thread.lane()
    # Lanes without a counter read the first one again.
    has_one = thread.is_less(lane, thread.i32(num_counters))
    number = arith.select(has_one, lane, thread.i32(0))
    place = thread.add(thread.smem_address(ref), thread.multiply(number, 4))
    loop = scf.WhileOp([], [])
    with ir.InsertionPoint(loop.before.blocks.append()):
      counter = mgpu_utils.inline_ptx(
        "ld.acquire.cta.shared::cta.b32 $0, [$1];",
        place,
        result_types=thread.int32(),
        has_side_effects=True,
      )
      behind = thread.ballot(thread.is_less(counter, value))
      is_open = arith.cmpi(arith.CmpIPredicate.ne, behind, thread.i32(0))
      scf.condition(is_open, [])
    with ir.InsertionPoint(loop.after.blocks.append()):
      scf.yield_([])

  wait(ref, jnp.int32(value))


def _barrier(ref, number) -> mgpu_utils.BarrierRef:
  return mgpu_utils.BarrierRef(mgpu_utils.memref_ptr(ref), number, None, 1)


def _length(ref) -> int:
  (length,) = ir.MemRefType(ref.type).shape
  return length


def _num_bytes(ref) -> int:
  type_ = ir.MemRefType(ref.type)
  return math.prod(type_.shape) * mgpu_utils.bitwidth(type_.element_type) // 8
