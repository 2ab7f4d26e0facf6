"""The learning-rate schedule and the chain that turns gradients into updates."""

import dataclasses

import jax
import optax

# Names of parameters that weight decay leaves alone.
_UNDECAYED = ("scale", "bias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Settings; the keys and defaults of `optimizer` in configs/base.py.

  Attributes:
    schedule: a key of `SCHEDULES`.
    peak_lr, end_lr: learning rate after the warm-up, and at the end.
    warmup_steps: length of the linear rise from 0.
    decay_steps: `wsd`: length of the final linear decay.
    b1, b2, eps: of Adam.
    weight_decay: per unit of learning rate, on matrices.
    clip: largest global norm of the gradients.
  """

  schedule: str
  peak_lr: float
  end_lr: float
  warmup_steps: int
  decay_steps: int
  b1: float
  b2: float
  eps: float
  weight_decay: float
  clip: float


def make_schedule(options: Options, num_steps: int) -> optax.Schedule:
  """Learning rate by number of updates made."""
  after_warmup = max(1, num_steps - options.warmup_steps)
  rest = SCHEDULES[options.schedule](options, after_warmup)
  if not options.warmup_steps:
    return rest
  warmup = optax.linear_schedule(0.0, options.peak_lr, options.warmup_steps)
  return optax.join_schedules([warmup, rest], [options.warmup_steps])


def _cosine(options, steps):
  def schedule(count):
    share = optax.cosine_decay_schedule(1.0, steps)(count)
    return options.end_lr + (options.peak_lr - options.end_lr) * share

  return schedule


def _linear(options, steps):
  return optax.linear_schedule(options.peak_lr, options.end_lr, steps)


def _wsd(options, steps):
  """Warm-up, stable, decay (MiniCPM, arXiv:2404.06395)."""
  stable = max(0, steps - options.decay_steps)
  decay = optax.linear_schedule(options.peak_lr, options.end_lr, options.decay_steps)
  return optax.join_schedules([optax.constant_schedule(options.peak_lr), decay], [stable])


def _constant(options, steps):
  del steps
  return optax.constant_schedule(options.peak_lr)


SCHEDULES = {"cosine": _cosine, "linear": _linear, "wsd": _wsd, "constant": _constant}


def make_optimizer(options: Options, schedule: optax.Schedule) -> optax.GradientTransformation:
  """AdamW after clipping by global norm; decay on everything but norms and biases."""
  return optax.chain(
    optax.clip_by_global_norm(options.clip),
    optax.adamw(
      schedule,
      b1=options.b1,
      b2=options.b2,
      eps=options.eps,
      weight_decay=options.weight_decay,
      mask=decayed,
    ),
  )


def decayed(params):
  """Which parameters decay. By name: stacked over layers, a norm's scale is a matrix too."""

  def is_decayed(path, _) -> bool:
    return not any(getattr(key, "key", None) in _UNDECAYED for key in path)

  return jax.tree_util.tree_map_with_path(is_decayed, params)
