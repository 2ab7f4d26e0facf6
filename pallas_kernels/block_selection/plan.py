"""Which blocks each query may choose from, how many, and how lists are put together.

All of it is arithmetic with positions; the implementations only choose.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import documents
from pallas_kernels.block_selection.problem import Problem, Rules


class Bounds(NamedTuple):
  """What each query may see, int32 [B, T] each.

  Attributes:
    first_window, end_window: windows that are complete, and end in its document.
    first_block: the first block that ends in its document.
    own_block: the block that it is in.
  """

  first_window: jax.Array
  end_window: jax.Array
  first_block: jax.Array
  own_block: jax.Array


class Span(NamedTuple):
  """A range of blocks, of which the best are chosen; int32 [B, T] each, and a limit.

  Attributes:
    begin, end: blocks from `begin` on and before `end`.
    wanted: how many at most.
    slots: no query wants more than so many.
  """

  begin: jax.Array
  end: jax.Array
  wanted: jax.Array
  slots: int


def bounds(problem: Problem, rules: Rules) -> Bounds:
  b, t = problem.q_BTHD.shape[:2]
  position_T = problem.query_offset + jnp.arange(t, dtype=jnp.int32)
  if problem.segments_BS is None:
    first_BT = jnp.zeros((b, t), jnp.int32)
  else:
    first_BT = documents.first_positions(problem.segments_BS)[:, position_T]
  return bounds_at(jnp.broadcast_to(position_T[None], (b, t)), first_BT, rules)


def bounds_at(position_BT: jax.Array, first_BT: jax.Array, rules: Rules) -> Bounds:
  """The bounds of queries by their positions, and those at which their documents begin."""
  size, stride = rules.pooling.size, rules.pooling.stride
  return Bounds(
    # The first window whose last key is not before the document.
    first_window=-(-jnp.maximum(first_BT - (size - 1), 0) // stride),
    end_window=jnp.maximum(position_BT - size + 1 + stride, 0) // stride,
    first_block=first_BT // rules.block_size,
    own_block=position_BT // rules.block_size,
  )


def spans(bounds: Bounds, rules: Rules) -> list[Span]:
  """What is left to choose when the forced blocks are taken."""
  if rules.rule == "exact":
    begin = bounds.first_block + rules.num_initial
    end = bounds.own_block - (rules.num_local - 1)
    return [Span(begin, end, jnp.full_like(begin, rules.num_free), rules.num_free)]
  # Half of the slots, own block included, for the run of blocks that it is in; in the first
  # run, all of them.
  m = rules.num_blocks
  run = bounds.own_block // m * m
  is_first = bounds.own_block < m
  near = jnp.where(is_first, m - 1, m // 2 - 1)
  far = jnp.where(is_first, 0, m // 2)
  return [
    Span(jnp.maximum(run, bounds.first_block), bounds.own_block, near, m - 1),
    Span(bounds.first_block, run, far, m // 2),
  ]


def assemble(chosen: list[jax.Array], bounds: Bounds, rules: Rules) -> jax.Array:
  """Lists [B, T, K, num_by_query] of forced blocks and of those chosen from each span.

  Args:
    chosen: for each span, [B, T, K, slots], -1 behind those chosen.
    bounds: of the queries.
    rules: of the call.
  """
  forced_BTX = _forced(bounds, rules)
  if rules.rule == "half_local":
    near, far = chosen
    half = rules.num_blocks // 2
    is_first = (bounds.own_block < rules.num_blocks)[:, :, None, None]
    chosen = [near[..., : half - 1], jnp.where(is_first, near[..., half - 1 :], far)]
  b, t, k, _ = chosen[0].shape
  forced_BTKX = jnp.broadcast_to(forced_BTX[:, :, None], (b, t, k, forced_BTX.shape[-1]))
  lists = jnp.concatenate([forced_BTKX, *chosen], axis=-1)
  return lists.astype(jnp.int32)


def _forced(bounds: Bounds, rules: Rules) -> jax.Array:
  """The forced blocks of every query [B, T, X], each once; -1 where there are none."""
  own, first = bounds.own_block[..., None], bounds.first_block[..., None]
  local = own - jnp.arange(rules.num_local)[None, None]
  local = jnp.where(local >= first, local, -1)
  initial = first + jnp.arange(rules.num_initial)[None, None]
  initial = jnp.where(initial <= own - rules.num_local, initial, -1)
  return jnp.concatenate([local, initial], axis=-1)
