"""The largest keys of a row, found by all threads of a block; inline operations of Mosaic GPU.

A thread holds every 512th key, and all of them search for the largest threshold that as many
keys reach as are wanted, two bits at a time. What lies above it is taken, and of what equals it
the first ones, so that the choice is exact. (`mosaic_top` is for one warp, where there are rows
for all warps.)
"""

from collections.abc import Callable, Sequence
import dataclasses

from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels import mosaic_thread as thread

WARPGROUPS = 4
THREADS = 128 * WARPGROUPS
_WARPS = THREADS // 32
# Numbers of keys are counted in halves of a word.
MOST_KEYS = 2**14

_GE = arith.CmpIPredicate.uge

# Totals of warps, up to two words each: two that take turns in a loop, those before it, and
# those after it.
_WORDS = 2
_COUNTS = 4 * _WORDS * _WARPS
_BEFORE, _AFTER = 2, 3
# Of votes: above, equal, and both before them; and how many are read at a time.
_BYTES, _AT_ONCE = 12, 8


def num_words(num_keys: int) -> int:
  """Shared memory that `choose` needs, in words."""
  return _COUNTS + 3 * _num_votes(num_keys)


def barrier() -> None:
  """Waits for all threads of the block; Mosaic uses barriers up to 4 with so many of them."""
  ptx = f"bar.sync 8, {THREADS};"
  mgpu_utils.inline_ptx(ptx, has_side_effects=True, convergent=True)


def numbers(num_keys: int) -> list[ir.Value]:
  """The numbers of the keys that the thread at hand holds; from `num_keys` on there is none."""
  count = -(-num_keys // THREADS)
  return [thread.add(mgpu_utils.thread_idx(), thread.i32(THREADS * i)) for i in range(count)]


def choose(
  keys: Sequence[ir.Value], wanted, place, take: Callable[[ir.Value, int, ir.Value], None]
) -> list[ir.Value]:
  """Chooses the largest keys, the first among equals; returns for each whether it is chosen.

  Args:
    keys: at `numbers`, unsigned; 0 for what cannot be chosen.
    wanted: how many at most, an int32 that all threads have.
    place: address of `num_words` words of shared memory. It may be given again at once.
    take: called as `take(is_chosen, i, order)` for keys[i]; the chosen ones are in the order
      of their numbers.
  """
  search = _Search(place)
  threshold = search.threshold(keys, wanted)
  above = [arith.cmpi(arith.CmpIPredicate.ugt, key, threshold) for key in keys]
  equal = [arith.cmpi(arith.CmpIPredicate.eq, key, threshold) for key in keys]
  votes = [(thread.ballot(a), thread.ballot(e)) for a, e in zip(above, equal, strict=True)]
  for i, of_warp in enumerate(votes):
    search.vote(i, of_warp)
  # Its barrier is the votes', too.
  (num_above,) = search.totals([_count(above)], thread.i32(_AFTER))
  num_equal = arith.subi(wanted, num_above)
  search.add_up_votes(len(keys))
  barrier()
  chosen = []
  for i in range(len(keys)):
    before_above, before_equal = search.before(i, votes[i])
    is_first = thread.is_less(before_equal, num_equal)
    is_chosen = arith.ori(above[i], arith.andi(equal[i], is_first))
    take(is_chosen, i, thread.add(before_above, arith.minsi(before_equal, num_equal)))
    chosen.append(is_chosen)
  return chosen


@dataclasses.dataclass(frozen=True)
class _Search:
  """Shared memory: totals of warps; then votes of every warp, and how many go before them.

  Attributes:
    place: address of `num_words` words.
  """

  place: ir.Value

  def threshold(self, keys, wanted):
    """The largest key that `wanted` keys reach; 1 where there are no more than that."""
    i32 = thread.int32()
    ones = [arith.cmpi(arith.CmpIPredicate.ne, key, thread.i32(0)) for key in keys]
    (num_keys,) = self.totals([_count(ones)], thread.i32(_BEFORE))
    start = [thread.i32(0), thread.i32(-1), num_keys, thread.i32(0)]
    loop = scf.WhileOp([i32] * 4, start)
    before = loop.before.blocks.append(*[i32] * 4)
    with ir.InsertionPoint(before):
      low, high, count, turn = before.arguments
      is_wide = arith.cmpi(arith.CmpIPredicate.ugt, arith.subi(high, low), thread.i32(1))
      is_open = arith.andi(is_wide, thread.is_less(wanted, count))
      scf.condition(is_open, [low, high, count, turn])
    after = loop.after.blocks.append(*[i32] * 4)
    with ir.InsertionPoint(after):
      low, high, count, turn = after.arguments
      scf.yield_([*self._narrow(keys, wanted, low, high, count, turn)])
    return arith.maxui(loop.results[0], thread.i32(1))

  def _narrow(self, keys, wanted, low, high, count, turn):
    """A quarter of a range, as many keys as reach its low end, and the next turn."""
    quarter = arith.shrui(arith.subi(high, low), thread.i32(2))
    quarter = arith.maxui(quarter, thread.i32(1))
    # None beyond the high end is enough: those can be tried in vain. None wraps: at the very
    # end of the numbers, quarters leave a range of three, never of two.
    tried, reached = [low], []
    for _ in range(3):
      tried.append(thread.add(tried[-1], quarter))
      reached.append(_count([arith.cmpi(_GE, key, tried[-1]) for key in keys]))
    first, second, third = reached
    packed = thread.add(arith.shli(second, thread.i32(16)), third)
    first, packed = self.totals([first, packed], turn)
    reached = first, thread.bits(packed, 16, 0xFFFF), thread.bits(packed, 0, 0xFFFF)
    for middle, num_reached in zip(tried[1:], reached, strict=True):
      is_enough = arith.cmpi(arith.CmpIPredicate.sge, num_reached, wanted)
      low = arith.select(is_enough, middle, low)
      high = arith.select(is_enough, high, arith.minui(high, middle))
      count = arith.select(is_enough, num_reached, count)
    return low, high, count, arith.xori(turn, thread.i32(1))

  def totals(self, numbers, turn):
    """Sums over all threads. The same `turn` may come again after another barrier."""
    first = thread.add(self.place, thread.multiply(turn, 4 * _WORDS * _WARPS))
    of_warp = thread.add(first, thread.multiply(mgpu_utils.warp_idx(), 4))
    is_first_lane = thread.is_equal(thread.lane(), thread.i32(0))
    for i, x in enumerate(numbers):
      thread.store_shared(of_warp, _add_up(x), is_first_lane, 4 * _WARPS * i)
    barrier()
    own = thread.bits(mgpu_utils.thread_idx(), 0, _WARPS - 1)
    own = thread.add(first, thread.multiply(own, 4))
    is_one = thread.is_less(thread.lane(), thread.i32(_WARPS))
    found = [thread.load_shared(own, 4 * _WARPS * i) for i in range(len(numbers))]
    return [_add_up(arith.select(is_one, x, thread.i32(0))) for x in found]

  def vote(self, i: int, of_warp) -> None:
    """Writes the votes of a warp on its i-th keys."""
    is_first_lane = thread.is_equal(thread.lane(), thread.i32(0))
    for kind, votes in enumerate(of_warp):
      place = thread.add(self._word(i, mgpu_utils.warp_idx()), thread.i32(4 * kind))
      thread.store_shared(place, votes, is_first_lane)

  def add_up_votes(self, num_keys: int) -> None:
    """Counts, for every word of votes, what lies before it: above in the upper half."""
    count = num_keys * _WARPS
    index = mgpu_utils.thread_idx()
    with mgpu_utils.when(thread.is_less(index, thread.i32(count))):

      def add(n, so_far):
        first = thread.multiply(n, _AT_ONCE)
        word = self._word(0, first)
        # All are on their way before one is waited for.
        votes = [
          [thread.load_shared(word, _BYTES * i + 4 * kind) for kind in range(2)]
          for i in range(_AT_ONCE)
        ]
        for i, of_warp in enumerate(votes):
          above, equal = map(thread.popcount, of_warp)
          both = thread.add(arith.shli(above, thread.i32(16)), equal)
          is_before = thread.is_less(thread.add(first, thread.i32(i)), index)
          so_far = thread.add(so_far, arith.select(is_before, both, thread.i32(0)))
        return so_far

      before = thread.loop(count // _AT_ONCE, add, thread.i32(0))
      thread.store_shared(self._word(0, index), before, offset=8)

  def before(self, i: int, votes):
    """How many keys before the thread's i-th one are above, and how many equal."""
    lower = thread.lower_bits(thread.lane())
    both = thread.load_shared(self._word(i, mgpu_utils.warp_idx()), 8)
    above, equal = (thread.popcount(arith.andi(x, lower)) for x in votes)
    above = thread.add(above, arith.shrui(both, thread.i32(16)))
    return above, thread.add(equal, thread.bits(both, 0, 0xFFFF))

  def _word(self, i: int, warp):
    """Where votes of a warp on its i-th keys are: above, equal, and both before them."""
    word = thread.add(warp, thread.i32(i * _WARPS))
    return thread.add(
      self.place, thread.add(thread.multiply(word, _BYTES), thread.i32(4 * _COUNTS))
    )


def _num_votes(num_keys: int) -> int:
  return -(-num_keys // THREADS) * _WARPS


def _count(predicates) -> ir.Value:
  """How many are true, in the thread at hand."""
  total = thread.i32(0)
  for x in predicates:
    total = thread.add(total, arith.extui(thread.int32(), x))
  return total


def _add_up(x):
  """The sum over a warp."""
  return thread.convergent("redux.sync.add.s32 $0, $1, 0xffffffff;", x)
