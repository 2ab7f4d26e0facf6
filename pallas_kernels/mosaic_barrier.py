"""Barriers on which single lanes arrive, and the copies that complete them.

A barrier of Pallas counts lanes: at every copy 32 of them arrive, or 128, and twice where a
single warp copies. Arrivals on one barrier are served one after the other by the same
memory that products read their operands from. Copies of a few kilobytes, as kernels with
lists make them, then cost more in arrivals than in bytes. Here one lane speaks for all.

The interpreter knows only Pallas' barriers: there, where `own` is false, these are used.
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

# An array in device memory, an index into it of numbers and `pl.ds`, one for each axis, and
# shared memory of the shape that this gives.
type Copy = tuple[Any, tuple, Any]


@dataclasses.dataclass(frozen=True)
class Barriers:
  """Barriers that a fixed number of calls of `copy` completes, again and again.

  Attributes:
    ref: of `scratch`.
    own: whether they are those of this file, or those of Pallas.
    by_warp: whether copies are started by a single warp (in `plgpu.warp_map`), or by a
      warpgroup.
  """

  ref: Any
  own: bool
  by_warp: bool = False

  def copy(self, number, copies: Sequence[Copy]) -> None:
    """Starts to copy from device memory to shared memory.

    Args:
      number: of the barrier.
      copies: what to copy, from where, to where.
    """
    if not self.own:
      for source, index, target in copies:
        plgpu.copy_gmem_to_smem(source.at[index], target, self.ref.at[number])
      return
    refs = [ref for source, _, target in copies for ref in (source, target)]
    ref_types = [
      kind
      for _, _, target in copies
      for kind in (_PLAIN, _TILED if _is_tiled(target) else _PLAIN)
    ]
    starts = [
      i.start if isinstance(i, pl.Slice) else i for _, index, _ in copies for i in index
    ]
    arg_types = (_PLAIN, _SCALAR, *ref_types, *[_SCALAR] * len(starts))

    @plgpu.inline_mgpu(arg_types=arg_types, return_type=None)
    def start(context, barriers, number, *args):
      refs, starts = list(args[: 2 * len(copies)]), list(args[2 * len(copies) :])
      barrier = _barrier(barriers, thread.value(number))
      scope = mgpu.ThreadSubset.WARP if self.by_warp else mgpu.ThreadSubset.WARPGROUP
      predicate = mgpu_utils.single_thread_predicate(scope)
      num_bytes = sum(_num_bytes(target) for target in refs[1::2])
      barrier.arrive_expect_tx(num_bytes, predicate=predicate)
      for _, index, target in copies:
        source_ref, target_ref = refs.pop(0), refs.pop(0)
        is_tiled = _is_tiled(target)
        context.async_copy(
          src_ref=source_ref,
          dst_ref=target_ref,
          gmem_slice=tuple(_slice(i, starts.pop(0)) for i in index),
          gmem_transform=(_TILING,) if is_tiled else (),
          swizzle=_SWIZZLE if is_tiled else None,
          barrier=barrier,
          arrive=False,
          predicate=predicate,
        )

    start(self.ref, jnp.int32(number), *refs, *map(jnp.int32, starts))

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
  """Shared memory for barriers that `num_copies`, in one call or several, complete."""
  if own:
    return plgpu.SMEM((_WORDS * num_barriers,), jnp.int32)
  return plgpu.Barrier(num_arrivals=num_copies, num_barriers=num_barriers)


def initialize(barriers: Sequence[tuple[Any, int]], counters: Sequence[Any]) -> None:
  """Sets up barriers of this file, and counters at 0; the work of one warpgroup.

  Nobody may touch either before all warpgroups have met (`plgpu.barrier_arrive`) after it.

  Args:
    barriers: `scratch` of every kind of barrier, and how many calls of `copy` complete it.
    counters: see `set_counter`.
  """
  refs = [ref for ref, _ in barriers] + list(counters)

  @plgpu.inline_mgpu(arg_types=(_PLAIN,) * len(refs), return_type=None)
  def run(context, *refs):
    del context
    predicate = mgpu_utils.single_thread_predicate(mgpu.ThreadSubset.WARPGROUP)
    with mgpu_utils.when(predicate):
      for ref, (_, num_calls) in zip(refs, barriers, strict=False):
        for i in range(_length(ref) // _WORDS):
          barrier = _barrier(ref, thread.i32(i))
          nvvm.mbarrier_init(barrier.get_ptr(), thread.i32(num_calls))
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
    # The accesses of a warp to shared memory happen in their order: this one after the reads
    # before it. A release would wait for all that the warp has under way, elsewhere too.
    mgpu_utils.warp_barrier()
    mgpu_utils.inline_ptx(
      "st.volatile.shared::cta.b32 [$0], $1;",
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


def _is_tiled(target) -> bool:
  """Whether shared memory is laid out for products, as all of bfloat16 is."""
  return target.dtype == jnp.bfloat16


def _slice(index, start):
  start = arith.index_cast(ir.IndexType.get(), thread.value(start))
  return mgpu.DynamicSlice(start, index.size) if isinstance(index, pl.Slice) else start


def _length(ref) -> int:
  (length,) = ir.MemRefType(ref.type).shape
  return length


def _num_bytes(ref) -> int:
  type_ = ir.MemRefType(ref.type)
  return math.prod(type_.shape) * mgpu_utils.bitwidth(type_.element_type) // 8
