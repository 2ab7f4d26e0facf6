"""Attention to pages in plain XLA, for any device: gathers a stripe of slots at a time.

Extra shape letters: C slots of a stripe   S = C * X their keys
"""

from jax import lax
import jax.numpy as jnp

from pallas_kernels.decode_attention.problem import Problem

# Elements of the keys that a stripe of slots gathers, and of its values; in their dtype. A
# stripe has one slot at least.
STRIPE_ELEMENTS = 2**26


def decode_attention(problem: Problem, scale: float):
  q_BHD, k_PXD, _, pages_BKM, begin_BKM, end_BKM, _ = problem
  (b, h, d), (p, x, _), (_, k, m) = q_BHD.shape, k_PXD.shape, pages_BKM.shape
  q_BKGD = q_BHD.reshape(b, k, h // k, d).astype(k_PXD.dtype)
  is_page_BKM = (pages_BKM >= 0) & (pages_BKM < p)
  # Slots that read nothing all gather the same page.
  slots = (
    jnp.where(is_page_BKM, pages_BKM, 0),
    jnp.where(is_page_BKM, begin_BKM, 0),
    jnp.where(is_page_BKM, end_BKM, 0),
  )
  size = min(m, max(1, STRIPE_ELEMENTS // (b * k * x * d)))
  num_stripes = -(-m // size)

  def divide(slots_BKM):
    padded = jnp.pad(slots_BKM, [(0, 0), (0, 0), (0, num_stripes * size - m)])
    return jnp.moveaxis(padded.reshape(b, k, num_stripes, size), 2, 0)

  def add(carry, slots_BKC):
    return _add_stripe(carry, problem, q_BKGD, *slots_BKC, scale), None

  start = (
    jnp.zeros(q_BKGD.shape, jnp.float32),
    jnp.zeros(q_BKGD.shape[:-1], jnp.float32),
    jnp.full(q_BKGD.shape[:-1], -jnp.inf, jnp.float32),
  )
  (total_BKGD, norm_BKG, highest_BKG), _ = lax.scan(add, start, tuple(map(divide, slots)))
  # What read nothing has a norm of 0, and -inf as its highest score.
  out_BKGD = total_BKGD / jnp.where(norm_BKG > 0.0, norm_BKG, 1.0)[..., None]
  lse_BKG = _finite(highest_BKG) + jnp.log(norm_BKG)
  return out_BKGD.reshape(b, h, d).astype(q_BHD.dtype), lse_BKG.reshape(b, h)


def _add_stripe(carry, problem, q_BKGD, page_BKC, begin_BKC, end_BKC, scale):
  """Adds slots to the weighted values, their norm, and the highest score of each query."""
  total_BKGD, norm_BKG, highest_BKG = carry
  (b, k, c), x = page_BKC.shape, problem.k_PXD.shape[1]
  key_111X = jnp.arange(x)[None, None, None]
  is_read_BKCX = (begin_BKC[..., None] <= key_111X) & (key_111X < end_BKC[..., None])
  is_read_BKS = is_read_BKCX.reshape(b, k, c * x)

  def gather(array):
    taken = jnp.take(array, page_BKC, axis=0, mode="clip")
    return taken.reshape(b, k, c * x, *array.shape[2:])

  logits_BKGS = scale * _einsum_f32("bkgd,bksd->bkgs", q_BKGD, gather(problem.k_PXD))
  if problem.key_bias_PX is not None:
    logits_BKGS += gather(problem.key_bias_PX)[:, :, None]
  logits_BKGS = jnp.where(is_read_BKS[:, :, None], logits_BKGS, -jnp.inf)
  new_highest_BKG = jnp.maximum(highest_BKG, logits_BKGS.max(-1))
  shift_BKG = _finite(new_highest_BKG)
  shrink_BKG = jnp.exp(highest_BKG - shift_BKG)
  weights_BKGS = jnp.exp(logits_BKGS - shift_BKG[..., None])
  # A weight of 0 does not silence a NaN.
  v_BKSD = jnp.where(is_read_BKS[..., None], gather(problem.v_PXD), 0)
  part_BKGD = _einsum_f32("bkgs,bksd->bkgd", weights_BKGS.astype(v_BKSD.dtype), v_BKSD)
  return (
    total_BKGD * shrink_BKG[..., None] + part_BKGD,
    norm_BKG * shrink_BKG + weights_BKGS.sum(-1),
    new_highest_BKG,
  )


def _finite(x):
  return jnp.where(jnp.isneginf(x), 0.0, x)


def _einsum_f32(equation, *operands):
  return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)
