"""Texts are drawn from the model's own distribution by a key for each prompt and place."""

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import sharding
from sparsejax.decoding import generate as generation
from sparsejax.decoding import sampling as samplings
from tests.sparsejax.decoding.models import at_once, model_of

# More than rows, so that rows are used again; two of them are the same.
PROMPTS = [5, 6, 7], [9] * 13, [5, 6, 7], [1], list(range(20, 28))
NUM_NEW, LENGTH, SEED = 6, 24, 3
FREE = samplings.Sampling(temperature=1.0)


def test_every_draw_has_a_key_of_its_prompt_and_of_its_place_in_the_text():
  transformer, params = model_of("moba")
  types = (jax.sharding.AxisType.Auto,) * 3
  mesh = jax.make_mesh((1, 1, 1), sharding.AXES, types, devices=jax.devices()[:1])
  texts = generation.generate(
    transformer,
    params,
    PROMPTS,
    max_new_tokens=NUM_NEW,
    stream="sparse",
    mesh=mesh,
    sampling=FREE,
    seed=SEED,
    rows=2,
    length=LENGTH,
  )
  ids_BT = np.zeros((len(PROMPTS), LENGTH), np.int32)
  for number, prompt in enumerate(PROMPTS):
    ids_BT[number, : len(prompt) + NUM_NEW] = [*prompt, *texts[number]]
  logits_BTV = at_once(transformer, params, jnp.asarray(ids_BT), "sparse")
  for number, prompt in enumerate(PROMPTS):
    key = jax.random.fold_in(jax.random.key(SEED), number)
    keys_T = jnp.stack([jax.random.fold_in(key, place) for place in range(NUM_NEW)])
    # The first is drawn from what the last token of the prompt says.
    logits_TV = logits_BTV[number, len(prompt) - 1 :][:NUM_NEW]
    assert texts[number] == samplings.draw(jnp.asarray(logits_TV), keys_T, FREE).tolist()
  assert texts[0] != texts[2]
