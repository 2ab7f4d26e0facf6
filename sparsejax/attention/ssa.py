"""Sparse Sparse Attention (arXiv:2511.20102): two streams and how far they are apart.

Each training step runs the full or the sparse stream through all layers, by the toss of a
coin; in every layer the other one is computed from the same queries, keys and values only
to be compared with it (Algorithm 1).
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

from sparsejax.attention import method


class Ssa(nn.Module):
  """SSA over the two streams of any sparse method."""

  options: method.Options
  sparse: method.SparseMethod

  def __call__(
    self, q_BTHD, k_BTKD, v_BTKD, tokens, stream, past: method.Earlier = None
  ) -> method.Attended:
    if stream != "train":
      return self.sparse(q_BTHD, k_BTKD, v_BTKD, tokens, stream, past)
    full_BTHD, sparse_BTHD = self.sparse.both(q_BTHD, k_BTKD, v_BTKD, tokens)
    align = alignment(full_BTHD, sparse_BTHD, tokens, self.options.ssa)
    out_BTHD = jnp.where(tokens.use_full, full_BTHD, sparse_BTHD)
    return method.Attended(out_BTHD, align)


def alignment(
  full_BTHD, sparse_BTHD, tokens: method.Tokens, options: method.SsaOptions
) -> jax.Array:
  """The alignment loss of one layer, a float32 scalar (equations 7 to 9).

  Each stream is pulled to the other, which is held fixed: `full_follows_sparse` is the
  paper's L_sparsity, `sparse_follows_full` its L_commit. The mean is over all elements of
  the row, padding counting as no difference.

  `align_after_gate` compares the gated outputs, as the released code does, so that the
  gate learns from the loss too; Algorithm 1 compares them before the gate.
  """
  full_BTHD, sparse_BTHD = full_BTHD.astype(jnp.float32), sparse_BTHD.astype(jnp.float32)
  if options.align_after_gate and tokens.gate_BTH is not None:
    gate_BTH1 = tokens.gate_BTH.astype(jnp.float32)[..., None]
    full_BTHD, sparse_BTHD = full_BTHD * gate_BTH1, sparse_BTHD * gate_BTH1
  is_real_BT11 = (tokens.segments_BT > 0)[:, :, None, None]
  distance = _DISTANCES[options.align_loss]

  def pull(moving, fixed):
    difference = jnp.where(is_real_BT11, moving - jax.lax.stop_gradient(fixed), 0.0)
    return distance(difference).mean()

  loss = jnp.float32(0)
  if options.align_direction in ("both", "full_follows_sparse"):
    loss += pull(full_BTHD, sparse_BTHD)
  if options.align_direction in ("both", "sparse_follows_full"):
    loss += pull(sparse_BTHD, full_BTHD)
  return loss


def _smooth_l1(x):
  """Huber's loss with its knee at 1, as torch's SmoothL1Loss."""
  size = jnp.abs(x)
  return jnp.where(size < 1.0, 0.5 * x * x, size - 0.5)


_DISTANCES = {"smooth_l1": _smooth_l1, "l2": jnp.square}


def toss(rng: jax.Array, step: jax.Array, num_layers: int, options: method.SsaOptions):
  """Which layers run on the full stream at a step, bool [L].

  A function of the key and the step, so that every host tosses the same coin and a resumed
  run tosses those it would have tossed. `coin="layer"` is the ablation in which each layer
  tosses its own ("Random Each Layer" of Table 3).
  """
  rng = jax.random.fold_in(rng, step)
  shape = (num_layers,) if options.coin == "layer" else ()
  coin = jax.random.bernoulli(rng, options.full_ratio, shape)
  return jnp.broadcast_to(coin, (num_layers,))
