"""What is derived from block lists, against plain loops over tokens and blocks."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_lists import (
  key_tiles,
  mosaic_gpu,
  mosaic_gpu_deal,
  query_tiles,
  units,
)

CASES = {  # T, heads per key head, S, block size, blocks listed
  "one_token_per_unit": (40, 16, 40, 16, 3),
  "four_tokens_per_unit": (37, 4, 37, 16, 2),
  "two_units_per_token": (20, 32, 20, 16, 2),
  "large_blocks": (40, 16, 200, 64, 3),
  "more_slots_than_blocks": (24, 16, 24, 16, 9),
}
# Enough to share out among the parts.
LONG = {"long": (700, 16, 700, 16, 4), "long_and_coarse": (600, 8, 640, 64, 3)}
B, K, UNITS_PER_TILE, KEYS_PER_TILE, PARTS = 2, 2, 4, 192, 5


@functools.cache
def make(case, seed=0):
  """Lists with empty slots, repeats and unseen blocks, and what each token truly reads."""
  t, heads, s, block_size, m = (CASES | LONG)[case]
  rng = np.random.default_rng(seed)
  n = -(-s // block_size)
  blocks = rng.integers(-1, n + 2, size=(B, t, K, m))
  position = s - t + np.arange(t)
  segments = np.cumsum(rng.random((B, s)) < 0.06, axis=1)
  first = np.array([[np.argmax(seg == seg[p]) for p in position] for seg in segments])
  reads = np.zeros((B * K, t, n), bool)
  for row, token, slot in np.ndindex(B * K, t, m):
    b = blocks[row // K, token, row % K, slot]
    begin, end = b * block_size, (b + 1) * block_size
    if 0 <= b < n and begin <= position[token] and end > first[row // K, token]:
      reads[row, token, b] = True
  grouping = units.group(t, heads)

  @jax.jit
  def derive(blocks, first, position):
    lists = units.unit_lists(
      blocks, first, position, grouping=grouping, block_size=block_size, num_blocks=n
    )
    tiles = query_tiles.query_tiles(lists, units_per_tile=UNITS_PER_TILE, num_blocks=n)
    tiling = key_tiles.Tiling(block_size=block_size, num_blocks=n, keys_per_tile=KEYS_PER_TILE)
    has_tokens = grouping.tokens_per_unit > 1
    keys = key_tiles.key_tiles(lists, tiling, num_parts=PARTS, has_tokens=has_tokens)
    return lists, tiles, keys

  derived = jax.device_get(derive(*map(jnp.asarray, (blocks, first, position))))
  return grouping, reads, first, position, derived


def tokens_of(grouping, unit):
  """The tokens whose rows a unit holds."""
  first = unit // grouping.units_per_token * grouping.tokens_per_unit
  return [
    token
    for token in range(first, first + grouping.tokens_per_unit)
    if token < grouping.num_tokens
  ]


def unit_reads(grouping, reads, row, unit):
  """Block -> bits of the unit's tokens that read it."""
  bits = {}
  for i, token in enumerate(tokens_of(grouping, unit)):
    for block in np.flatnonzero(reads[row, token]):
      bits[int(block)] = bits.get(int(block), 0) | 1 << i
  return bits


@pytest.mark.parametrize("case", CASES)
def test_units_list_what_their_tokens_read(case):
  grouping, reads, first, position, (lists, *_) = make(case)
  assert lists.blocks_RUE.shape[1] == grouping.num_units
  for row, unit in np.ndindex(B * K, grouping.num_units):
    expected = unit_reads(grouping, reads, row, unit)
    blocks = lists.blocks_RUE[row, unit]
    found = blocks[blocks < units.NONE].tolist()
    assert found == sorted(expected)
    assert (blocks[len(found) :] == units.NONE).all()
    tokens = lists.tokens_RUE[row, unit]
    assert dict(zip(found, tokens.tolist(), strict=False)) == expected
    assert not tokens[len(found) :].any()
    members = tokens_of(grouping, unit)
    assert lists.first_BU[row // K, unit] == first[row // K, members].max()
    assert lists.last_BU[row // K, unit] == position[members].min()


def test_unions_are_the_same_by_marks_and_by_sorting():
  """Lists with repeats and empty slots, a tile without any, and room for more."""
  n, size = 70, 96
  rng = np.random.default_rng(5)
  listed = rng.integers(0, n, (2, 3, 40))
  listed = np.where(rng.random(listed.shape) < 0.3, units.NONE, listed).astype(np.int32)
  listed[1, 2] = units.NONE
  marked, sorted_ = (
    jax.jit(join, static_argnums=(1, 2))(listed, size, n)
    for join in (query_tiles._by_marks, query_tiles._by_sorting)
  )
  np.testing.assert_array_equal(marked[0], sorted_[0])
  is_block = listed < units.NONE
  np.testing.assert_array_equal(marked[1][is_block], sorted_[1][is_block])


@pytest.mark.parametrize("case", CASES)
def test_query_tiles_hold_the_union_and_places_in_it(case):
  grouping, reads, _, _, (_, tiles, _) = make(case)
  assert tiles.union_RXC.shape[-1] % query_tiles.CHUNK == 0
  assert tiles.entries_RUE.shape[-1] % 8 == 0
  for row, tile in np.ndindex(tiles.count_RX.shape):
    members = range(tile * UNITS_PER_TILE, (tile + 1) * UNITS_PER_TILE)
    expected = [unit_reads(grouping, reads, row, unit) for unit in members]
    union = sorted(set().union(*expected))
    count = tiles.count_RX[row, tile]
    assert tiles.union_RXC[row, tile, :count].tolist() == union
    # Kernels fetch whole stages: what pads them must be a block that is there.
    assert set(tiles.union_RXC[row, tile, count:]) <= {union[-1] if union else 0}
    for unit, bits in zip(members, expected, strict=True):
      entries = tiles.entries_RUE[row, unit].tolist()
      assert entries[: len(bits)] == [b << 16 | union.index(b) for b in sorted(bits)]
      assert len(entries) - len(bits) >= query_tiles.GROUP
      assert set(entries[len(bits) :]) == {query_tiles.END}
      tokens = tiles.tokens_RUE[row, unit, : len(bits)].tolist()
      assert tokens == [bits[b] for b in sorted(bits)]


@pytest.mark.parametrize("case", CASES)
def test_key_tiles_hold_every_unit_that_reads_them_once(case):
  grouping, reads, first, position, (_, _, keys) = make(case)
  _, _, s, block_size, _ = CASES[case]
  per_row = -(-(-(-s // block_size) * block_size) // KEYS_PER_TILE)
  assert len(keys.first_window_X) == B * K * per_row + 1
  for tile in range(B * K * per_row):
    row, begin = tile // per_row, tile % per_row * KEYS_PER_TILE
    expected = {}
    for unit in range(grouping.num_units):
      pieces, tokens = 0, [0] * (KEYS_PER_TILE // 16)
      for block, bits in unit_reads(grouping, reads, row, unit).items():
        for key in range(block * block_size, (block + 1) * block_size, 16):
          if begin <= key < begin + KEYS_PER_TILE:
            pieces |= 1 << (key - begin) // 16
            tokens[(key - begin) // 16] = bits
      if pieces:
        members = tokens_of(grouping, unit)
        sees_all = (first[row // K, members] <= begin).all()
        sees_all &= (position[members] >= begin + KEYS_PER_TILE - 1).all()
        expected[unit] = pieces | (0 if sees_all else key_tiles.EDGE), tokens
    window = slice(*(key_tiles.WINDOW * keys.first_window_X[tile : tile + 2]))
    is_used = keys.pieces_W[window] != 0
    found = keys.units_W[window][is_used].tolist()
    assert sorted(found) == sorted(expected)
    assert keys.pieces_W[window][is_used].tolist() == [expected[unit][0] for unit in found]
    if keys.tokens_WP is not None:
      assert keys.tokens_WP[window][is_used].tolist() == [expected[unit][1] for unit in found]
    # A window that pads its tile names a unit that is there.
    assert (keys.units_W[window] < grouping.num_units).all()


@pytest.mark.parametrize("case", LONG)
def test_parts_cover_every_window_once(case):
  *_, (_, _, keys) = make(case)
  bounds, first_window = keys.bounds_W, keys.first_window_X
  assert bounds[0] == 0
  assert bounds[-1] == first_window[-1] > PARTS
  assert (np.diff(bounds) >= 0).all()
  shares = np.diff(bounds)
  assert shares.max() <= 3 * shares.mean()
  for part in range(PARTS):
    if shares[part]:
      for tile, window in (
        (keys.first_tile_W[part], bounds[part]),
        (keys.last_tile_W[part], bounds[part + 1] - 1),
      ):
        assert first_window[tile] <= window < first_window[tile + 1]
  slots = set()
  for tile, (begin, end) in enumerate(itertools.pairwise(first_window)):
    parts = range(keys.first_part_X[tile], keys.last_part_X[tile] + 1)
    overlapping = [
      part for part in range(PARTS) if max(begin, bounds[part]) < min(end, bounds[part + 1])
    ]
    # A part without work may stand between two that share a tile, but never at its ends.
    assert [w for w in parts if shares[w]] == overlapping
    assert len(overlapping) == 0 or {parts[0], parts[-1]} <= set(overlapping)
    # Each share of a tile has a slot that no other share has.
    new = {tile + part for part in overlapping}
    assert len(new) == len(overlapping)
    assert not slots & new
    slots |= new


def windows_of_first_tile(**tiling):
  """Units and pieces of its windows; queries in a row read one piece of it, then another."""
  t, block_size = 512, 16
  position = np.arange(t)
  blocks = np.stack([position // block_size, np.where(position < 256, 0, 1)], axis=-1)
  lists = units.unit_lists(
    jnp.asarray(blocks[None, :, None]),
    jnp.zeros((1, t), int),
    jnp.asarray(position),
    grouping=units.group(t, 16),
    block_size=block_size,
    num_blocks=t // block_size,
  )
  tiling = key_tiles.Tiling(block_size=block_size, num_blocks=t // block_size, **tiling)
  keys = key_tiles.key_tiles(lists, tiling, num_parts=2, has_tokens=False)
  count = int(keys.first_window_X[1])
  return (np.asarray(x)[: count * 32].reshape(count, 32) for x in (keys.units_W, keys.pieces_W))


def test_windows_share_out_long_runs():
  """A hundred queries in a row that read one piece are spread over all windows."""
  _, pieces = windows_of_first_tile(keys_per_tile=192)
  for piece in (0, 1):
    per_window = (pieces >> piece & 1).sum(1)
    assert per_window.max() - per_window.min() <= 3


def test_windows_in_order_are_filled_one_after_the_other():
  found, pieces = windows_of_first_tile(keys_per_tile=16, in_order=True)
  # The queries of the block itself are among those that read it.
  np.testing.assert_array_equal(found.reshape(-1), np.arange(256))
  assert (pieces & 1 == 1).all()


def test_a_worst_case_too_large_to_number_is_refused():
  lists = units.UnitLists(
    *(jax.ShapeDtypeStruct((64, 2**20, 1), jnp.int32) for _ in range(2)),
    *(jax.ShapeDtypeStruct((64, 2**20), jnp.int32) for _ in range(2)),
  )

  def keys(lists):
    tiling = key_tiles.Tiling(block_size=16, num_blocks=2**16, keys_per_tile=192)
    return key_tiles.key_tiles(lists, tiling, num_parts=2, has_tokens=False)

  with pytest.raises(ValueError, match="too many to number"):
    jax.eval_shape(keys, lists)
  with pytest.raises(ValueError, match="32767; use larger blocks"):
    jax.eval_shape(
      lambda x: query_tiles.query_tiles(x, units_per_tile=16, num_blocks=2**16), lists
    )


ON_GPU = {  # T, heads per key head, S, block size, blocks listed
  "one_token_per_unit": (1000, 16, 1000, 16, 16),
  "two_units_per_token": (333, 32, 500, 32, 5),
  "long_lists": (700, 16, 2000, 16, 70),
  "many_blocks": (2050, 16, 60000, 16, 3),
}


def make_on_gpu(name):
  """Arguments of `units.unit_lists`."""
  t, heads, s, block_size, m = ON_GPU[name]
  rng = np.random.default_rng(0)
  n = -(-s // block_size)
  # Neighbours agree on much, and some lists are empty.
  blocks = rng.integers(-3, n + 3, size=(B, t // 50 + 1, K, m)).repeat(50, axis=1)[:, :t]
  blocks = np.where(rng.random(blocks.shape) < 0.2, rng.integers(0, n, blocks.shape), blocks)
  blocks[:, 200:220] = -1
  position = jnp.asarray(s - t + np.arange(t))
  first = jnp.asarray(rng.integers(0, s - t + 1, size=(B, t)))
  sizes = dict(grouping=units.group(t, heads), block_size=block_size, num_blocks=n)
  return (jnp.asarray(blocks), first, position), sizes


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu_its_kernel_makes_the_same_lists(name):
  arrays, sizes = make_on_gpu(name)
  n = sizes["num_blocks"]

  @jax.jit
  def define(*arrays):
    lists = units.unit_lists(*arrays, **sizes)
    return lists, query_tiles.query_tiles(lists, units_per_tile=12, num_blocks=n)

  lists, tiles = define(*arrays)
  run = jax.jit(functools.partial(mosaic_gpu.lists, units_per_tile=12, **sizes))
  actual_lists, actual_tiles = run(*arrays)
  jax.tree.map(np.testing.assert_array_equal, actual_lists, lists)
  for field in ("count_RX", "entries_RUE", "tokens_RUE"):
    np.testing.assert_array_equal(getattr(actual_tiles, field), getattr(tiles, field), field)
  # Of a union, as much as is ever read.
  groups = -(-tiles.count_RX // query_tiles.GROUP) * query_tiles.GROUP
  is_read = np.arange(tiles.union_RXC.shape[-1]) < np.asarray(groups)[..., None]
  np.testing.assert_array_equal(
    np.where(is_read, actual_tiles.union_RXC, 0), np.where(is_read, tiles.union_RXC, 0)
  )


@pytest.mark.gpu
@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu_its_kernels_deal_the_same_units(name, in_order):
  arrays, sizes = make_on_gpu(name)
  block_size, n = sizes["block_size"], sizes["num_blocks"]
  lists = jax.jit(functools.partial(units.unit_lists, **sizes))(*arrays)
  tiling = key_tiles.Tiling(
    block_size=block_size, num_blocks=n, keys_per_tile=192, in_order=in_order
  )
  expected = jax.jit(lambda x: key_tiles.deal(x, tiling, has_tokens=False))(lists)
  actual = jax.jit(lambda x: mosaic_gpu_deal.deal(x, tiling))(lists)
  for field in ("windows_X", "first_window_X"):
    np.testing.assert_array_equal(getattr(actual, field), getattr(expected, field), field)
  num = int(expected.first_window_X[-1]) * key_tiles.WINDOW
  for field in ("units_W", "pieces_W"):
    values = (getattr(x, field)[:num] for x in (actual, expected))
    np.testing.assert_array_equal(*values, field)
