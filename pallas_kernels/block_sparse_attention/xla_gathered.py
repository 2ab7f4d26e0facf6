"""Every query with its own copy of the blocks it lists, a stripe of queries at a time.

The way to go where the lists cover little of the keys.

Extra shape letters:
  C queries of a stripe   L = M * block_size keys a query reads   X keys of a block
"""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import arithmetic

# Elements of gathered keys that exist at the same time.
GATHERED_ELEMENTS = 2**25


def forward(q_BTHD, k_BSKD, v_BSKD, blocks_BTKM, segments_BT, *, block_size, scale):
  num_kv_heads = k_BSKD.shape[2]
  blocks = _Blocks(k_BSKD, v_BSKD, segments_BT, block_size)

  def stripe(part):
    q_BCHD, listed_BCKM, position_C, segments_BC = part
    q_BCKGD = arithmetic.split_heads(q_BCHD, num_kv_heads)
    logits_BKGCL, _, v_BKCLD = blocks.logits(
      q_BCKGD, listed_BCKM, position_C, segments_BC, scale
    )
    exponentials_BKGCL, total_BKGC, lse_BKGC = arithmetic.softmax(logits_BKGCL)
    out_BCKGD = arithmetic.weigh("bkgcl,bkcld->bckgd", exponentials_BKGCL, total_BKGC, v_BKCLD)
    lse_BCH = lse_BKGC.transpose(0, 3, 1, 2).reshape(*q_BCHD.shape[:3])
    return arithmetic.join_heads(out_BCKGD), lse_BCH

  stripes = _cut(q_BTHD, blocks_BTKM, segments_BT, k_BSKD, block_size)
  outs = jax.lax.map(stripe, stripes)
  return tuple(_uncut(out, q_BTHD.shape[1]) for out in outs)


def backward(
  q_BTHD, k_BSKD, v_BSKD, blocks_BTKM, segments_BT, dout_BTHD, lse_BTH, dlse_BTH,
  *, block_size, scale,
):  # fmt: skip
  num_kv_heads = k_BSKD.shape[2]
  dtype = q_BTHD.dtype
  blocks = _Blocks(k_BSKD, v_BSKD, segments_BT, block_size)

  def stripe(gradients, part):
    (q_BCHD, listed_BCKM, position_C, segments_BC), dout_BCHD, lse_BCH, dlse_BCH = part
    q_BCKGD = arithmetic.split_heads(q_BCHD, num_kv_heads)
    dout_BCKGD = arithmetic.split_heads(dout_BCHD, num_kv_heads)
    logits_BKGCL, k_BKCLD, v_BKCLD = blocks.logits(
      q_BCKGD, listed_BCKM, position_C, segments_BC, scale
    )
    lse_BKGC = arithmetic.heads_first(lse_BCH, num_kv_heads)
    dlse_BKGC = arithmetic.heads_first(dlse_BCH, num_kv_heads)
    weights_BKGCL = jnp.exp(logits_BKGCL - arithmetic.finite(lse_BKGC)[..., None])
    dweights_BKGCL = arithmetic.einsum_f32("bckgd,bkcld->bkgcl", dout_BCKGD, v_BKCLD)
    dlogits_BKGCL = arithmetic.softmax_gradient(weights_BKGCL, dweights_BKGCL, dlse_BKGC, scale)
    dlogits_BKGCL = dlogits_BKGCL.astype(dtype)
    dq_BCKGD = arithmetic.einsum_f32("bkgcl,bkcld->bckgd", dlogits_BKGCL, k_BKCLD)
    dk_BKCLD = arithmetic.einsum_f32("bkgcl,bckgd->bkcld", dlogits_BKGCL, q_BCKGD)
    dv_BKCLD = arithmetic.einsum_f32(
      "bkgcl,bckgd->bkcld", weights_BKGCL.astype(dtype), dout_BCKGD
    )
    gradients = tuple(
      blocks.scatter_add(total, listed_BCKM, update)
      for total, update in zip(gradients, (dk_BKCLD, dv_BKCLD), strict=True)
    )
    return gradients, arithmetic.join_heads(dq_BCKGD)

  stripes = _cut(q_BTHD, blocks_BTKM, segments_BT, k_BSKD, block_size)
  size = stripes[2].shape[1]
  extras = [_to_stripes(x, size) for x in (dout_BTHD, lse_BTH, dlse_BTH)]
  zeros = jnp.zeros(blocks.k_BKNXD.shape, jnp.float32)
  (dk_BKNXD, dv_BKNXD), dq = jax.lax.scan(stripe, (zeros, zeros), (stripes, *extras))
  num_keys = k_BSKD.shape[1]
  dk_BSKD, dv_BSKD = (_from_blocks(x, num_keys) for x in (dk_BKNXD, dv_BKNXD))
  return _uncut(dq, q_BTHD.shape[1]), dk_BSKD, dv_BSKD


class _Blocks:
  """Keys and values cut into blocks."""

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
    key_BCKL = (
      safe_BCKM[..., None] * self._block_size + within_X[None, None, None, None]
    ).reshape(*safe_BCKM.shape[:3], -1)
    seen_BCKL = jnp.repeat(is_there, self._block_size, axis=-1)
    seen_BCKL &= key_BCKL <= position_C[None, :, None, None]
    key_BCKL = jnp.minimum(key_BCKL, self._num_keys - 1)
    if segments_BC is not None:
      look_up = jax.vmap(lambda segments_T, key: segments_T[key])
      seen_BCKL &= look_up(self._segments_BT, key_BCKL) == segments_BC[:, :, None, None]
    logits_BKGCL = scale * arithmetic.einsum_f32("bckgd,bkcld->bkgcl", q_BCKGD, k_BKCLD)
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
