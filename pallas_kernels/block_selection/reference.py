"""The definition. Dense, float32, no cleverness: implementations are judged by this file."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_selection import ranking


def select_blocks(q_BTHD, k_BTKD, segments_BT, *, block_size, num_blocks, scale, rule):
  (b, t, h, _), k = q_BTHD.shape, k_BTKD.shape[2]
  n = -(-t // block_size)
  if segments_BT is None:
    segments_BT = jnp.ones((b, t), jnp.int32)

  # Mean of the keys that share the document of the block's last key.
  last_N = jnp.minimum(jnp.arange(1, n + 1) * block_size, t) - 1
  last_segment_BN = segments_BT[:, last_N]
  in_block_NT = jnp.arange(n)[:, None] == jnp.arange(t)[None, :] // block_size
  pooled_BNT = in_block_NT[None] & (last_segment_BN[:, :, None] == segments_BT[:, None, :])
  share_BNT = pooled_BNT / pooled_BNT.sum(-1, keepdims=True)
  keys_BNKD = _einsum_f32("bnt,btkd->bnkd", share_BNT, k_BTKD)

  q_BTKGD = q_BTHD.reshape(b, t, k, h // k, -1)
  logits_BTKGN = scale * _einsum_f32("btkgd,bnkd->btkgn", q_BTKGD, keys_BNKD)
  same_BTN = segments_BT[:, :, None] == last_segment_BN[:, None, :]
  own_T = jnp.arange(t) // block_size
  complete_TN = jnp.arange(n)[None, :] < (jnp.arange(t)[:, None] + 1) // block_size
  past_TN = jnp.arange(n)[None, :] < own_T[:, None]
  own_TN = jnp.arange(n)[None, :] == own_T[:, None]

  complete_BTN = complete_TN[None] & same_BTN
  logits_BTKGN = jnp.where(complete_BTN[:, :, None, None], logits_BTKGN, -jnp.inf)
  lse_BTKG1 = jax.nn.logsumexp(logits_BTKGN, axis=-1, keepdims=True)
  lse_BTKG1 = jnp.where(jnp.isneginf(lse_BTKG1), 0.0, lse_BTKG1)
  score_BTKN = jnp.exp(logits_BTKGN - lse_BTKG1).sum(-2)

  score_BTKN = jnp.where((past_TN[None] & same_BTN)[:, :, None], score_BTKN, -jnp.inf)
  score_BTKN = jnp.where(own_TN[None, :, None], jnp.inf, score_BTKN)
  return ranking.choose(score_BTKN, own_T, num_blocks=num_blocks, rule=rule)


def _einsum_f32(equation, *operands):
  return jnp.einsum(equation, *(x.astype(jnp.float32) for x in operands), precision="highest")
