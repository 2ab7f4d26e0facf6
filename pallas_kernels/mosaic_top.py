"""The best blocks of a query, found by one warp; an inline operation of Mosaic GPU.

A lane holds every 32nd block. Where up to 32 are wanted, all but about so many are ruled
out at once, and each lane finds the rank of one that is left. Otherwise, and where too many
are left, the warp searches for the largest threshold that as many scores reach as are
wanted, bit by bit; what lies above it is taken, and of what equals it the lowest blocks.
Either way the choice is exact, and equal scores are decided for the lower block. Chosen
blocks come out in ascending order.
"""

import dataclasses

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels import mosaic_thread as thread

LANES = 32
# Blocks of a lane that are passed over together where none of them may be chosen.
_GROUP = 4
_SCALAR = plgpu.Layout.WG_SPLAT
_PLAIN = plgpu.RefType()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
  """Where a block's score lies in a row of windows.

  It is the largest of `count` numbers, from number `halo + (block per_block + first) -
  first_window` on, or with weights their sum; those that lie outside of the windows that
  were computed are 0.

  Attributes:
    per_block, first, count: see above.
    weights: of those numbers, positive; None takes the largest.
    halo: numbers of windows before the first one of the segment.
    most_blocks: that a segment can bring.
  """

  per_block: int
  first: int
  count: int
  weights: tuple[int, ...] | None
  halo: int
  most_blocks: int


def choose(
  values_ref, range_ref, kept_ref, count_ref, row, segment, scores: Scores, is_first
) -> None:
  """Chooses among the blocks that are kept and those of a segment; keeps what it chose.

  Behind what is kept, blocks are -1.

  Each warp works on a row of its own: `4 row + warp` of all arrays.

  Args:
    values_ref: float32 shared-memory array [rows, numbers], not negative.
    range_ref: int32 [3, rows]: blocks from the first number on and before the second may be
      chosen, at most the third.
    kept_ref: int32 [2 rows, slots]: blocks in the first half of the rows, scores as bits in
      the second; `slots` is a multiple of 32.
    count_ref: int32 [rows]: how many are kept.
    row: see above.
    segment: int32 scalars `(first_block, end_block, first_window, begin, end)`: the blocks
      that this segment completes, the window of the first number after the halo, and the
      windows that were computed in this tile.
    scores: where scores lie.
    is_first: whether nothing is kept yet, whatever the arrays say.
  """
  num_rows, width = values_ref.shape
  slots = kept_ref.shape[-1]

  @plgpu.inline_mgpu(arg_types=(_PLAIN,) * 4 + (_SCALAR,) * 7, return_type=None)
  def run(context, values_ref, range_ref, kept_ref, count_ref, *scalars):
    del context
    row, first_block, end_block, first_window, begin, end, is_first = map(thread.value, scalars)
    row = thread.add(thread.multiply(row, 4), thread.warp())
    lane = thread.lane()

    range_place = thread.add(thread.smem_address(range_ref), thread.multiply(row, 4))
    low, high, wanted = (thread.load_shared(range_place, 4 * num_rows * i) for i in range(3))
    low, high = arith.maxsi(low, first_block), arith.minsi(high, end_block)
    count_place = thread.add(thread.smem_address(count_ref), thread.multiply(row, 4))
    is_first = thread.is_equal(is_first, thread.i32(1))
    num_kept = arith.select(is_first, thread.i32(0), thread.load_shared(count_place))
    kept_place = thread.add(thread.smem_address(kept_ref), thread.multiply(row, 4 * slots))
    bits_offset = 4 * slots * num_rows
    values_place = thread.add(thread.smem_address(values_ref), thread.multiply(row, 4 * width))

    keys, blocks = [], []
    for i in range(slots // LANES):
      slot = thread.add(lane, thread.i32(LANES * i))
      place = thread.add(kept_place, thread.multiply(slot, 4))
      is_kept = thread.is_less(slot, num_kept)
      # Of numbers that are not negative, the bits ascend as the numbers do; 0 is no number.
      bits = thread.add(thread.load_shared(place, bits_offset), thread.i32(1))
      keys.append(arith.select(is_kept, bits, thread.i32(0)))
      blocks.append(thread.load_shared(place))
    first_own = thread.add(first_block, lane)
    window = thread.add(thread.multiply(first_own, scores.per_block), thread.i32(scores.first))
    number = thread.add(arith.subi(window, first_window), thread.i32(scores.halo))
    row_of_blocks = _Row(
      scores,
      place=thread.add(values_place, thread.multiply(number, 4)),
      first_block=first_block,
      low=low,
      high=high,
      block=arith.subi(first_own, low),
      num_blocks=arith.maxsi(arith.subi(high, low), thread.i32(0)),
      window=arith.subi(window, begin),
      num_windows=arith.maxsi(arith.subi(end, begin), thread.i32(0)),
    )
    num_loads = -(-scores.most_blocks // LANES)
    for i in range(0, num_loads, _GROUP):
      keys += row_of_blocks.keys(range(i, min(i + _GROUP, num_loads)))
    blocks += [thread.add(first_own, thread.i32(LANES * i)) for i in range(num_loads)]

    place = kept_place, bits_offset
    if slots == LANES:
      chosen = _choose_among_few(keys, blocks, wanted, place)
    else:
      chosen = _choose_among_all(keys, blocks, wanted, place)
    first_lane = arith.cmpi(arith.CmpIPredicate.eq, lane, thread.i32(0))
    thread.store_shared(count_place, chosen, first_lane)
    for i in range(slots // LANES):
      slot = thread.add(lane, thread.i32(LANES * i))
      is_behind = arith.cmpi(arith.CmpIPredicate.sge, slot, chosen)
      place = thread.add(kept_place, thread.multiply(slot, 4))
      thread.store_shared(place, thread.i32(-1), is_behind)
    # The last windows go before those of the next segment.
    lane_place = thread.add(values_place, thread.multiply(lane, 4))
    last = thread.load_shared(lane_place, 4 * (width - LANES))
    shifted = arith.subi(lane_place, thread.i32(4 * (LANES - scores.halo)))
    is_last = arith.cmpi(arith.CmpIPredicate.sge, lane, thread.i32(LANES - scores.halo))
    thread.store_shared(shifted, last, is_last)
    mgpu_utils.warp_barrier()

  scalars = (jnp.int32(x) for x in (row, *segment, is_first))
  run(values_ref, range_ref, kept_ref, count_ref, *scalars)


@dataclasses.dataclass(frozen=True)
class _Row:
  """The row of blocks that a warp chooses from, as one lane sees it.

  Attributes:
    scores: where scores lie.
    place: where the first window of the lane's first block lies.
    first_block: of the row.
    low, high: blocks between which may be chosen.
    block: the lane's first block less `low`.
    num_blocks: from `low` on.
    window: the first window of the lane's first block less the first that was computed.
    num_windows: that were computed.
  """

  scores: Scores
  place: ir.Value
  first_block: ir.Value
  low: ir.Value
  high: ir.Value
  block: ir.Value
  num_blocks: ir.Value
  window: ir.Value
  num_windows: ir.Value

  def keys(self, numbers: range) -> list[ir.Value]:
    """The keys of some of the lane's blocks: bits of the score and 1 more, 0 if it is out."""
    i32 = thread.int32()
    first = thread.add(self.first_block, thread.i32(LANES * numbers.start))
    after = thread.add(self.first_block, thread.i32(LANES * numbers.stop))
    is_any = arith.andi(thread.is_less(first, self.high), thread.is_less(self.low, after))
    branch = scf.IfOp(is_any, [i32] * len(numbers), has_else=True)
    with ir.InsertionPoint(branch.then_block):
      scf.yield_([self._key(i) for i in numbers])
    with ir.InsertionPoint(branch.else_block):
      scf.yield_([thread.i32(0)] * len(numbers))
    return list(branch.results)

  def _key(self, i: int) -> ir.Value:
    step = LANES * i * self.scores.per_block
    score = thread.i32(0)
    for j in range(self.scores.count):
      # Compared as unsigned numbers, those below the first are beyond the last.
      is_there = arith.cmpi(
        arith.CmpIPredicate.ult,
        thread.add(self.window, thread.i32(step + j)),
        self.num_windows,
      )
      number = _load_if(is_there, self.place, 4 * (step + j))
      if self.scores.weights is None:
        score = arith.maxui(score, number)
      else:
        score = _add_weighted(score, self.scores.weights[j], number)
    block = thread.add(self.block, thread.i32(LANES * i))
    is_in = arith.cmpi(arith.CmpIPredicate.ult, block, self.num_blocks)
    return arith.select(is_in, thread.add(score, thread.i32(1)), thread.i32(0))


def _choose_among_all(keys, blocks, wanted, place):
  """Writes the `wanted` largest keys and their blocks, ascending by block; their number."""
  return _write(keys, blocks, _threshold(keys, wanted), wanted, place)


def _choose_among_few(keys, blocks, wanted, place):
  """The same for at most 32: what cannot be among them is left out first.

  As many lanes as are wanted have a largest key that reaches a certain bound, so nothing
  below it is chosen; and not many more than are wanted lie above it.
  """
  i32, lane = thread.int32(), thread.lane()
  largest = keys[0]
  for key in keys[1:]:
    largest = arith.maxui(largest, key)
  reached_by = thread.i32(0)
  for j in range(LANES):
    is_larger = arith.cmpi(arith.CmpIPredicate.uge, _of_lane(largest, j), largest)
    reached_by = thread.add(reached_by, arith.extui(i32, is_larger))
  is_enough = arith.cmpi(arith.CmpIPredicate.sge, reached_by, wanted)
  bound = _reduce("max.u32", arith.select(is_enough, largest, thread.i32(0)))
  # Keys of 0 stand for nothing.
  bound = arith.maxui(bound, thread.i32(1))
  votes = [thread.ballot(arith.cmpi(arith.CmpIPredicate.uge, key, bound)) for key in keys]
  num_left = thread.i32(0)
  for vote in votes:
    num_left = thread.add(num_left, thread.popcount(vote))

  branch = scf.IfOp(
    arith.cmpi(arith.CmpIPredicate.sle, num_left, thread.i32(LANES)), [i32], has_else=True
  )
  with ir.InsertionPoint(branch.then_block):
    kept_place, bits_offset = place
    # What was kept lies where this goes: all of it has been read by now.
    mgpu_utils.warp_barrier()
    below, lower_lanes = thread.i32(0), thread.lower_bits(lane)
    for key, block, vote in zip(keys, blocks, votes, strict=True):
      here = thread.add(below, thread.popcount(arith.andi(vote, lower_lanes)))
      here = thread.add(kept_place, thread.multiply(here, 4))
      is_left = arith.cmpi(arith.CmpIPredicate.uge, key, bound)
      thread.store_shared(here, block, is_left)
      thread.store_shared(here, key, is_left, bits_offset)
      below = thread.add(below, thread.popcount(vote))
    mgpu_utils.warp_barrier()
    own = thread.add(kept_place, thread.multiply(lane, 4))
    key = thread.load_shared(own, bits_offset)
    key = arith.select(thread.is_less(lane, num_left), key, thread.i32(0))
    block = thread.load_shared(own)
    rank = thread.i32(0)
    for j in range(LANES):
      # Of equal keys, that of the lower lane comes first: its block is lower.
      is_before = thread.is_less(thread.i32(j), lane)
      least = thread.add(key, arith.select(is_before, thread.i32(0), thread.i32(1)))
      is_larger = arith.cmpi(arith.CmpIPredicate.uge, _of_lane(key, j), least)
      rank = thread.add(rank, arith.extui(i32, is_larger))
    is_key = arith.cmpi(arith.CmpIPredicate.ugt, key, thread.i32(0))
    is_chosen = arith.andi(is_key, thread.is_less(rank, wanted))
    vote = thread.ballot(is_chosen)
    here = thread.popcount(arith.andi(vote, lower_lanes))
    here = thread.add(kept_place, thread.multiply(here, 4))
    mgpu_utils.warp_barrier()
    thread.store_shared(here, block, is_chosen)
    thread.store_shared(here, arith.subi(key, thread.i32(1)), is_chosen, bits_offset)
    mgpu_utils.warp_barrier()
    scf.yield_([thread.popcount(vote)])
  with ir.InsertionPoint(branch.else_block):
    scf.yield_([_choose_among_all(keys, blocks, wanted, place)])
  return branch.results[0]


def _threshold(keys, wanted):
  """The largest key that `wanted` keys reach, or 0 where there are fewer keys.

  Ends early at any threshold that exactly `wanted` reach.
  """
  i32 = thread.int32()
  largest = keys[0]
  for key in keys[1:]:
    largest = arith.maxui(largest, key)
  largest = _reduce("max.u32", largest)
  low, high = thread.i32(0), thread.add(largest, thread.i32(1))
  everything = thread.i32(LANES * len(keys))
  loop = scf.WhileOp([i32, i32, i32], [low, high, everything])
  before = loop.before.blocks.append(i32, i32, i32)
  with ir.InsertionPoint(before):
    low, high, count = before.arguments
    is_wide = arith.cmpi(arith.CmpIPredicate.ugt, arith.subi(high, low), thread.i32(1))
    is_open = arith.andi(is_wide, arith.cmpi(arith.CmpIPredicate.ne, count, wanted))
    scf.condition(is_open, [low, high, count])
  after = loop.after.blocks.append(i32, i32, i32)
  with ir.InsertionPoint(after):
    low, high, count = after.arguments
    # Neither sum nor difference can wrap: keys are below 2**31.
    middle = arith.shrui(thread.add(low, high), thread.i32(1))
    reached = thread.i32(0)
    for key in keys:
      is_reached = arith.cmpi(arith.CmpIPredicate.uge, key, middle)
      reached = thread.add(reached, arith.extui(i32, is_reached))
    reached = _reduce("add.s32", reached)
    is_enough = arith.cmpi(arith.CmpIPredicate.sge, reached, wanted)
    scf.yield_(
      [
        arith.select(is_enough, middle, low),
        arith.select(is_enough, high, middle),
        arith.select(is_enough, reached, count),
      ]
    )
  return loop.results[0]


def _write(keys, blocks, threshold, wanted, place):
  """Writes what is chosen, ascending by block; returns how many there are."""
  kept_place, bits_offset = place
  lower_lanes = thread.lower_bits(thread.lane())

  def rank(is_member, before):
    """Members in lower lanes and before, and all of them up to here."""
    votes = thread.ballot(is_member)
    own = thread.add(before, thread.popcount(arith.andi(votes, lower_lanes)))
    return own, thread.add(before, thread.popcount(votes))

  # A threshold of 0 means that everything there is, is chosen.
  threshold = arith.maxui(threshold, thread.i32(1))
  num_above = thread.i32(0)
  for key in keys:
    votes = thread.ballot(arith.cmpi(arith.CmpIPredicate.ugt, key, threshold))
    num_above = thread.add(num_above, thread.popcount(votes))
  num_equal = arith.subi(wanted, num_above)
  equal, chosen = thread.i32(0), thread.i32(0)
  # What was kept lies where the first of the chosen go: all of it has been read by now.
  mgpu_utils.warp_barrier()
  for key, block in zip(keys, blocks, strict=True):
    is_equal = arith.cmpi(arith.CmpIPredicate.eq, key, threshold)
    order, equal = rank(is_equal, equal)
    is_first = arith.cmpi(arith.CmpIPredicate.slt, order, num_equal)
    is_above = arith.cmpi(arith.CmpIPredicate.ugt, key, threshold)
    is_chosen = arith.ori(is_above, arith.andi(is_equal, is_first))
    place, chosen = rank(is_chosen, chosen)
    place = thread.add(kept_place, thread.multiply(place, 4))
    thread.store_shared(place, block, is_chosen)
    bits = arith.subi(key, thread.i32(1))
    thread.store_shared(place, bits, is_chosen, bits_offset)
  mgpu_utils.warp_barrier()
  return chosen


def _of_lane(x, lane: int):
  ptx = f"shfl.sync.idx.b32 $0, $1, {lane}, 0x1f, 0xffffffff;"
  return thread.convergent(ptx, x)


def _load_if(predicate, address, offset: int):
  """An int32 of shared memory, 0 where the predicate is false."""
  return mgpu_utils.inline_ptx(
    f"{{ mov.b32 $0, 0; @$1 ld.shared.b32 $0, [$2 + {offset}]; }}",
    predicate,
    address,
    result_types=thread.int32(),
    has_side_effects=True,
  )


def _add_weighted(total, weight: int, x):
  """`total + weight * x`, of the bits of float32 numbers."""
  f32 = ir.F32Type.get()
  total, x = (arith.bitcast(f32, bits) for bits in (total, x))
  product = arith.mulf(x, arith.constant(f32, float(weight)))
  return arith.bitcast(thread.int32(), arith.addf(total, product))


def _reduce(how: str, x):
  return thread.convergent(f"redux.sync.{how} $0, $1, 0xffffffff;", x)


def choose_interpreted(
  values_ref, range_ref, kept_ref, count_ref, row, segment, scores, is_first
) -> None:
  """The same in the interpreter, for the four warps of a warpgroup."""
  first_block, end_block, first_window, begin, end = segment
  num_rows, slots = values_ref.shape[0], kept_ref.shape[-1]
  block = first_block + jnp.arange(scores.most_blocks)
  window = block[:, None] * scores.per_block + scores.first + jnp.arange(scores.count)[None]
  is_there = (window >= begin) & (window < end)
  number = jnp.where(is_there, window - first_window + scores.halo, 0)
  for warp in range(4):
    r = 4 * row + warp
    values = values_ref[r, :]
    # What was not computed may be anything.
    numbers = jnp.where(is_there, jnp.take(values, number, mode="clip"), 0.0)
    if scores.weights is None:
      score = numbers.max(axis=1)
    else:
      score = sum(weight * numbers[:, j] for j, weight in enumerate(scores.weights))
    low = jnp.maximum(range_ref[0, r], first_block)
    high = jnp.minimum(range_ref[1, r], end_block)
    kept, bits = kept_ref[r, :], kept_ref[num_rows + r, :]
    is_kept = jnp.arange(slots) < jnp.where(is_first, 0, count_ref[r])
    keys = jnp.concatenate(
      [
        jnp.where(is_kept, bits + 1, 0),
        jnp.where((block >= low) & (block < high), _bits(score) + 1, 0),
      ]
    )
    blocks = jnp.concatenate([kept, block])
    top, order = lax.top_k(keys, slots)
    is_chosen = (top > 0) & (jnp.arange(slots) < range_ref[2, r])
    order = jnp.where(is_chosen, order, 2**30)
    order = jnp.sort(order)
    is_chosen = order < 2**30
    order = jnp.where(is_chosen, order, 0)
    kept_ref[r, :] = jnp.where(is_chosen, blocks[order], -1)
    kept_ref[num_rows + r, :] = jnp.where(is_chosen, keys[order] - 1, 0)
    count_ref[r] = is_chosen.sum().astype(jnp.int32)
    values_ref[r, pl.ds(0, scores.halo)] = values[-scores.halo :]


def _bits(x):
  return lax.bitcast_convert_type(x, jnp.int32)
