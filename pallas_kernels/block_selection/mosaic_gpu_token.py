"""The Hopper kernel for single tokens: a block of threads makes the list of a row and head.

It takes probabilities of windows and does the rest: adds them up over heads, scores
blocks, ranks them, and puts lists together (see `of_token`). As XLA's operations these are some
ten kernels, a sort of all blocks among them.

Extra shape letter:
  G query heads of a key head
"""

import dataclasses
import math

import jax
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import mosaic_block_top as top
from pallas_kernels import mosaic_thread as thread
from pallas_kernels.block_selection.problem import Rules

# Numbers of a row's windows are held in shared memory.
_MOST_WINDOWS = 50_000
# Positions among an array's elements are int32.
_MOST_ELEMENTS = 2**31 - 1

_PLAIN = plgpu.RefType()
_SCALAR = plgpu.Layout.WG_SPLAT
_MINUS_INFINITY = -(2**23)  # as bits


def why_not(shape_BKGW: tuple[int, ...], num_blocks: int) -> str | None:
  """Why the kernel cannot take such probabilities; None if it can.

  Args:
    shape_BKGW: of the probabilities.
    num_blocks: that a row has.
  """
  w, size = shape_BKGW[-1], math.prod(shape_BKGW)
  if not 0 < w <= _MOST_WINDOWS:
    return f"takes 1 to {_MOST_WINDOWS:,d} windows of a row, not {w:,d}"
  if num_blocks > top.MOST_KEYS:
    return f"takes at most {top.MOST_KEYS:,d} blocks of a row, not {num_blocks:,d}"
  if size > _MOST_ELEMENTS:
    return f"takes fewer than 2**31 probabilities of windows, not {size:,d}"
  return None


def lists(
  window_BKGW: jax.Array | None,
  window_score_BKW: jax.Array | None,
  position_B: jax.Array,
  rules: Rules,
  num_blocks: int,
  num_heads: int,
) -> jax.Array:
  """See `xla_token.lists`; what is chosen of each range, and by key, ascends."""
  if window_score_BKW is not None and window_score_BKW.shape[2] == 0:
    # The kernel reads a first one, whatever it counts for.
    window_score_BKW = jnp.full((*window_score_BKW.shape[:2], 1), -jnp.inf)
  row = _Row(
    rules=rules,
    num_blocks=num_blocks,
    num_heads=num_heads,
    num_groups=0 if window_BKGW is None else window_BKGW.shape[2],
    num_windows=0 if window_BKGW is None else window_BKGW.shape[3],
    num_scored=0 if window_score_BKW is None else window_score_BKW.shape[2],
  )
  arrays = [x for x in (window_BKGW, window_score_BKW) if x is not None]
  b, m = position_B.shape[0], rules.num_blocks

  def body(*refs):
    @plgpu.inline_mgpu(arg_types=(_PLAIN,) * len(refs) + (_SCALAR,), return_type=None)
    def run(context, position, *rest):
      del context
      *read, out, shared, number = rest
      windows = None if window_BKGW is None else read.pop(0)
      scores = None if window_score_BKW is None else read.pop(0)
      _Work(row, thread.value(number), position, windows, scores, out, shared).run()

    run(*refs, jnp.int32(lax.axis_index("row")))

  return plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct((b, num_heads, m), jnp.int32),
    grid=(b * num_heads,),
    grid_names=("row",),
    num_threads=top.WARPGROUPS,
    thread_name="warpgroup",
    kernel_name="list_of_token",
    scratch_types=[plgpu.SMEM((row.num_windows + top.num_words(num_blocks),), jnp.int32)],
  )(position_B, *arrays)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
  """Sizes of a call.

  Attributes:
    rules, num_blocks: see `xla_token.lists`.
    num_heads, num_groups, num_windows: K, G and W.
    num_scored: windows that have scores.
  """

  rules: Rules
  num_blocks: int
  num_heads: int
  num_groups: int
  num_windows: int
  num_scored: int

  @property
  def num_forced(self) -> int:
    return self.rules.num_initial + self.rules.num_local


@dataclasses.dataclass(frozen=True)
class _Work:
  """A block of threads at work on a row and head.

  Attributes:
    row: sizes.
    number: of the row and head.
    position, windows, key_scores: what is read of device memory; None is not there.
    blocks: the list, which is written.
    shared: words of shared memory.
  """

  row: _Row
  number: ir.Value
  position: object
  windows: object
  key_scores: object
  blocks: object
  shared: object

  def run(self) -> None:
    own_block = self._own_block()
    self._force(own_block)
    if self.windows is not None:
      self._add_up_heads()
    # What has been written of the list, too, comes before what is chosen.
    top.barrier()
    chosen = []
    if self.windows is not None:
      scores = [self._score(block) for block in self._numbers]
      for begin, end, wanted, slot in self._spans(own_block):
        chosen.append(self._choose(self._within(scores, begin, end), wanted, slot))
    if self.key_scores is not None:
      is_listed = [_any(of_block) for of_block in zip(*chosen, strict=True)]
      keys = [self._key_by_key(block, own_block) for block in self._numbers]
      if is_listed:
        none = thread.i32(0)
        keys = [arith.select(x, none, key) for x, key in zip(is_listed, keys, strict=True)]
      rules = self.row.rules
      left = rules.num_blocks - rules.num_by_query
      self._choose(keys, thread.i32(left), rules.num_by_query)

  @property
  def _numbers(self) -> list[ir.Value]:
    return top.numbers(self.row.num_blocks)

  def _own_block(self):
    row, _ = thread.divide(self.number, self.row.num_heads)
    block, _ = thread.divide(thread.load_global(self.position, row), self.row.rules.block_size)
    return block

  def _force(self, own_block) -> None:
    """Writes the forced blocks, and -1 behind them."""
    rules, index = self.row.rules, mgpu_utils.thread_idx()
    for first in range(0, rules.num_blocks, top.THREADS):
      slot = thread.add(index, thread.i32(first))
      local = arith.subi(own_block, slot)
      initial = arith.subi(slot, thread.i32(rules.num_local))
      farthest = arith.subi(own_block, thread.i32(rules.num_local))
      is_there = arith.cmpi(arith.CmpIPredicate.sle, initial, farthest)
      is_there = arith.andi(is_there, thread.is_less(slot, thread.i32(self.row.num_forced)))
      initial = arith.select(is_there, initial, thread.i32(-1))
      is_local = thread.is_less(slot, thread.i32(rules.num_local))
      block = arith.select(is_local, arith.maxsi(local, thread.i32(-1)), initial)
      with mgpu_utils.when(thread.is_less(slot, thread.i32(rules.num_blocks))):
        self._put(slot, block)

  def _add_up_heads(self) -> None:
    g, w = self.row.num_groups, self.row.num_windows
    first = thread.multiply(self.number, g * w)
    for step in range(0, w, top.THREADS):
      window = thread.add(mgpu_utils.thread_idx(), thread.i32(step))
      with mgpu_utils.when(thread.is_less(window, thread.i32(w))):
        start = thread.add(first, window)
        heads = [
          thread.load_global(self.windows, thread.add(start, thread.i32(i * w)))
          for i in range(g)
        ]
        total = _as_float(heads[0])
        for x in heads[1:]:
          total = arith.addf(total, _as_float(x))
        thread.store_shared(self._address(window), _as_bits(total))

  def _score(self, block):
    """The bits of a block's score, which is not negative, and 1 more."""
    pooling, score = self.row.rules.pooling, None
    for j in range(pooling.count):
      window = thread.add(
        thread.multiply(block, self.row.rules.per_block), thread.i32(pooling.first + j)
      )
      is_there = thread.is_between(window, thread.i32(0), thread.i32(self.row.num_windows))
      window = arith.select(is_there, window, thread.i32(0))
      bits = thread.load_shared(self._address(window))
      bits = arith.select(is_there, bits, thread.i32(0))
      if pooling.weights is None:
        score = bits if score is None else arith.maxui(score, bits)
      else:
        weight = arith.constant(ir.F32Type.get(), float(pooling.weights[j]))
        term = arith.mulf(weight, _as_float(bits))
        score = _as_bits(term if score is None else arith.addf(_as_float(score), term))
    return thread.add(score, thread.i32(1))

  def _spans(self, own_block):
    """See `plan.spans` and `plan.assemble`: begin, end, how many, and the first slot."""
    rules = self.row.rules
    if rules.rule == "exact":
      end = arith.subi(own_block, thread.i32(rules.num_local - 1))
      begin, wanted = thread.i32(rules.num_initial), thread.i32(rules.num_free)
      return [(begin, end, wanted, self.row.num_forced)]
    m = rules.num_blocks
    run = thread.multiply(thread.divide(own_block, m)[0], m)
    is_first = thread.is_less(own_block, thread.i32(m))
    near = arith.select(is_first, thread.i32(m - 1), thread.i32(m // 2 - 1))
    far = arith.select(is_first, thread.i32(0), thread.i32(m // 2))
    return [(run, own_block, near, 1), (thread.i32(0), run, far, m // 2)]

  def _within(self, scores, begin, end):
    """The keys of blocks of a range, and 0 for others."""
    end = arith.minsi(end, thread.i32(self.row.num_blocks))
    return [
      arith.select(thread.is_between(block, begin, end), score, thread.i32(0))
      for block, score in zip(self._numbers, scores, strict=True)
    ]

  def _key_by_key(self, block, own_block):
    """A key that ascends with the score by keys; 0 for what is forced, not seen, or -inf."""
    pooling, score = self.row.rules.pooling, None
    first = thread.multiply(self.number, self.row.num_scored)
    for j in range(pooling.count):
      window = thread.add(
        thread.multiply(block, self.row.rules.per_block), thread.i32(pooling.first + j)
      )
      is_there = thread.is_between(window, thread.i32(0), thread.i32(self.row.num_scored))
      window = arith.select(is_there, window, thread.i32(0))
      bits = thread.load_global(self.key_scores, thread.add(first, window))
      number = _as_float(arith.select(is_there, bits, thread.i32(_MINUS_INFINITY)))
      score = number if score is None else arith.maximumf(score, number)
    bits = _as_bits(score)
    sign = arith.shrsi(bits, thread.i32(31))
    # Descending bits of negative numbers turned around, all of them behind the others.
    key = arith.xori(bits, arith.ori(sign, thread.i32(-(2**31))))
    rules = self.row.rules
    end = arith.subi(own_block, thread.i32(rules.num_local - 1))
    end = arith.minsi(end, thread.i32(self.row.num_blocks))
    is_free = thread.is_between(block, thread.i32(rules.num_initial), end)
    is_number = arith.cmpi(arith.CmpIPredicate.ne, bits, thread.i32(_MINUS_INFINITY))
    return arith.select(arith.andi(is_free, is_number), key, thread.i32(0))

  def _choose(self, keys, wanted, slot: int) -> list[ir.Value]:
    """Writes the best blocks from a slot on."""

    def take(is_chosen, i, order):
      with mgpu_utils.when(is_chosen):
        self._put(thread.add(order, thread.i32(slot)), self._numbers[i])

    place = self._address(thread.i32(self.row.num_windows))
    return top.choose(keys, wanted, place, take)

  def _address(self, index):
    return thread.add(thread.smem_address(self.shared), thread.multiply(index, 4))

  def _put(self, slot, block) -> None:
    first = thread.multiply(self.number, self.row.rules.num_blocks)
    thread.store_global(self.blocks, thread.add(first, slot), block)


def _any(predicates):
  found, *others = predicates
  for x in others:
    found = arith.ori(found, x)
  return found


def _as_float(bits):
  return arith.bitcast(ir.F32Type.get(), bits)


def _as_bits(x):
  return arith.bitcast(thread.int32(), x)
