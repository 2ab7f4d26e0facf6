"""Every query of a stripe against every key up to the stripe's end, unlisted ones masked.

Dense matrix products and no gather: the way to go where the lists cover a fair share of the
keys. A stripe is as long as the number of keys a query reads, so memory is O(T x keys read).

Extra shape letters:
  C queries of a stripe   X keys of a stripe
"""

import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import arithmetic


def _stripes(q_BTHD, blocks_BTKM, block_size):
  """Static `(start, stop)` of stripes as long as the number of keys a query reads."""
  length = q_BTHD.shape[1]
  stripe = min(length, blocks_BTKM.shape[-1] * block_size)
  return [(start, min(start + stripe, length)) for start in range(0, length, stripe)]


def forward(q_BTHD, k_BSKD, v_BSKD, blocks_BTKM, segments_BT, *, block_size, scale):
  outs, lses = [], []
  for start, stop in _stripes(q_BTHD, blocks_BTKM, block_size):
    logits_BKGCX, num_keys = _logits(
      q_BTHD, k_BSKD, blocks_BTKM, segments_BT, start, stop, block_size, scale
    )
    exponentials_BKGCX, total_BKGC, lse_BKGC = arithmetic.softmax(logits_BKGCX)
    out_BCKGD = arithmetic.weigh(
      "bkgcx,bxkd->bckgd", exponentials_BKGCX, total_BKGC, v_BSKD[:, :num_keys]
    )
    outs.append(arithmetic.join_heads(out_BCKGD))
    lses.append(lse_BKGC.transpose(0, 3, 1, 2).reshape(*lse_BKGC.shape[::3], -1))
  return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=1)


def backward(
  q_BTHD, k_BSKD, v_BSKD, blocks_BTKM, segments_BT, dout_BTHD, lse_BTH, dlse_BTH,
  *, block_size, scale,
):  # fmt: skip
  num_kv_heads = k_BSKD.shape[2]
  dtype = q_BTHD.dtype
  dqs = []
  dk_BSKD, dv_BSKD = (
    jnp.zeros(k_BSKD.shape, jnp.float32),
    jnp.zeros(v_BSKD.shape, jnp.float32),
  )
  for start, stop in _stripes(q_BTHD, blocks_BTKM, block_size):
    logits_BKGCX, num_keys = _logits(
      q_BTHD, k_BSKD, blocks_BTKM, segments_BT, start, stop, block_size, scale
    )
    lse_BKGC = arithmetic.heads_first(lse_BTH[:, start:stop], num_kv_heads)
    dlse_BKGC = arithmetic.heads_first(dlse_BTH[:, start:stop], num_kv_heads)
    q_BCKGD = arithmetic.split_heads(q_BTHD[:, start:stop], num_kv_heads)
    dout_BCKGD = arithmetic.split_heads(dout_BTHD[:, start:stop], num_kv_heads)
    k_BXKD, v_BXKD = k_BSKD[:, :num_keys], v_BSKD[:, :num_keys]

    weights_BKGCX = jnp.exp(logits_BKGCX - arithmetic.finite(lse_BKGC)[..., None])
    dweights_BKGCX = arithmetic.einsum_f32("bckgd,bxkd->bkgcx", dout_BCKGD, v_BXKD)
    dlogits_BKGCX = arithmetic.softmax_gradient(weights_BKGCX, dweights_BKGCX, dlse_BKGC, scale)
    dlogits_BKGCX = dlogits_BKGCX.astype(dtype)
    dqs.append(
      arithmetic.join_heads(arithmetic.einsum_f32("bkgcx,bxkd->bckgd", dlogits_BKGCX, k_BXKD))
    )
    dk_BXKD = arithmetic.einsum_f32("bkgcx,bckgd->bxkd", dlogits_BKGCX, q_BCKGD)
    dv_BXKD = arithmetic.einsum_f32(
      "bkgcx,bckgd->bxkd", weights_BKGCX.astype(dtype), dout_BCKGD
    )
    # Padding, since a sliced .at[].add is a scatter, which crashes XLA's CPU partitioner.
    rest = [(0, 0), (0, k_BSKD.shape[1] - num_keys), (0, 0), (0, 0)]
    dk_BSKD += jnp.pad(dk_BXKD, rest)
    dv_BSKD += jnp.pad(dv_BXKD, rest)
  return jnp.concatenate(dqs, axis=1), dk_BSKD, dv_BSKD


def _logits(q_BTHD, k_BSKD, blocks_BTKM, segments_BT, start, stop, block_size, scale):
  """Scores of one stripe, -inf where a key is not seen, and how many keys there are."""
  num_kv_heads = k_BSKD.shape[2]
  num_keys = min(stop, k_BSKD.shape[1])
  q_BCKGD = arithmetic.split_heads(q_BTHD[:, start:stop], num_kv_heads)
  logits_BKGCX = scale * arithmetic.einsum_f32(
    "bckgd,bxkd->bkgcx", q_BCKGD, k_BSKD[:, :num_keys]
  )

  numbers_N = jnp.arange(-(-num_keys // block_size))
  listed_BCKN = (
    blocks_BTKM[:, start:stop, :, :, None] == numbers_N[None, None, None, None]
  ).any(-2)
  seen_BCKX = jnp.repeat(listed_BCKN, block_size, axis=-1)[..., :num_keys]
  causal_CX = jnp.arange(start, stop)[:, None] >= jnp.arange(num_keys)[None, :]
  seen_BCKX &= causal_CX[None, :, None, :]
  if segments_BT is not None:
    same_BCX = segments_BT[:, start:stop, None] == segments_BT[:, None, :num_keys]
    seen_BCKX &= same_BCX[:, :, None, :]
  seen_BKCX = seen_BCKX.transpose(0, 2, 1, 3)
  return jnp.where(seen_BKCX[:, :, None], logits_BKGCX, -jnp.inf), num_keys
