"""The rest of a list, chosen by scores of keys that no query enters (NOSA).

After arXiv:2510.13602: what the queries have chosen is in; of the other blocks, those whose
keys score best. The order of blocks by such scores is the same for all queries of a block,
so it is found once for each block of queries.

Extra shape letters:
  O blocks that queries are in   Q blocks that a query has chosen   C candidates
"""

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import documents
from pallas_kernels.block_selection import plan
from pallas_kernels.block_selection import pooling as poolings
from pallas_kernels.block_selection.problem import Problem, Rules

# Blocks of queries for which candidates are ranked at the same time.
_BLOCKS_AT_ONCE = 256


def fill(
  lists_BTKQ: jax.Array, problem: Problem, rules: Rules, bounds: plan.Bounds
) -> jax.Array:
  """Lists of M blocks: those given, and the best others by `problem.key_score_BSK`."""
  candidates_BOKC, first_block = _candidates(problem, rules)
  b = bounds.own_block.shape[0]
  row_B1 = jnp.arange(b)[:, None]
  candidates_BTKC = candidates_BOKC[row_B1, bounds.own_block - first_block]
  return fill_with(lists_BTKQ, candidates_BTKC, rules, bounds)


def fill_with(
  lists_BTKQ: jax.Array, candidates_BTKC: jax.Array, rules: Rules, bounds: plan.Bounds
) -> jax.Array:
  """Lists of M blocks: those given, and the first of the candidates that are not there yet."""
  num_left = rules.num_blocks - rules.num_by_query
  is_new = candidates_BTKC >= bounds.first_block[:, :, None, None]
  for q in range(rules.num_by_query):
    is_new &= candidates_BTKC != lists_BTKQ[..., q, None]
  place_BTKC = jnp.where(is_new, jnp.cumsum(is_new, axis=-1) - 1, -1)
  # Candidates are distinct, so each place has one.
  slot_X1 = jnp.arange(num_left)[None, None, None, :, None]
  is_chosen_BTKXC = place_BTKC[..., None, :] == slot_X1
  # Added up, where a largest one would be one of constants that XLA keeps in memory.
  chosen_BTKX = (is_chosen_BTKXC * (candidates_BTKC[..., None, :] + 1)).sum(-1) - 1
  return jnp.concatenate([lists_BTKQ, chosen_BTKX], axis=-1)


def block_scores(problem: Problem, rules: Rules) -> jax.Array:
  """The score of every block [B, K, N], over the document of its last key."""
  scores, segments = problem.key_score_BSK, problem.segments_BS
  s = scores.shape[1]
  num_blocks = -(-s // rules.block_size)
  windows_BKW = poolings.mean_windows(scores, segments, rules.pooling).transpose(0, 2, 1)
  if segments is None:
    return scores_of_blocks(windows_BKW, rules, num_blocks)
  # Windows that end before the document are another document's.
  last_N = jnp.minimum((jnp.arange(num_blocks) + 1) * rules.block_size, s) - 1
  first_BN = documents.first_positions(segments)[:, last_N]
  best = jnp.full((scores.shape[0], scores.shape[2], num_blocks), -jnp.inf)
  for i in range(rules.pooling.count):
    one = poolings.Pooling(rules.pooling.size, rules.pooling.stride, rules.pooling.first + i, 1)
    score = poolings.largest_of_windows(windows_BKW, one, rules.per_block, num_blocks, -jnp.inf)
    last_key_N = jnp.arange(num_blocks) * rules.block_size + one.reach() - 1
    is_there_B1N = (last_key_N[None] >= first_BN)[:, None]
    best = jnp.maximum(best, jnp.where(is_there_B1N, score, -jnp.inf))
  return best


def scores_of_blocks(windows_BKW: jax.Array, rules: Rules, num_blocks: int) -> jax.Array:
  """The score of every block [B, K, N] of a single document, from those of its windows."""
  return poolings.largest_of_windows(
    windows_BKW, rules.pooling, rules.per_block, num_blocks, -jnp.inf
  )


def ranked(scores_BKN: jax.Array, own_BO: jax.Array, first_BO: jax.Array, rules: Rules):
  """The best M blocks for queries of each block [B, O, K, C], best first; -1 for none.

  Args:
    scores_BKN: of blocks.
    own_BO: blocks that queries are in.
    first_BO: the first blocks that they may read.
    rules: of the call.
  """
  score = of_seen(scores_BKN, own_BO, first_BO, rules)
  return known(*lax.top_k(score, min(rules.num_blocks, score.shape[-1])))


def of_seen(scores_BKN: jax.Array, own_BO: jax.Array, first_BO: jax.Array, rules: Rules):
  """Scores [B, O, K, N] of the blocks that may be chosen, -inf for others; see `ranked`."""
  block_N = jnp.arange(scores_BKN.shape[-1])[None, None]
  # Nearer blocks are forced; their windows may reach beyond the queries.
  is_seen_BON = block_N <= own_BO[..., None] - rules.num_local
  is_seen_BON = is_seen_BON & (block_N >= first_BO[..., None])
  return jnp.where(is_seen_BON[:, :, None], scores_BKN[:, None], -jnp.inf)


def known(scores: jax.Array, blocks: jax.Array) -> jax.Array:
  """The blocks that have a score; -1 in place of others."""
  return jnp.where(jnp.isneginf(scores), -1, blocks)


def _candidates(problem: Problem, rules: Rules) -> tuple[jax.Array, jax.Array]:
  """The best M blocks for queries of each block [B, O, K, C], best first; -1 for none.

  And the first of the blocks that queries are in; others have no candidates.
  """
  scores_BKN = block_scores(problem, rules)
  b, k, n = scores_BKN.shape
  # The first query may be anywhere in its block.
  num_own = min(n, -(-(problem.q_BTHD.shape[1] - 1) // rules.block_size) + 1)
  first_block = jnp.minimum(problem.query_offset // rules.block_size, n - num_own)
  own_O = first_block + jnp.arange(num_own)
  first_BO = jnp.zeros((b, num_own), jnp.int32)
  if problem.segments_BS is not None:
    starts_O = own_O * rules.block_size
    first_BO = documents.first_positions(problem.segments_BS)[:, starts_O] // rules.block_size

  def rank(part):
    own_O, first_BO = part
    return ranked(scores_BKN, own_O[None], first_BO, rules)

  size = min(num_own, _BLOCKS_AT_ONCE)
  pad = -num_own % size
  own = jnp.pad(own_O, (0, pad)).reshape(-1, size)
  first = jnp.pad(first_BO, [(0, 0), (0, pad)]).reshape(b, -1, size).swapaxes(0, 1)
  parts = lax.map(rank, (own, first)).swapaxes(0, 1)
  return parts.reshape(b, -1, k, parts.shape[-1])[:, :num_own], first_block
