"""The lists of units: valid, sorted, without repeats."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

UNIT = 16
# Larger than any block: what empty slots hold, so that they sort to the end.
NONE = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouping:
  """How the heads of `num_tokens` tokens make units of 16 rows.

  One of the two counts is 1. Units of several tokens may run over the last token.
  """

  num_tokens: int
  tokens_per_unit: int
  units_per_token: int

  @property
  def num_units(self) -> int:
    return -(-self.num_tokens // self.tokens_per_unit) * self.units_per_token


def group(num_tokens: int, num_heads: int) -> Grouping:
  """The grouping for so many heads per key/value head, a power of two up to 32."""
  return Grouping(
    num_tokens=num_tokens,
    tokens_per_unit=max(1, UNIT // num_heads),
    units_per_token=max(1, num_heads // UNIT),
  )


class UnitLists(NamedTuple):
  """Blocks that each unit reads.

  Attributes:
    blocks_RUE: numbers in ascending order, `NONE` where there are no more; E is what the
      unit's tokens list in all, but not more than there are blocks.
    tokens_RUE: bit i says whether the unit's i-th token lists the block.
    first_BU: first key that every token of the unit may see.
    last_BU: last key that every token of the unit may see.
  """

  blocks_RUE: jax.Array
  tokens_RUE: jax.Array
  first_BU: jax.Array
  last_BU: jax.Array


def unit_lists(
  blocks_BTKM: jax.Array,
  first_BT: jax.Array,
  position_T: jax.Array,
  *,
  grouping: Grouping,
  block_size: int,
  num_blocks: int,
) -> UnitLists:
  """Drops what a query does not see, sorts, and joins the lists of a unit's tokens.

  Args:
    blocks_BTKM: block lists in any order, with any numbers.
    first_BT: first key that a query may see: where its document begins.
    position_T: last key that a query may see: its own position.
    grouping: of tokens into units.
    block_size: keys per block.
    num_blocks: N.
  """
  b, t, k, m = blocks_BTKM.shape
  begins_BTKM = blocks_BTKM * block_size
  is_seen_BTKM = (blocks_BTKM >= 0) & (blocks_BTKM < num_blocks)
  is_seen_BTKM &= begins_BTKM <= position_T[None, :, None, None]
  is_seen_BTKM &= begins_BTKM + block_size > first_BT[:, :, None, None]
  blocks_BTKM = jnp.where(is_seen_BTKM, blocks_BTKM, NONE).astype(jnp.int32)

  per_unit = grouping.tokens_per_unit
  num_groups = -(-t // per_unit)
  pad = num_groups * per_unit - t
  blocks_BTKM = jnp.pad(blocks_BTKM, [(0, 0), (0, pad), (0, 0), (0, 0)], constant_values=NONE)
  lists_RUIM = blocks_BTKM.reshape(b, num_groups, per_unit, k, m).transpose(0, 3, 1, 2, 4)
  lists_RUIM = lists_RUIM.reshape(b * k, num_groups, per_unit, m)
  blocks_RUE = sorted_without_repeats(lists_RUIM.reshape(b * k, num_groups, per_unit * m))
  blocks_RUE = blocks_RUE[..., :num_blocks]
  if per_unit == 1:
    tokens_RUE = (blocks_RUE < NONE).astype(jnp.int32)
  else:
    is_listed_RUEI = (lists_RUIM[:, :, None] == blocks_RUE[..., None, None]).any(-1)
    bit_I = jnp.left_shift(1, jnp.arange(per_unit))
    tokens_RUE = jnp.where(is_listed_RUEI, bit_I[None, None, None], 0).sum(-1)
    tokens_RUE = jnp.where(blocks_RUE < NONE, tokens_RUE, 0).astype(jnp.int32)

  first_BU, last_BU = seen_by_all(first_BT, position_T, grouping)
  blocks_RUE, tokens_RUE = (
    jnp.repeat(x, grouping.units_per_token, axis=1) for x in (blocks_RUE, tokens_RUE)
  )
  return UnitLists(blocks_RUE, tokens_RUE, first_BU, last_BU)


def seen_by_all(first_BT, position_T, grouping: Grouping) -> tuple[jax.Array, jax.Array]:
  """`first_BU` and `last_BU` of `UnitLists`."""
  per_unit = grouping.tokens_per_unit
  pad = -len(position_T) % per_unit
  # The tokens that pad the last unit see what the last token sees; they list nothing.
  first_BT = jnp.pad(first_BT, [(0, 0), (0, pad)], mode="edge")
  position_T = jnp.pad(position_T, (0, pad), mode="edge")
  first_BU = first_BT.reshape(len(first_BT), -1, per_unit).max(-1)
  last_U = position_T.reshape(-1, per_unit).min(-1)
  last_BU = jnp.broadcast_to(last_U[None], first_BU.shape)
  first_BU, last_BU = (
    jnp.repeat(x, grouping.units_per_token, axis=1) for x in (first_BU, last_BU)
  )
  return first_BU, last_BU


def sorted_without_repeats(x):
  """The last axis in ascending order, each number once, then `NONE`."""
  # Equal numbers have no order; to keep one, XLA would sort places along with them.
  x = jax.lax.sort(x, is_stable=False)
  is_repeat = jnp.concatenate(
    [jnp.zeros_like(x[..., :1], bool), x[..., 1:] == x[..., :-1]], axis=-1
  )
  return jax.lax.sort(jnp.where(is_repeat, NONE, x), is_stable=False)
