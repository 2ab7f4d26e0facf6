"""Block-sparse attention in plain XLA, for any device; memory is O(T x keys read).

Queries are taken in stripes. Where the lists cover a fair share of the keys, a stripe is
compared with every key and the unlisted ones are masked: dense matrix products, no gather.
Where they cover little, the listed blocks are gathered for every query. Both recompute the
scores in the backward pass.

Extra shape letters:
  C queries of a stripe   L = M * block_size keys a query reads   X keys of a stripe
"""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

# A query must read less than one key in so many before gathering beats masking: a gathered
# key is read once per query, a masked one once per stripe.
MASKED_UP_TO = 16
# Elements of gathered keys that exist at the same time.
GATHERED_ELEMENTS = 2**25
# What the backward pass needs besides its inputs, for rematerialisation policies.
RESIDUAL_NAME = "attention_residual"


@functools.partial(jax.custom_vjp, nondiff_argnames=("block_size", "scale"))
def block_sparse_attention(
  q_BTHD, k_BSKD, v_BSKD, blocks_BTKM, segments_BT, block_size, scale
):
  return _forward(q_BTHD, k_BSKD, v_BSKD, blocks_BTKM, segments_BT, block_size, scale)[0]


def _forward(q_BTHD, k_BSKD, v_BSKD, blocks_BTKM, segments_BT, block_size, scale):
  problem = (q_BTHD, k_BSKD, v_BSKD, blocks_BTKM, segments_BT)
  run = _masked_forward if _is_dense_enough(problem, block_size) else _gathered_forward
  out_BTHD, lse_BTH = run(*problem, block_size=block_size, scale=scale)
  out_BTHD = checkpoint_name(out_BTHD, RESIDUAL_NAME)
  lse_BTH = checkpoint_name(lse_BTH, RESIDUAL_NAME)
  return (out_BTHD, lse_BTH), (*problem, out_BTHD, lse_BTH)


def _backward(block_size, scale, residuals, cotangents):
  *problem, out_BTHD, lse_BTH = residuals
  dout_BTHD, dlse_BTH = cotangents
  # d(score) = p * (dp - sum(p dp) + dlse), and sum(p dp) = sum(dout out).
  delta_BTH = _f32(dout_BTHD * out_BTHD).sum(-1) - dlse_BTH
  run = _masked_backward if _is_dense_enough(problem, block_size) else _gathered_backward
  dq, dk, dv = run(*problem, dout_BTHD, lse_BTH, delta_BTH, block_size=block_size, scale=scale)
  q_BTHD, k_BSKD, v_BSKD, *_ = problem
  return dq.astype(q_BTHD.dtype), dk.astype(k_BSKD.dtype), dv.astype(v_BSKD.dtype), None, None


block_sparse_attention.defvjp(_forward, _backward)


def _is_dense_enough(problem, block_size) -> bool:
  _, k_BSKD, _, blocks_BTKM, _ = problem
  return k_BSKD.shape[1] <= MASKED_UP_TO * blocks_BTKM.shape[-1] * block_size


# --- Masking: a stripe of queries against every key up to its end ---------------------------


def _stripes(q_BTHD, blocks_BTKM, block_size):
  """Static `(start, stop)` of stripes as long as the number of keys a query reads."""
  length = q_BTHD.shape[1]
  stripe = min(length, blocks_BTKM.shape[-1] * block_size)
  return [(start, min(start + stripe, length)) for start in range(0, length, stripe)]


def _masked_forward(
  q_BTHD, k_BSKD, v_BSKD, blocks_BTKM, segments_BT, *, block_size, scale
):
  outs, lses = [], []
  for start, stop in _stripes(q_BTHD, blocks_BTKM, block_size):
    logits_BKGCX, num_keys = _masked_logits(
      q_BTHD, k_BSKD, blocks_BTKM, segments_BT, start, stop, block_size, scale
    )
    weights_BKGCX, lse_BKGC = _softmax(logits_BKGCX)
    out_BCKGD = jnp.einsum(
      "bkgcx,bxkd->bckgd", weights_BKGCX.astype(v_BSKD.dtype), v_BSKD[:, :num_keys]
    )
    outs.append(_join_heads(out_BCKGD))
    lses.append(lse_BKGC.transpose(0, 3, 1, 2).reshape(*lse_BKGC.shape[::3], -1))
  return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=1)


def _masked_backward(
  q_BTHD, k_BSKD, v_BSKD, blocks_BTKM, segments_BT, dout_BTHD, lse_BTH, delta_BTH,
  *, block_size, scale,
):  # fmt: skip
  num_kv_heads = k_BSKD.shape[2]
  dtype = q_BTHD.dtype
  dqs = []
  dk_BSKD, dv_BSKD = jnp.zeros(k_BSKD.shape, jnp.float32), jnp.zeros(v_BSKD.shape, jnp.float32)
  for start, stop in _stripes(q_BTHD, blocks_BTKM, block_size):
    logits_BKGCX, num_keys = _masked_logits(
      q_BTHD, k_BSKD, blocks_BTKM, segments_BT, start, stop, block_size, scale
    )
    lse_BKGC = _heads_first(lse_BTH[:, start:stop], num_kv_heads)
    delta_BKGC = _heads_first(delta_BTH[:, start:stop], num_kv_heads)
    q_BCKGD = _split_heads(q_BTHD[:, start:stop], num_kv_heads)
    dout_BCKGD = _split_heads(dout_BTHD[:, start:stop], num_kv_heads)
    k_BXKD, v_BXKD = k_BSKD[:, :num_keys], v_BSKD[:, :num_keys]

    weights_BKGCX = jnp.exp(logits_BKGCX - _finite(lse_BKGC)[..., None])
    dweights_BKGCX = _einsum_f32("bckgd,bxkd->bkgcx", dout_BCKGD, v_BXKD)
    dlogits_BKGCX = scale * weights_BKGCX * (dweights_BKGCX - delta_BKGC[..., None])
    dlogits_BKGCX = dlogits_BKGCX.astype(dtype)
    dqs.append(_join_heads(_einsum_f32("bkgcx,bxkd->bckgd", dlogits_BKGCX, k_BXKD)))
    dk_BXKD = _einsum_f32("bkgcx,bckgd->bxkd", dlogits_BKGCX, q_BCKGD)
    dv_BXKD = _einsum_f32("bkgcx,bckgd->bxkd", weights_BKGCX.astype(dtype), dout_BCKGD)
    dk_BSKD = dk_BSKD.at[:, :num_keys].add(dk_BXKD)
    dv_BSKD = dv_BSKD.at[:, :num_keys].add(dv_BXKD)
  return jnp.concatenate(dqs, axis=1), dk_BSKD, dv_BSKD


def _masked_logits(
  q_BTHD, k_BSKD, blocks_BTKM, segments_BT, start, stop, block_size, scale
):
  """Scores of one stripe, -inf where a key is not seen, and how many keys there are."""
  num_kv_heads = k_BSKD.shape[2]
  num_keys = min(stop, k_BSKD.shape[1])
  q_BCKGD = _split_heads(q_BTHD[:, start:stop], num_kv_heads)
  logits_BKGCX = scale * _einsum_f32("bckgd,bxkd->bkgcx", q_BCKGD, k_BSKD[:, :num_keys])

  numbers_N = jnp.arange(-(-num_keys // block_size))
  listed_BCKN = (blocks_BTKM[:, start:stop, :, :, None] == numbers_N[None, None, None, None]).any(-2)
  seen_BCKX = jnp.repeat(listed_BCKN, block_size, axis=-1)[..., :num_keys]
  causal_CX = jnp.arange(start, stop)[:, None] >= jnp.arange(num_keys)[None, :]
  seen_BCKX &= causal_CX[None, :, None, :]
  if segments_BT is not None:
    same_BCX = segments_BT[:, start:stop, None] == segments_BT[:, None, :num_keys]
    seen_BCKX &= same_BCX[:, :, None, :]
  seen_BKCX = seen_BCKX.transpose(0, 2, 1, 3)
  return jnp.where(seen_BKCX[:, :, None], logits_BKGCX, -jnp.inf), num_keys


# --- Gathering: every query with its own copy of the blocks it lists ------------------------


def _gathered_forward(
  q_BTHD, k_BSKD, v_BSKD, blocks_BTKM, segments_BT, *, block_size, scale
):
  num_kv_heads = k_BSKD.shape[2]
  blocks = _Blocks(k_BSKD, v_BSKD, segments_BT, block_size)

  def stripe(part):
    q_BCHD, listed_BCKM, position_C, segments_BC = part
    q_BCKGD = _split_heads(q_BCHD, num_kv_heads)
    logits_BKGCL, _, v_BKCLD = blocks.logits(
      q_BCKGD, listed_BCKM, position_C, segments_BC, scale
    )
    weights_BKGCL, lse_BKGC = _softmax(logits_BKGCL)
    out_BCKGD = jnp.einsum("bkgcl,bkcld->bckgd", weights_BKGCL.astype(v_BKCLD.dtype), v_BKCLD)
    lse_BCH = lse_BKGC.transpose(0, 3, 1, 2).reshape(*q_BCHD.shape[:3])
    return _join_heads(out_BCKGD), lse_BCH

  stripes = _cut(q_BTHD, blocks_BTKM, segments_BT, k_BSKD, block_size)
  outs = jax.lax.map(stripe, stripes)
  return tuple(_uncut(out, q_BTHD.shape[1]) for out in outs)


def _gathered_backward(
  q_BTHD, k_BSKD, v_BSKD, blocks_BTKM, segments_BT, dout_BTHD, lse_BTH, delta_BTH,
  *, block_size, scale,
):  # fmt: skip
  num_kv_heads = k_BSKD.shape[2]
  dtype = q_BTHD.dtype
  blocks = _Blocks(k_BSKD, v_BSKD, segments_BT, block_size)

  def stripe(gradients, part):
    (q_BCHD, listed_BCKM, position_C, segments_BC), dout_BCHD, lse_BCH, delta_BCH = part
    q_BCKGD = _split_heads(q_BCHD, num_kv_heads)
    dout_BCKGD = _split_heads(dout_BCHD, num_kv_heads)
    logits_BKGCL, k_BKCLD, v_BKCLD = blocks.logits(
      q_BCKGD, listed_BCKM, position_C, segments_BC, scale
    )
    lse_BKGC = _heads_first(lse_BCH, num_kv_heads)
    delta_BKGC = _heads_first(delta_BCH, num_kv_heads)
    weights_BKGCL = jnp.exp(logits_BKGCL - _finite(lse_BKGC)[..., None])
    dweights_BKGCL = _einsum_f32("bckgd,bkcld->bkgcl", dout_BCKGD, v_BKCLD)
    dlogits_BKGCL = scale * weights_BKGCL * (dweights_BKGCL - delta_BKGC[..., None])
    dlogits_BKGCL = dlogits_BKGCL.astype(dtype)
    dq_BCKGD = _einsum_f32("bkgcl,bkcld->bckgd", dlogits_BKGCL, k_BKCLD)
    dk_BKCLD = _einsum_f32("bkgcl,bckgd->bkcld", dlogits_BKGCL, q_BCKGD)
    dv_BKCLD = _einsum_f32("bkgcl,bckgd->bkcld", weights_BKGCL.astype(dtype), dout_BCKGD)
    gradients = tuple(
      blocks.scatter_add(total, listed_BCKM, update)
      for total, update in zip(gradients, (dk_BKCLD, dv_BKCLD), strict=True)
    )
    return gradients, _join_heads(dq_BCKGD)

  stripes = _cut(q_BTHD, blocks_BTKM, segments_BT, k_BSKD, block_size)
  size = stripes[2].shape[1]
  extras = [_to_stripes(x, size) for x in (dout_BTHD, lse_BTH, delta_BTH)]
  zeros = jnp.zeros(blocks.k_BKNXD.shape, jnp.float32)
  (dk_BKNXD, dv_BKNXD), dq = jax.lax.scan(stripe, (zeros, zeros), (stripes, *extras))
  num_keys = k_BSKD.shape[1]
  dk_BSKD, dv_BSKD = (_from_blocks(x, num_keys) for x in (dk_BKNXD, dv_BKNXD))
  return _uncut(dq, q_BTHD.shape[1]), dk_BSKD, dv_BSKD


class _Blocks:
  """Keys and values cut into blocks; here `X` is the keys of one block."""

  def __init__(self, k_BSKD, v_BSKD, segments_BT, block_size):
    self._block_size = block_size
    self._num_keys = k_BSKD.shape[1]
    self.k_BKNXD = _to_blocks(k_BSKD, block_size)
    self.v_BKNXD = _to_blocks(v_BSKD, block_size)
    self._segments_BT = segments_BT

  def logits(self, q_BCKGD, listed_BCKM, position_C, segments_BC, scale):
    """Scores of the listed keys, -inf where one is not seen, and the keys and values."""
    num_blocks = self.k_BKNXD.shape[2]
    is_there = (listed_BCKM >= 0) & (listed_BCKM < num_blocks) & ~_is_repeated(listed_BCKM)
    safe_BCKM = jnp.where(is_there, listed_BCKM, 0)
    k_BKCLD, v_BKCLD = (_gather(x, safe_BCKM) for x in (self.k_BKNXD, self.v_BKNXD))

    within_X = jnp.arange(self._block_size)
    key_BCKL = (safe_BCKM[..., None] * self._block_size + within_X[None, None, None, None]).reshape(
      *safe_BCKM.shape[:3], -1
    )
    seen_BCKL = jnp.repeat(is_there, self._block_size, axis=-1)
    seen_BCKL &= key_BCKL <= position_C[None, :, None, None]
    key_BCKL = jnp.minimum(key_BCKL, self._num_keys - 1)
    if segments_BC is not None:
      look_up = jax.vmap(lambda segments_T, key: segments_T[key])
      seen_BCKL &= look_up(self._segments_BT, key_BCKL) == segments_BC[:, :, None, None]
    logits_BKGCL = scale * _einsum_f32("bckgd,bkcld->bkgcl", q_BCKGD, k_BKCLD)
    seen_BKCL = seen_BCKL.transpose(0, 2, 1, 3)
    return jnp.where(seen_BKCL[:, :, None], logits_BKGCL, -jnp.inf), k_BKCLD, v_BKCLD

  def scatter_add(self, total_BKNXD, listed_BCKM, update_BKCLD):
    """Adds what the queries of a stripe owe to each block; -1 and its like owe nothing."""
    b, k, n, x, d = total_BKNXD.shape
    # Updates of unseen keys are zero, so it does not matter where they land.
    safe_BKCM = jnp.clip(listed_BCKM, 0, n - 1).transpose(0, 2, 1, 3).reshape(b, k, -1)
    update = update_BKCLD.reshape(b, k, -1, x, d)
    add = jax.vmap(jax.vmap(lambda total, where, what: total.at[where].add(what)))
    return add(total_BKNXD, safe_BKCM, update)


def _gather(x_BKNXD, blocks_BCKM):
  b, c, k, m = blocks_BCKM.shape
  *_, x, d = x_BKNXD.shape
  take = jax.vmap(jax.vmap(lambda x_NXD, index: x_NXD[index]))
  gathered = take(x_BKNXD, blocks_BCKM.transpose(0, 2, 1, 3).reshape(b, k, -1))
  return gathered.reshape(b, k, c, m * x, d)


def _is_repeated(listed_BCKM):
  m = listed_BCKM.shape[-1]
  equal = listed_BCKM[..., :, None] == listed_BCKM[..., None, :]
  return (equal & jnp.tri(m, k=-1, dtype=bool)[None, None, None]).any(-1)


def _cut(q_BTHD, blocks_BTKM, segments_BT, k_BSKD, block_size):
  """Queries, lists, positions and segments in stripes: a leading axis to map over."""
  b, t, _, d = q_BTHD.shape
  k, m = blocks_BTKM.shape[2:]
  per_query = b * k * m * block_size * d
  size = max(1, min(t, GATHERED_ELEMENTS // per_query))
  positions = _to_stripes(jnp.arange(t)[None], size)[:, 0]
  segments = None if segments_BT is None else _to_stripes(segments_BT, size)
  return _to_stripes(q_BTHD, size), _to_stripes(blocks_BTKM, size), positions, segments


def _to_stripes(x_BT, size):
  b, t, *rest = x_BT.shape
  x_BT = jnp.pad(x_BT, [(0, 0), (0, -t % size)] + [(0, 0)] * len(rest))
  return x_BT.reshape(b, -1, size, *rest).swapaxes(0, 1)


def _uncut(stripes, length):
  num_stripes, b, size, *rest = stripes.shape
  return stripes.swapaxes(0, 1).reshape(b, num_stripes * size, *rest)[:, :length]


def _to_blocks(x_BSKD, block_size):
  b, s, k, d = x_BSKD.shape
  x_BSKD = jnp.pad(x_BSKD, [(0, 0), (0, -s % block_size), (0, 0), (0, 0)])
  return x_BSKD.reshape(b, -1, block_size, k, d).transpose(0, 3, 1, 2, 4)


def _from_blocks(x_BKNXD, length):
  b, k, _, _, d = x_BKNXD.shape
  return x_BKNXD.transpose(0, 2, 3, 1, 4).reshape(b, -1, k, d)[:, :length]


# --- Shared by both -------------------------------------------------------------------------


def _softmax(logits):
  """Weights and log-normaliser over the last axis; all -inf gives zeros and -inf."""
  largest = _finite(logits.max(-1))
  weights = jnp.exp(logits - largest[..., None])
  total = weights.sum(-1)
  lse = jnp.where(total > 0, largest + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
  return weights / jnp.where(total > 0, total, 1.0)[..., None], lse


def _finite(x):
  return jnp.where(jnp.isneginf(x), 0.0, x)


def _split_heads(x_BTHD, num_kv_heads):
  b, t, h, d = x_BTHD.shape
  return x_BTHD.reshape(b, t, num_kv_heads, h // num_kv_heads, d)


def _join_heads(x_BTKGD):
  b, t, k, g, d = x_BTKGD.shape
  return x_BTKGD.reshape(b, t, k * g, d)


def _heads_first(x_BTH, num_kv_heads):
  b, t, h = x_BTH.shape
  return x_BTH.reshape(b, t, num_kv_heads, h // num_kv_heads).transpose(0, 2, 3, 1)


def _f32(x):
  return x.astype(jnp.float32)


def _einsum_f32(equation, *operands):
  return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)
