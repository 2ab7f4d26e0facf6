"""The definition. Dense, float32, no cleverness: implementations are judged by this file."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_selection.problem import Problem, Rules

# Above every score, below what stands for a block that queries have chosen.
_FORCED, _CHOSEN = 1e30, 1e38


def select_blocks(problem: Problem, rules: Rules) -> jax.Array:
  (b, t, h, _), (_, s, k, _) = problem.q_BTHD.shape, problem.k_BSKD.shape
  segments_BS = problem.segments_BS
  if segments_BS is None:
    segments_BS = jnp.ones((b, s), jnp.int32)
  position_T = jnp.arange(t) + problem.query_offset
  segments_BT = segments_BS[:, position_T]
  pooling, n = rules.pooling, -(-s // rules.block_size)

  share_BWS, seen_BTW = _windows(pooling, segments_BS, position_T)

  # Probabilities of windows, summed over the heads of a group.
  keys_BWKD = problem.window_keys_BWKD
  if keys_BWKD is None or keys_BWKD.shape[1] == 0:
    keys_BWKD = _einsum_f32("bws,bskd->bwkd", share_BWS, problem.k_BSKD)
  q_BTKGD = problem.q_BTHD.reshape(b, t, k, h // k, -1)
  logits_BTKGW = rules.scale * _einsum_f32("btkgd,bwkd->btkgw", q_BTKGD, keys_BWKD)
  logits_BTKGW = jnp.where(seen_BTW[:, :, None, None], logits_BTKGW, -jnp.inf)
  lse_BTKG1 = jax.nn.logsumexp(logits_BTKGW, axis=-1, keepdims=True)
  if rules.normalizer is not None:
    coarse_BTKG1 = _log_normalizer(problem, rules, segments_BS, q_BTKGD)
    lse_BTKG1 = jnp.where(jnp.isneginf(coarse_BTKG1), lse_BTKG1, coarse_BTKG1)
  lse_BTKG1 = jnp.where(jnp.isneginf(lse_BTKG1), 0.0, lse_BTKG1)
  window_BTKW = jnp.exp(logits_BTKGW - lse_BTKG1).sum(-2)

  # Blocks: the largest of their windows, or their weighted sum.
  block_N = jnp.arange(n)
  begin_N = block_N * (rules.block_size // pooling.stride) + pooling.first
  window_W = jnp.arange(share_BWS.shape[1])
  of_block_NW = (window_W[None] >= begin_N[:, None]) & (
    window_W[None] < begin_N[:, None] + pooling.count
  )
  of_block_111NW = of_block_NW[None, None, None]
  if pooling.weights is None:
    score_BTKN = jnp.where(of_block_111NW, window_BTKW[..., None, :], 0.0).max(-1)
  else:
    place_NW = jnp.clip(window_W[None] - begin_N[:, None], 0, pooling.count - 1)
    weight_NW = jnp.where(of_block_NW, jnp.asarray(pooling.weights)[place_NW], 0)
    score_BTKN = _einsum_f32("btkw,nw->btkn", window_BTKW, weight_NW)

  own_T1 = (position_T // rules.block_size)[:, None]
  last_N = jnp.minimum((block_N + 1) * rules.block_size, s) - 1
  same_BTN = segments_BT[:, :, None] == segments_BS[:, last_N][:, None, :]
  is_past_TN, is_own_TN = block_N[None] < own_T1, block_N[None] == own_T1
  visible_BTN = (is_past_TN[None] & same_BTN) | is_own_TN[None]
  first_BT1 = jnp.argmax(visible_BTN, axis=-1, keepdims=True)
  is_local_TN = block_N[None] > own_T1 - rules.num_local
  is_initial_BTN = block_N[None, None] < first_BT1 + rules.num_initial
  forced_BTN = visible_BTN & (is_local_TN[None] | is_initial_BTN)
  score_BTKN = jnp.where(forced_BTN[:, :, None], _FORCED, score_BTKN)
  score_BTKN = jnp.where(visible_BTN[:, :, None], score_BTKN, -jnp.inf)
  if rules.rule == "half_local":
    return _half_local(score_BTKN, own_T1[:, 0], rules.num_blocks)
  lists_BTKQ = top_blocks(score_BTKN, rules.num_by_query)
  if problem.key_score_BSK is None:
    return lists_BTKQ

  # What the queries have chosen, then the best of the rest by scores of keys.
  windows_B1KW = _einsum_f32("bws,bsk->bkw", share_BWS, problem.key_score_BSK)[:, None]
  by_key_BTKN = jnp.stack(
    [
      jnp.where((seen_BTW & of_block_W[None, None])[:, :, None], windows_B1KW, -jnp.inf).max(-1)
      for of_block_W in of_block_NW
    ],
    axis=-1,
  )
  chosen_BTKN = (lists_BTKQ[..., None] == block_N[None, None, None, None]).any(-2)
  score_BTKN = jnp.where(chosen_BTKN, _CHOSEN, by_key_BTKN)
  score_BTKN = jnp.where(visible_BTN[:, :, None], score_BTKN, -jnp.inf)
  return top_blocks(score_BTKN, rules.num_blocks)


def _windows(pooling, segments_BS, position_T):
  """The share that every key has in every window, and which windows a query sees."""
  s = segments_BS.shape[1]
  start_W = jnp.arange(max(1, pooling.num_windows(s))) * pooling.stride
  last_W = start_W + pooling.size - 1
  last_segment_BW = segments_BS[:, jnp.minimum(last_W, s - 1)]
  index_S = jnp.arange(s)
  in_window_WS = (index_S[None] >= start_W[:, None]) & (index_S[None] <= last_W[:, None])
  pooled_BWS = in_window_WS[None] & (last_segment_BW[:, :, None] == segments_BS[:, None, :])
  share_BWS = pooled_BWS / jnp.maximum(pooled_BWS.sum(-1, keepdims=True), 1)
  same_BTW = segments_BS[:, position_T][:, :, None] == last_segment_BW[:, None, :]
  return share_BWS, (last_W[None] <= position_T[:, None])[None] & same_BTW


def _log_normalizer(problem, rules, segments_BS, q_BTKGD):
  """The logarithm of the sum over the windows of the normaliser; -inf where none is seen."""
  position_T = jnp.arange(q_BTKGD.shape[1]) + problem.query_offset
  share_BWS, seen_BTW = _windows(rules.normalizer, segments_BS, position_T)
  keys_BWKD = _einsum_f32("bws,bskd->bwkd", share_BWS, problem.k_BSKD)
  logits_BTKGW = rules.scale * _einsum_f32("btkgd,bwkd->btkgw", q_BTKGD, keys_BWKD)
  logits_BTKGW = jnp.where(seen_BTW[:, :, None, None], logits_BTKGW, -jnp.inf)
  return jax.nn.logsumexp(logits_BTKGW, axis=-1, keepdims=True)


def top_blocks(score_BTKN, num_blocks):
  """Numbers of the best blocks, lower ones first among equals; -1 where the score is -inf."""
  n = score_BTKN.shape[-1]
  best_BTKM, blocks_BTKM = jax.lax.top_k(score_BTKN, min(num_blocks, n))
  blocks_BTKM = jnp.where(jnp.isneginf(best_BTKM), -1, blocks_BTKM).astype(jnp.int32)
  empty = [(0, 0)] * (blocks_BTKM.ndim - 1) + [(0, max(0, num_blocks - n))]
  return jnp.pad(blocks_BTKM, empty, constant_values=-1)


def _half_local(score_BTKN, own_T, num_blocks):
  # The run of num_blocks blocks that the query's own block is in, and all before it.
  run_starts_T1 = (own_T // num_blocks * num_blocks)[:, None]
  is_near_TN = jnp.arange(score_BTKN.shape[-1])[None, :] >= run_starts_T1
  near_BTKN = jnp.where(is_near_TN[None, :, None], score_BTKN, -jnp.inf)
  far_BTKN = jnp.where(is_near_TN[None, :, None], -jnp.inf, score_BTKN)
  halves_BTKM = jnp.concatenate(
    [top_blocks(part, num_blocks // 2) for part in (near_BTKN, far_BTKN)], axis=-1
  )
  # Nothing lies before the first run; there every slot goes to the near blocks.
  is_first_T = own_T < num_blocks
  return jnp.where(
    is_first_T[None, :, None, None], top_blocks(near_BTKN, num_blocks), halves_BTKM
  )


def _einsum_f32(equation, *operands):
  return jnp.einsum(equation, *(x.astype(jnp.float32) for x in operands), precision="highest")
