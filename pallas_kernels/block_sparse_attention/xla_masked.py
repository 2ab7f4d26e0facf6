"""Every query of a stripe against every key it may see, unlisted ones masked.

Dense matrix products and no gather: the way to go where the lists cover a fair share of the
keys. A stripe is as long as the number of keys a query reads, so memory is O(T x keys read).

Extra shape letters:
  C queries of a stripe   X keys that the last of them may see
"""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import arithmetic


def forward(problem, *, known_offset, block_size, scale):
  outs, lses = [], []
  for stripe in _stripes(problem, known_offset, block_size):
    logits_BKGCX = _logits(problem, stripe, block_size, scale)
    exponentials_BKGCX, total_BKGC, lse_BKGC = arithmetic.softmax(logits_BKGCX)
    v_BXKD = problem.v_BSKD[:, : stripe.num_keys]
    out_BCKGD = arithmetic.weigh("bkgcx,bxkd->bckgd", exponentials_BKGCX, total_BKGC, v_BXKD)
    outs.append(arithmetic.join_heads(out_BCKGD))
    lses.append(lse_BKGC.transpose(0, 3, 1, 2).reshape(*lse_BKGC.shape[::3], -1))
  return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=1)


def backward(problem, lse_BTH, dout_BTHD, dlse_BTH, *, known_offset, block_size, scale):
  q_BTHD, k_BSKD, v_BSKD, *_ = problem
  num_kv_heads = k_BSKD.shape[2]
  dtype = q_BTHD.dtype
  dqs = []
  dk_BSKD, dv_BSKD = (jnp.zeros(x.shape, jnp.float32) for x in (k_BSKD, v_BSKD))
  dbias_BSK = jnp.zeros(k_BSKD.shape[:3], jnp.float32)
  for stripe in _stripes(problem, known_offset, block_size):
    queries, num_keys = slice(stripe.start, stripe.stop), stripe.num_keys
    logits_BKGCX = _logits(problem, stripe, block_size, scale)
    lse_BKGC = arithmetic.heads_first(lse_BTH[:, queries], num_kv_heads)
    dlse_BKGC = arithmetic.heads_first(dlse_BTH[:, queries], num_kv_heads)
    q_BCKGD = arithmetic.split_heads(q_BTHD[:, queries], num_kv_heads)
    dout_BCKGD = arithmetic.split_heads(dout_BTHD[:, queries], num_kv_heads)
    k_BXKD, v_BXKD = k_BSKD[:, :num_keys], v_BSKD[:, :num_keys]

    weights_BKGCX = jnp.exp(logits_BKGCX - arithmetic.finite(lse_BKGC)[..., None])
    dweights_BKGCX = arithmetic.einsum_f32("bckgd,bxkd->bkgcx", dout_BCKGD, v_BXKD)
    dlogits_BKGCX = arithmetic.softmax_gradient(weights_BKGCX, dweights_BKGCX, dlse_BKGC)
    dbias_BXK = dlogits_BKGCX.sum((2, 3)).transpose(0, 2, 1)
    dlogits_BKGCX = dlogits_BKGCX.astype(dtype)
    dq_BCKGD = scale * arithmetic.einsum_f32("bkgcx,bxkd->bckgd", dlogits_BKGCX, k_BXKD)
    dqs.append(arithmetic.join_heads(dq_BCKGD))
    dk_BXKD = scale * arithmetic.einsum_f32("bkgcx,bckgd->bxkd", dlogits_BKGCX, q_BCKGD)
    dv_BXKD = arithmetic.einsum_f32(
      "bkgcx,bckgd->bxkd", weights_BKGCX.astype(dtype), dout_BCKGD
    )
    # Padding, since a sliced .at[].add is a scatter, which crashes XLA's CPU partitioner.
    rest = [(0, 0), (0, k_BSKD.shape[1] - num_keys), (0, 0), (0, 0)]
    dk_BSKD += jnp.pad(dk_BXKD, rest)
    dv_BSKD += jnp.pad(dv_BXKD, rest)
    dbias_BSK += jnp.pad(dbias_BXK, rest[:3])
  return jnp.concatenate(dqs, axis=1), dk_BSKD, dv_BSKD, dbias_BSK


class _Stripe(NamedTuple):
  """Queries `[start, stop)` and the number of keys that any of them may see."""

  start: int
  stop: int
  num_keys: int


def _stripes(problem, known_offset, block_size) -> list[_Stripe]:
  """Stripes as long as the number of keys a query reads."""
  length, num_keys = problem.q_BTHD.shape[1], problem.k_BSKD.shape[1]
  size = min(length, problem.blocks_BTKM.shape[-1] * block_size)
  starts = range(0, length, size)
  stops = [min(start + size, length) for start in starts]
  if known_offset is None:
    return [_Stripe(*ends, num_keys) for ends in zip(starts, stops, strict=True)]
  return [
    _Stripe(start, stop, min(known_offset + stop, num_keys))
    for start, stop in zip(starts, stops, strict=True)
  ]


def _logits(problem, stripe, block_size, scale):
  """Scores of one stripe, -inf where a key is not seen."""
  start, stop, num_keys = stripe
  num_kv_heads = problem.k_BSKD.shape[2]
  q_BCKGD = arithmetic.split_heads(problem.q_BTHD[:, start:stop], num_kv_heads)
  logits_BKGCX = scale * arithmetic.einsum_f32(
    "bckgd,bxkd->bkgcx", q_BCKGD, problem.k_BSKD[:, :num_keys]
  )
  if problem.key_bias_BSK is not None:
    bias_BKX = problem.key_bias_BSK[:, :num_keys].astype(jnp.float32).transpose(0, 2, 1)
    logits_BKGCX += bias_BKX[:, :, None, None]

  numbers_N = jnp.arange(-(-num_keys // block_size))
  blocks_BCKM = problem.blocks_BTKM[:, start:stop]
  listed_BCKN = (blocks_BCKM[..., None] == numbers_N[None, None, None, None]).any(-2)
  seen_BCKX = jnp.repeat(listed_BCKN, block_size, axis=-1)[..., :num_keys]
  position_C = problem.query_offset + jnp.arange(start, stop)
  causal_CX = position_C[:, None] >= jnp.arange(num_keys)[None, :]
  seen_BCKX &= causal_CX[None, :, None, :]
  if problem.segments_BS is not None:
    own_BC = arithmetic.at_positions(problem.segments_BS, position_C)
    same_BCX = own_BC[:, :, None] == problem.segments_BS[:, None, :num_keys]
    seen_BCKX &= same_BCX[:, :, None, :]
  seen_BKCX = seen_BCKX.transpose(0, 2, 1, 3)
  return jnp.where(seen_BKCX[:, :, None], logits_BKGCX, -jnp.inf)
