"""One training step, a pure function of state, batch and key."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from sparsejax import losses, model, sharding
from sparsejax.attention import ssa
from sparsejax.data import batch as data
from sparsejax.training import state as states

type Metrics = dict[str, jax.Array]
type TrainStep = Callable[
  [states.TrainState, data.Batch, jax.Array], tuple[states.TrainState, Metrics]
]


def make_train_step(
  transformer: model.Transformer,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  loss_options: losses.Options,
  *,
  accumulate_steps: int,
) -> TrainStep:
  """Returns `train_step(state, batch, rng) -> (new_state, metrics)`, to be jitted.

  `rng` is the same key at every step: what is drawn at a step depends on the key and on
  `state.step` alone. Metrics are scalars that stay on the device; read them a step late.

  A step whose loss or gradient is not finite leaves parameters and optimizer as they were,
  and is counted. (`optax.apply_if_finite` would let the bad update in after some tries.)
  """
  options = transformer.options.ssa
  num_layers = transformer.shape.num_hidden_layers
  pattern = transformer.options.pattern
  # Layers that compare two streams; where none does there is nothing to divide.
  num_aligned = max(1, num_layers // len(pattern) * pattern.count("ssa"))

  def train_step(state, batch, rng):
    use_full_L = ssa.toss(rng, state.step, num_layers, options)
    # Known before the first pass, so that parts of a batch add up to the whole exactly.
    num_tokens = jnp.maximum(batch.weights.sum(), 1.0)

    def loss_of_part(params, part):
      output = transformer.apply(
        {"params": params},
        part.inputs,
        part.positions,
        part.segments,
        stream="train",
        use_full_L=use_full_L,
      )
      predictions = losses.next_token(
        output.hidden_BTE,
        model.unembedding(params),
        part.targets,
        chunk_length=loss_options.chunk_length,
      )
      cross_entropy = (predictions.nll * part.weights).sum() / num_tokens
      squared = jnp.square(predictions.log_normalizer)
      z_loss = (squared * part.weights).sum() / num_tokens
      align = output.align_L.sum() / num_aligned / accumulate_steps
      loss = (
        cross_entropy + loss_options.z_loss_weight * z_loss + loss_options.align_weight * align
      )
      accuracy = (predictions.is_hit * part.weights).sum() / num_tokens
      return loss, dict(
        loss=loss, ce=cross_entropy, z_loss=z_loss, align=align, accuracy=accuracy
      )

    grads, metrics = _accumulate(loss_of_part, state.params, batch, accumulate_steps)
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
    params, opt_state = jax.tree.map(
      lambda new, old: jnp.where(is_finite, new, old),
      (params, opt_state),
      (state.params, state.opt_state),
    )
    skipped = 1 - is_finite.astype(jnp.int32)
    new_state = states.TrainState(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      num_skipped=state.num_skipped + skipped,
      num_skipped_in_a_row=(state.num_skipped_in_a_row + 1) * skipped,
    )
    metrics |= dict(
      grad_norm=grad_norm,
      learning_rate=schedule(state.step - state.num_skipped),
      num_tokens=num_tokens,
      full_share=use_full_L.mean(),
      num_skipped=new_state.num_skipped,
      num_skipped_in_a_row=new_state.num_skipped_in_a_row,
    )
    return new_state, metrics

  return train_step


def _accumulate(loss_of_part, params, batch: data.Batch, num_parts: int):
  """Gradients and metrics summed over the parts of a batch."""
  grad = jax.grad(loss_of_part, has_aux=True)
  if num_parts == 1:
    return grad(params, batch)

  def cut(rows):
    # Every num_parts-th row: a device's rows are spread over all parts and never move.
    parts = rows.reshape(-1, num_parts, *rows.shape[1:]).swapaxes(0, 1)
    return sharding.constrain(parts, None, "batch", "length")

  def add_part(total, part):
    return jax.tree.map(jnp.add, total, grad(params, part)), None

  parts = jax.tree.map(cut, batch)
  shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], parts))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return jax.lax.scan(add_part, zeros, parts)[0]
