"""The language-modelling loss, without ever holding all logits.

Letters: B batch, T positions, C positions of a chunk, E width, V vocabulary.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Settings of the loss of a training step.

  Attributes:
    z_loss_weight: weight of the squared log-normaliser.
    align_weight: weight of the alignment loss (SSA's alpha).
    chunk_length: positions of each row whose logits exist at the same time.
  """

  z_loss_weight: float
  align_weight: float
  chunk_length: int


class Predictions(NamedTuple):
  """How well each next token was predicted; every field is [B, T].

  Attributes:
    nll: negative log-likelihood of the target, nats, float32.
    log_normalizer: logarithm of the sum of the exponentiated logits, float32; its square is
      the z-loss of PaLM (arXiv:2204.02311, section 5).
    is_hit: whether the target has the largest logit; carries no gradient.
  """

  nll: jax.Array
  log_normalizer: jax.Array
  is_hit: jax.Array


def next_token(hidden_BTE, table_VE, targets_BT, *, chunk_length: int) -> Predictions:
  """Predictions of `targets` by the logits `hidden @ table.T`.

  Logits exist for `chunk_length` positions of each row at a time, in the forward pass and
  again in the backward pass. Products are in the dtype of `hidden`, sums in float32.
  """
  t = hidden_BTE.shape[1]
  size = min(chunk_length, t)
  pad = -t % size
  hidden_BTE = jnp.pad(hidden_BTE, [(0, 0), (0, pad), (0, 0)])
  targets_BT = jnp.pad(targets_BT, [(0, 0), (0, pad)])
  fields = _chunked(hidden_BTE, table_VE, targets_BT, size)
  return Predictions(*(field[:, :t] for field in fields))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chunked(hidden_BTE, table_VE, targets_BT, size):
  return _forward(hidden_BTE, table_VE, targets_BT, size)[0]


def _forward(hidden_BTE, table_VE, targets_BT, size):
  def chunk(part):
    hidden_BCE, targets_BC = part
    logits_BCV = _logits(hidden_BCE, table_VE)
    log_normalizer_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    target_logit_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    is_hit_BC = logits_BCV.argmax(-1) == targets_BC
    return log_normalizer_BC - target_logit_BC, log_normalizer_BC, is_hit_BC

  chunks = jax.lax.map(chunk, (_to_chunks(hidden_BTE, size), _to_chunks(targets_BT, size)))
  nll_BT, log_normalizer_BT, is_hit_BT = map(_from_chunks, chunks)
  residuals = hidden_BTE, table_VE, targets_BT, log_normalizer_BT
  return (nll_BT, log_normalizer_BT, is_hit_BT), residuals


def _backward(size, residuals, cotangents):
  hidden_BTE, table_VE, targets_BT, log_normalizer_BT = residuals
  dnll_BT, dlog_normalizer_BT, _ = cotangents

  def chunk(dtable_VE, part):
    hidden_BCE, targets_BC, log_normalizer_BC, dnll_BC, dlog_normalizer_BC = part
    probability_BCV = jnp.exp(_logits(hidden_BCE, table_VE) - log_normalizer_BC[..., None])
    is_target_BCV = jax.nn.one_hot(targets_BC, table_VE.shape[0], dtype=bool)
    dlogits_BCV = probability_BCV * (dnll_BC + dlog_normalizer_BC)[..., None]
    dlogits_BCV -= jnp.where(is_target_BCV, dnll_BC[..., None], 0.0)
    dlogits_BCV = dlogits_BCV.astype(hidden_BCE.dtype)
    dhidden_BCE = jnp.einsum("bcv,ve->bce", dlogits_BCV, table_VE.astype(hidden_BCE.dtype))
    dtable_VE += jnp.einsum(
      "bcv,bce->ve", dlogits_BCV, hidden_BCE, preferred_element_type=jnp.float32
    )
    return dtable_VE, dhidden_BCE

  parts = hidden_BTE, targets_BT, log_normalizer_BT, dnll_BT, dlog_normalizer_BT
  parts = tuple(_to_chunks(part, size) for part in parts)
  zeros_VE = jnp.zeros(table_VE.shape, jnp.float32)
  dtable_VE, dhidden = jax.lax.scan(chunk, zeros_VE, parts)
  return _from_chunks(dhidden), dtable_VE.astype(table_VE.dtype), None


_chunked.defvjp(_forward, _backward)


def _logits(hidden_BCE, table_VE):
  return jnp.einsum(
    "bce,ve->bcv",
    hidden_BCE,
    table_VE.astype(hidden_BCE.dtype),
    preferred_element_type=jnp.float32,
  )


def _to_chunks(x_BT, size):
  b, t, *rest = x_BT.shape
  return x_BT.reshape(b, t // size, size, *rest).swapaxes(0, 1)


def _from_chunks(chunks):
  num_chunks, b, size, *rest = chunks.shape
  return chunks.swapaxes(0, 1).reshape(b, num_chunks * size, *rest)
