"""How the next token is drawn from logits.

Letters: B rows, V vocabulary, R ids that are ranked, most likely first.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import errors

# Below it no id but the most likely one is ever drawn, and float32 nears its end.
COLDEST = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """Which ids may be drawn, and how likely each is. Raises `errors.ConfigError`.

  Hashable, so that it can be a static argument of `jax.jit`.

  Attributes:
    temperature: divides the logits; 0 takes the most likely id, whatever the other settings.
    top_k: only that many of the most likely ids are drawn; 0 leaves all of them.
    top_p: only the fewest of the most likely ids are drawn that together are at least that
      likely (arXiv:1904.09751); 1 leaves all of them. Counted after `temperature` and `top_k`.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if not (self.temperature == 0 or COLDEST <= self.temperature < math.inf):
      raise errors.ConfigError(
        f"temperature={self.temperature} is neither 0 nor a number from {COLDEST} up; take 0 "
        "for the most likely id, or 1 for the model's own distribution."
      )
    is_whole = isinstance(self.top_k, int | np.integer) and not isinstance(self.top_k, bool)
    if not is_whole or self.top_k < 0:
      raise errors.ConfigError(
        f"top_k={self.top_k!r} is not a whole number from 0 up; take 0 to draw from all ids."
      )
    if not 0 < self.top_p <= 1:
      raise errors.ConfigError(
        f"top_p={self.top_p} is not above 0 and at most 1; take 1 to draw from all ids, or "
        "temperature=0 for the most likely one."
      )


def draw(
  logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling, num_ids: int | None = None
) -> jax.Array:
  """Returns an id for each row, int32 [B].

  A row's id depends on its own logits and key alone, not on the rows beside it nor on its
  place among them. The key gives each id its own luck, whatever its rank, so that ids that
  are excluded change the outcome only where they would have been drawn. Of ids that are
  equally likely, the lower ones are the first to be kept, and the lowest is greedy's.

  Args:
    logits_BV: of any floating dtype, read as float32; -inf is never drawn. What is drawn from
      a row without a finite logit, or with a NaN, is undefined.
    keys_B: typed keys of threefry, JAX's default generator; others draw for a batch as one.
    sampling: see there.
    num_ids: ids from there on are never drawn; None is the whole vocabulary. Tables are often
      padded beyond the tokenizer's last id.

  Raises:
    ValueError: not a key for each row, or `num_ids` beyond the vocabulary.
  """
  b, v = logits_BV.shape
  if keys_B.shape != (b,):
    raise ValueError(f"{b} rows of logits need as many keys, got keys of {keys_B.shape}")
  if num_ids is not None and not 0 < num_ids <= v:
    raise ValueError(f"{num_ids=} must be from 1 to the {v} ids that have a logit")
  logits_BV = logits_BV[:, :num_ids].astype(jnp.float32)
  v = logits_BV.shape[1]
  if sampling.temperature == 0:
    return logits_BV.argmax(-1).astype(jnp.int32)

  # The largest becomes 0 first, so that no temperature makes it infinite.
  logits_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / sampling.temperature
  luck_BV = jax.vmap(lambda key: jax.random.gumbel(key, (v,)))(keys_B)
  num_ranked = min(sampling.top_k or v, v)
  if num_ranked == v and sampling.top_p == 1:
    return (logits_BV + luck_BV).argmax(-1).astype(jnp.int32)

  logits_BR, ids_BR = jax.lax.top_k(logits_BV, num_ranked)
  probability_BR = jax.nn.softmax(logits_BR)
  # An id is kept if those before it do not reach `top_p` yet; nothing is before the first.
  before_BR = jnp.cumsum(probability_BR, axis=-1) - probability_BR
  luck_BR = jnp.take_along_axis(luck_BV, ids_BR, axis=-1)
  score_BR = jnp.where(before_BR < sampling.top_p, logits_BR + luck_BR, -jnp.inf)
  chosen_B1 = score_BR.argmax(-1, keepdims=True)
  return jnp.take_along_axis(ids_BR, chosen_B1, axis=-1)[:, 0].astype(jnp.int32)
