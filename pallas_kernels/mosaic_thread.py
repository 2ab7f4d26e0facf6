"""Scalars of one CUDA thread, within inline operations of Mosaic GPU."""

from collections.abc import Callable

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf


def int32() -> ir.Type:
  return ir.IntegerType.get_signless(32)


def i32(value: int) -> ir.Value:
  """A constant."""
  return mgpu_utils.c(value, int32())


def add(a, b) -> ir.Value:
  return arith.addi(a, b)


def multiply(a, b: int) -> ir.Value:
  return arith.muli(a, i32(b))


def bits(x, shift: int, mask: int) -> ir.Value:
  """`(x >> shift) & mask`."""
  shifted = arith.shrui(x, i32(shift)) if shift else x
  return arith.andi(shifted, i32(mask))


def value(x: mgpu.FragmentedArray) -> ir.Value:
  """A scalar argument of an inline operation; it may differ between warps and lanes."""
  return x.registers.item()


def scalar(x: ir.Value) -> mgpu.FragmentedArray:
  """An int32 as result of an inline operation."""
  return mgpu.FragmentedArray.splat(x, (), is_signed=True)


def lane() -> ir.Value:
  """Number of the thread in its warp."""
  return bits(mgpu_utils.thread_idx(), 0, 31)


def warp() -> ir.Value:
  """Number of the warp in its warpgroup; only where all threads of the warp take part."""
  return bits(mgpu_utils.warp_idx(), 0, 3)


def smem_address(ref) -> ir.Value:
  """Where a shared-memory array begins, as PTX takes it."""
  return llvm.ptrtoint(int32(), mgpu_utils.memref_ptr(ref))


def load_shared(address, offset: int = 0) -> ir.Value:
  """An int32 of shared memory, `offset` bytes on."""
  return mgpu_utils.inline_ptx(
    f"ld.shared.b32 $0, [$1 + {offset}];",
    address,
    result_types=int32(),
    # Must not move across the waits for what writes there.
    has_side_effects=True,
  )


def store_shared(address, x, predicate=None, offset: int = 0) -> None:
  """Writes an int32 to shared memory, in the threads where `predicate` is true."""
  mgpu_utils.inline_ptx(
    f"st.shared.b32 [$0 + {offset}], $1;",
    address,
    x,
    predicate=predicate,
    has_side_effects=True,
  )


def convergent(ptx: str, *args) -> ir.Value:
  """The int32 result of an instruction that all threads of a warp execute together."""
  return mgpu_utils.inline_ptx(
    ptx, *args, result_types=int32(), has_side_effects=True, convergent=True
  )


def ballot(predicate) -> ir.Value:
  """The lanes of the warp in which it is true, as bits."""
  return convergent("vote.sync.ballot.b32 $0, $1, 0xffffffff;", predicate)


def warpgroup_barrier() -> None:
  """Waits for all threads of the only warpgroup of a block.

  Convergent, which Mosaic's own is not: where the same threads do something before and after
  that one, LLVM gives them a copy of it, for which the other threads of their warp never come.
  """
  mgpu_utils.inline_ptx("bar.sync 1, 128;", has_side_effects=True, convergent=True)


def popcount(x) -> ir.Value:
  return mgpu_utils.inline_ptx("popc.b32 $0, $1;", x, result_types=int32())


def is_less(a, b) -> ir.Value:
  """Of signed numbers."""
  return arith.cmpi(arith.CmpIPredicate.slt, a, b)


def is_equal(a, b) -> ir.Value:
  return arith.cmpi(arith.CmpIPredicate.eq, a, b)


def is_between(x, low, high) -> ir.Value:
  """Whether `low <= x < high`, of signed numbers."""
  return arith.andi(arith.cmpi(arith.CmpIPredicate.sge, x, low), is_less(x, high))


def lower_bits(n) -> ir.Value:
  """The `n` lowest bits set, for n below 32."""
  return arith.subi(arith.shli(i32(1), n), i32(1))


def loop(count: int, body: Callable[[ir.Value, ir.Value], ir.Value], start) -> ir.Value:
  """Carries `start` through `body(i, carry)` for i below `count`."""
  steps = scf.ForOp(i32(0), i32(count), i32(1), [start])
  with ir.InsertionPoint(steps.body):
    scf.YieldOp([body(steps.induction_variable, steps.inner_iter_args[0])])
  return steps.results[0]


def for_lanes(count: int, body: Callable[[ir.Value], None]) -> None:
  """Calls `body(i)` for i below `count`, every 32nd in the same lane."""

  def step(n, carry):
    i = add(multiply(n, 32), lane())
    with mgpu_utils.when(is_less(i, i32(count))):
      body(i)
    return carry

  loop(-(-count // 32), step, i32(0))


def divide(a, b: int) -> tuple[ir.Value, ir.Value]:
  """Quotient and remainder of numbers that are not negative."""
  return arith.divui(a, i32(b)), arith.remui(a, i32(b))


def global_address(ref, index) -> ir.Value:
  """Where the element `index`, counted along all of an array of 32-bit elements, lies."""
  i64 = ir.IntegerType.get_signless(64)
  base = llvm.ptrtoint(i64, mgpu_utils.memref_ptr(ref))
  offset = arith.muli(arith.extui(i64, index), mgpu_utils.c(4, i64))
  return arith.addi(base, offset)


def load_global(ref, index) -> ir.Value:
  """An int32 of device memory that nobody writes."""
  return mgpu_utils.inline_ptx(
    "ld.global.nc.b32 $0, [$1];",
    global_address(ref, index),
    result_types=int32(),
    has_side_effects=True,
  )


def store_global(ref, index, x) -> None:
  address = global_address(ref, index)
  mgpu_utils.inline_ptx("st.global.b32 [$0], $1;", address, x, has_side_effects=True)
