"""Scalars of one CUDA thread, within inline operations of Mosaic GPU."""

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm


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
  """Number of the warp in its warpgroup."""
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


def store_shared(address, x, predicate, offset: int = 0) -> None:
  """Writes an int32 to shared memory, in the threads where `predicate` is true."""
  mgpu_utils.inline_ptx(f"st.shared.b32 [$0 + {offset}], $1;", address, x, predicate=predicate)


def convergent(ptx: str, *args) -> ir.Value:
  """The int32 result of an instruction that all threads of a warp execute together."""
  return mgpu_utils.inline_ptx(
    ptx, *args, result_types=int32(), has_side_effects=True, convergent=True
  )
