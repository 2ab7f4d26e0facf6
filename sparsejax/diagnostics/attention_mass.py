"""Where the mass of full attention lies, seen from a sample of the queries.

All functions take or give probabilities `p_BPHS`: what each head of a sampled query puts on
every key under full attention. Letters: B batch, P sampled queries, T queries, S keys, H query
heads, K key/value heads, G = H // K, D head size, M blocks listed, N blocks.
"""

import jax
import jax.numpy as jnp


def sample_positions(length: int, num_queries: int) -> jax.Array:
  """Positions of so many queries, int32 [P]: evenly spread, the last one among them."""
  num_queries = min(num_queries, length)
  return ((jnp.arange(num_queries) + 1) * length // num_queries - 1).astype(jnp.int32)


def scores(
  q_BPHD,
  k_BSKD,
  positions_P,
  *,
  segments_BS=None,
  key_bias_BSK=None,
  scale: float | None = None,
) -> jax.Array:
  """Scores of all keys, float32 [B, P, H, S]; -inf for keys that a query does not see.

    s(t, j) = scale q(t) k(j) + b(j) where j <= t

  Args:
    q_BPHD: the sampled queries.
    k_BSKD: all keys.
    positions_P: place of each sampled query among the keys.
    segments_BS: document of each key; queries see their own alone. None: everything before.
    key_bias_BSK: b, or None.
    scale: by default 1 / sqrt(D).
  """
  (b, p, h, d), (_, s, k, _) = q_BPHD.shape, k_BSKD.shape
  scale = d**-0.5 if scale is None else scale
  q_BPKGD = q_BPHD.reshape(b, p, k, h // k, d).astype(jnp.float32)
  found = jnp.einsum("bpkgd,bskd->bpkgs", q_BPKGD, k_BSKD.astype(jnp.float32)) * scale
  if key_bias_BSK is not None:
    found += key_bias_BSK.astype(jnp.float32).transpose(0, 2, 1)[:, None, :, None]
  is_seen_BPS = (jnp.arange(s)[None] <= positions_P[:, None])[None]
  if segments_BS is not None:
    is_seen_BPS &= segments_BS[:, positions_P, None] == segments_BS[:, None, :]
  found = jnp.where(is_seen_BPS[:, :, None, None], found, -jnp.inf)
  return found.reshape(b, p, h, s)


def probabilities(q_BPHD, k_BSKD, positions_P, **of_scores) -> jax.Array:
  """Full attention's probabilities, float32 [B, P, H, S], of what `scores` takes.

  p(t, j) = exp(s(t, j)) / sum over j' <= t of exp(s(t, j'))
  """
  return jax.nn.softmax(scores(q_BPHD, k_BSKD, positions_P, **of_scores), axis=-1)


def is_listed(blocks_BPKM, num_blocks: int) -> jax.Array:
  """Whether a query lists each of the blocks that there are, bool [B, P, K, N]."""
  blocks_N = jnp.arange(num_blocks)[None, None, None, None]
  return (blocks_BPKM[..., None] == blocks_N).any(-2)


def attention_sparsity(p_BPHS, blocks_BPKM, block_size: int) -> jax.Array:
  """AttnSparsity of SSA (arXiv:2511.20102, definition 1), [B, P, H].

    AttnSparsity(t) = sum over j of p(t, j) 1[block(j) is listed by t]

  The mass of full attention that the sparse stream keeps: 1 where nothing is lost.

  Args:
    p_BPHS: see `probabilities`.
    blocks_BPKM: lists of the sampled queries, -1 for empty slots.
    block_size: keys per block.
  """
  b, p, h, s = p_BPHS.shape
  k = blocks_BPKM.shape[2]
  num_blocks = -(-s // block_size)
  p_BPHS = jnp.pad(p_BPHS, [(0, 0)] * 3 + [(0, num_blocks * block_size - s)])
  mass_BPKGN = p_BPHS.reshape(b, p, k, h // k, num_blocks, block_size).sum(-1)
  is_listed_BPKN = is_listed(blocks_BPKM, num_blocks)
  return jnp.where(is_listed_BPKN[:, :, :, None], mass_BPKGN, 0.0).sum(-1).reshape(b, p, h)


def entropy(p_BPHS) -> jax.Array:
  """AttnEntropy(t) = - sum over j of p(t, j) log2 p(t, j), in bits, [B, P, H]."""
  return -jnp.where(p_BPHS > 0, p_BPHS * jnp.log2(jnp.where(p_BPHS > 0, p_BPHS, 1.0)), 0.0).sum(
    -1
  )


def sink_mass(p_BPHS, first_P, num_keys: int) -> jax.Array:
  """The mass on the first `num_keys` keys that a query sees, [B, P, H].

    sink(t) = sum over first(t) <= j < first(t) + num_keys of p(t, j)

  Args:
    p_BPHS: see `probabilities`.
    first_P: where the document of each sampled query begins, [P] or [B, P].
    num_keys: that count as the sink.
  """
  key = jnp.arange(p_BPHS.shape[-1])[None, None]
  first = jnp.broadcast_to(first_P, p_BPHS.shape[:2])[..., None]
  is_sink_BPS = (key >= first) & (key < first + num_keys)
  return jnp.where(is_sink_BPS[:, :, None], p_BPHS, 0.0).sum(-1)
