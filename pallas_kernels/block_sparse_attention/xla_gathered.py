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


def forward(problem, *, known_offset, block_size, scale):
  del known_offset  # gathering reads no more keys for not knowing it
  num_kv_heads = problem.k_BSKD.shape[2]
  blocks = _Blocks(problem, block_size)

  def stripe(part):
    q_BCHD, listed_BCKM, query_C = part
    q_BCKGD = arithmetic.split_heads(q_BCHD, num_kv_heads)
    logits_BKGCL, _, v_BKCLD = blocks.logits(q_BCKGD, listed_BCKM, query_C, scale)
    exponentials_BKGCL, total_BKGC, lse_BKGC = arithmetic.softmax(logits_BKGCL)
    out_BCKGD = arithmetic.weigh("bkgcl,bkcld->bckgd", exponentials_BKGCL, total_BKGC, v_BKCLD)
    lse_BCH = lse_BKGC.transpose(0, 3, 1, 2).reshape(*q_BCHD.shape[:3])
    return arithmetic.join_heads(out_BCKGD), lse_BCH

  outs = jax.lax.map(stripe, _cut(problem, block_size))
  return tuple(_uncut(out, problem.q_BTHD.shape[1]) for out in outs)


def backward(problem, lse_BTH, dout_BTHD, dlse_BTH, *, known_offset, block_size, scale):
  del known_offset
  num_keys, num_kv_heads = problem.k_BSKD.shape[1:3]
  dtype = problem.q_BTHD.dtype
  blocks = _Blocks(problem, block_size)

  def stripe(gradients, part):
    (q_BCHD, listed_BCKM, query_C), dout_BCHD, lse_BCH, dlse_BCH = part
    q_BCKGD = arithmetic.split_heads(q_BCHD, num_kv_heads)
    dout_BCKGD = arithmetic.split_heads(dout_BCHD, num_kv_heads)
    logits_BKGCL, k_BKCLD, v_BKCLD = blocks.logits(q_BCKGD, listed_BCKM, query_C, scale)
    lse_BKGC = arithmetic.heads_first(lse_BCH, num_kv_heads)
    dlse_BKGC = arithmetic.heads_first(dlse_BCH, num_kv_heads)
    weights_BKGCL = jnp.exp(logits_BKGCL - arithmetic.finite(lse_BKGC)[..., None])
    dweights_BKGCL = arithmetic.einsum_f32("bckgd,bkcld->bkgcl", dout_BCKGD, v_BKCLD)
    dlogits_BKGCL = arithmetic.softmax_gradient(weights_BKGCL, dweights_BKGCL, dlse_BKGC)
    dbias_BKCL1 = dlogits_BKGCL.sum(2)[..., None]
    dlogits_BKGCL = dlogits_BKGCL.astype(dtype)
    dq_BCKGD = scale * arithmetic.einsum_f32("bkgcl,bkcld->bckgd", dlogits_BKGCL, k_BKCLD)
    dk_BKCLD = scale * arithmetic.einsum_f32("bkgcl,bckgd->bkcld", dlogits_BKGCL, q_BCKGD)
    dv_BKCLD = arithmetic.einsum_f32(
      "bkgcl,bckgd->bkcld", weights_BKGCL.astype(dtype), dout_BCKGD
    )
    gradients = tuple(
      blocks.scatter_add(total, listed_BCKM, update)
      for total, update in zip(gradients, (dk_BKCLD, dv_BKCLD, dbias_BKCL1), strict=True)
    )
    return gradients, arithmetic.join_heads(dq_BCKGD)

  stripes = _cut(problem, block_size)
  size = stripes[2].shape[1]
  extras = [_to_stripes(x, size) for x in (dout_BTHD, lse_BTH, dlse_BTH)]
  zeros_BKNXD = jnp.zeros(blocks.k_BKNXD.shape, jnp.float32)
  start = zeros_BKNXD, zeros_BKNXD, zeros_BKNXD[..., :1]
  totals, dq = jax.lax.scan(stripe, start, (stripes, *extras))
  dk_BSKD, dv_BSKD, dbias_BSK1 = (_from_blocks(x, num_keys) for x in totals)
  return _uncut(dq, problem.q_BTHD.shape[1]), dk_BSKD, dv_BSKD, dbias_BSK1[..., 0]


class _Blocks:
  """Keys, values and biases cut into blocks."""

  def __init__(self, problem, block_size):
    self._problem = problem
    self._block_size = block_size
    self.k_BKNXD = _to_blocks(problem.k_BSKD, block_size)
    self.v_BKNXD = _to_blocks(problem.v_BSKD, block_size)

  def logits(self, q_BCKGD, listed_BCKM, query_C, scale):
    """Scores of the listed keys, -inf where one is not seen, and the keys and values."""
    problem, num_blocks = self._problem, self.k_BKNXD.shape[2]
    is_there = (listed_BCKM >= 0) & (listed_BCKM < num_blocks) & ~_is_repeated(listed_BCKM)
    safe_BCKM = jnp.where(is_there, listed_BCKM, 0)
    k_BKCLD, v_BKCLD = (_gather(x, safe_BCKM) for x in (self.k_BKNXD, self.v_BKNXD))

    within_X = jnp.arange(self._block_size)
    key_BCKL = (
      safe_BCKM[..., None] * self._block_size + within_X[None, None, None, None]
    ).reshape(*safe_BCKM.shape[:3], -1)
    position_C = problem.query_offset + query_C
    seen_BCKL = jnp.repeat(is_there, self._block_size, axis=-1)
    seen_BCKL &= key_BCKL <= position_C[None, :, None, None]
    key_BCKL = jnp.minimum(key_BCKL, problem.k_BSKD.shape[1] - 1)
    if problem.segments_BS is not None:
      own_BC = arithmetic.at_positions(problem.segments_BS, position_C)
      look_up = jax.vmap(lambda segments_S, key: segments_S[key])
      seen_BCKL &= look_up(problem.segments_BS, key_BCKL) == own_BC[:, :, None, None]
    logits_BKGCL = scale * arithmetic.einsum_f32("bckgd,bkcld->bkgcl", q_BCKGD, k_BKCLD)
    key_BKCL, seen_BKCL = key_BCKL.transpose(0, 2, 1, 3), seen_BCKL.transpose(0, 2, 1, 3)
    if problem.key_bias_BSK is not None:
      bias_BKS = problem.key_bias_BSK.astype(jnp.float32).transpose(0, 2, 1)
      look_up = jax.vmap(jax.vmap(lambda bias_S, key: bias_S[key]))
      logits_BKGCL += look_up(bias_BKS, key_BKCL)[:, :, None]
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


def _cut(problem, block_size):
  """Queries, lists and query numbers in stripes: a leading axis to map over."""
  b, t, _, d = problem.q_BTHD.shape
  k, m = problem.blocks_BTKM.shape[2:]
  per_query = b * k * m * block_size * d
  size = max(1, min(t, GATHERED_ELEMENTS // per_query))
  numbers = _to_stripes(jnp.arange(t)[None], size)[:, 0]
  return _to_stripes(problem.q_BTHD, size), _to_stripes(problem.blocks_BTKM, size), numbers


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
