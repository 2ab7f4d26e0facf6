"""Beginning with the weights of a run whose layers ran something else."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import checkpoint, errors, parameters, sharding
from sparsejax.configuration import build, record
from sparsejax.training import continuation
from tests import small

LAYERS = 4


@flax.struct.dataclass
class State:
  """As much of a state as there is to begin with."""

  step: jax.Array
  params: dict
  opt_state: dict


def make_config(*layer_methods, **changes):
  return small.make_config(
    attention__layer_methods=layer_methods, model__num_hidden_layers=LAYERS, **changes
  )


def make_params(config, seed, **sizes):
  """Random parameters of a config's model, laid out over a mesh of all devices."""
  rng = np.random.default_rng(seed)
  mesh = sharding.make_mesh(**dict(data=-1, fsdp=1, tensor=1) | sizes)
  transformer = build.make_model(config, max_documents=4)
  return jax.tree.map(
    lambda x: jax.device_put(0.3 * rng.normal(size=x.shape).astype("f4"), x.sharding),
    parameters.abstract(transformer, mesh),
  )


def make_new(config, **sizes):
  """The model, and parameters that no checkpoint has."""
  return build.make_model(config, max_documents=4), make_params(config, 5, **sizes)


def save(directory, config):
  """A checkpoint of random parameters: its path, and what is in it."""
  params = make_params(config, 0)
  checkpoints = checkpoint.Checkpoints(directory, keep_latest=1, keep_every=0, keep_best=0)
  about = checkpoint.Record(
    next_row=0, corpus="c", tokenizer="t", config=record.as_json(config)
  )
  state = State(jnp.int32(1), params, {"mu": {"norm": {"scale": jnp.zeros(3)}}})
  checkpoints.save(state, about, wait=True)
  checkpoints.close()
  return checkpoint.find(directory), jax.device_get(params)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Makes the checkpoint of a config, once."""
  made = {}

  def make(config):
    key = config.to_json_best_effort()
    if key not in made:
      made[key] = save(tmp_path_factory.mktemp("run"), config)
    return made[key]

  return make


def layer_of(params, pattern, layer):
  stack = params["layers"]
  if len(pattern) > 1:
    stack = stack[str(layer % len(pattern))]
  return jax.tree.map(lambda x: np.asarray(x[layer // len(pattern)]), stack)


FULL, MOBA_FULL, NSA_FULL = ("full",), ("moba", "full"), ("nsa", "full")


@pytest.mark.parametrize(
  ("before", "after", "lacking"),
  [
    (FULL, ("moba",), ()),
    (FULL, MOBA_FULL, ()),
    (MOBA_FULL, FULL, ()),
    (MOBA_FULL, ("full", "moba", "moba", "sliding_window"), ()),
    (FULL, NSA_FULL, (0, 2)),
    (NSA_FULL, ("nsa",), (1, 3)),
    (NSA_FULL, NSA_FULL, ()),
  ],
  ids=lambda names: "-".join(map(str, names)),
)
def test_every_layer_gets_its_own_weights(saved, before, after, lacking):
  """And, of the methods' own, those that the checkpoint lacks stay as they were made."""
  path, old = saved(make_config(*before))
  config = make_config(*after)
  _, new = make_new(config)
  params, notes = continuation.load(path, new, config)
  jax.tree.map(lambda a, b: np.testing.assert_equal(a.sharding, b.sharding), params, new)
  np.testing.assert_array_equal(
    params["embed_tokens"]["embedding"], old["embed_tokens"]["embedding"]
  )
  for layer in range(LAYERS):
    got, made = (layer_of(tree, after, layer) for tree in (params, new))
    expected = layer_of(old, before, layer)
    if layer in lacking:
      expected["self_attn"]["sparse"] = made["self_attn"]["sparse"]
    jax.tree.map(np.testing.assert_array_equal, got, expected)
  told = [note for note in notes if "is new" in note]
  assert len(told) == (11 if lacking else 0)
  for note in told:
    assert "/self_attn/sparse/" in note
    # A stack is named whole, or with the layers that are new in it.
    assert (" of layers 1, 3 is new" in note) == (after == ("nsa",))


def test_weights_come_to_lie_where_the_model_wants_them(saved):
  path, old = saved(make_config(*FULL))
  config = make_config(*MOBA_FULL)
  _, new = make_new(config, data=2, fsdp=2, tensor=2)
  params, _ = continuation.load(path, new, config)
  query = params["layers"]["1"]["self_attn"]["q_proj"]["kernel"]
  assert tuple(query.sharding.spec) == (None, "fsdp", "tensor", None)
  np.testing.assert_array_equal(query, old["layers"]["self_attn"]["q_proj"]["kernel"][1::2])


@pytest.mark.parametrize(
  ("changes", "stream"),
  [
    (dict(attention__method="moba"), "full"),
    (dict(attention__method="ssa"), "train"),
    (dict(attention__method="sliding_window", attention__window=64), "train"),
    (dict(attention__method="moba", attention__num_blocks=8), "train"),
  ],
)
def test_where_a_method_reads_everything_step_0_is_the_old_model(saved, changes, stream):
  before = make_config(attention__method="full")
  path, old = saved(before)
  batch = small.make_batch()
  config = make_config(**changes)
  transformer, new = make_new(config)
  params, _ = continuation.load(path, new, config)

  old_model = build.make_model(before, max_documents=4)
  np.testing.assert_allclose(
    small.run(transformer, jax.device_get(params), batch, stream).hidden_BTE,
    small.run(old_model, old, batch, "train").hidden_BTE,
    atol=1e-5,
  )


def test_an_eviction_head_has_no_say_at_step_0(saved):
  """Full attention's weights, and a head as it begins: the full stream is the old model."""
  before = make_config(attention__method="full")
  path, old = saved(before)
  config, batch = make_config(attention__method="nosa"), small.make_batch()
  transformer = build.make_model(config, max_documents=4)
  params, notes = continuation.load(path, small.make_params(transformer), config)
  assert sum("sparse/head/" in note and "is new" in note for note in notes) == 2
  outputs = [
    small.run(model, params, batch, stream).hidden_BTE
    for model, params, stream in (
      (transformer, params, "full"),
      (build.make_model(before, max_documents=4), old, "train"),
    )
  ]
  np.testing.assert_allclose(*outputs, atol=1e-5)


@pytest.mark.parametrize(
  ("before", "after", "message"),
  [
    (
      make_config(),
      make_config(attention__gate=False),
      r"layers/self_attn/g_proj/kernel: float32\[4, 32, 4\] saved, unknown to this model",
    ),
    (
      make_config(*NSA_FULL),
      make_config(*FULL),
      r"layers/0/self_attn/sparse/branch_gate/kernel: float32\[2, 32, 3, 4\] saved, unknown "
      "to this model",
    ),
    (
      make_config(attention__method="nsa"),
      make_config(*NSA_FULL),
      r"layers/self_attn/sparse/k_win/kernel: float32\[4, 32, 2, 8\] saved, unknown to this "
      r"model's layers 1, 3",
    ),
    (
      make_config(),
      make_config(*MOBA_FULL, model__hidden_size=48),
      r"embed_tokens/embedding: float32\[320, 32\] saved, float32\[320, 48\] wanted",
    ),
    (
      make_config(),
      make_config(model__vocab_size=384),
      r"embed_tokens/embedding: float32\[320, 32\] saved, float32\[384, 32\] wanted",
    ),
    (
      make_config(),
      make_config(*MOBA_FULL, model__intermediate_size=40),
      r"layers/mlp/up_proj/kernel: float32\[4, 32, 48\] saved, float32\[2, 32, 40\] wanted",
    ),
  ],
  ids=["gate", "own_weights", "of_some_layers", "width", "ids", "within_layers"],
)
def test_what_does_not_fit_is_refused_by_name(saved, before, after, message):
  path, _ = saved(before)
  _, new = make_new(after)
  with pytest.raises(errors.CheckpointError, match=message) as caught:
    continuation.load(path, new, after)
  assert str(caught.value).startswith(f"{path} is of another model:\n")
  assert str(caught.value).endswith("set the keys of model and attention to fit.")


def test_another_number_of_layers_is_refused(saved):
  path, _ = saved(make_config())
  config = make_config(*MOBA_FULL)
  config.model.num_hidden_layers = 2
  _, new = make_new(config)
  with pytest.raises(errors.CheckpointError, match="\n  4 layers saved, 2 wanted\n"):
    continuation.load(path, new, config)


def test_long_lists_of_refusals_are_cut(saved):
  path, _ = saved(make_config(attention__method="nsa"))
  config = make_config(attention__method="full")
  _, new = make_new(config)
  with pytest.raises(errors.CheckpointError, match="\n  and 3 more\n") as caught:
    continuation.load(path, new, config)
  assert str(caught.value).count("unknown to this model") == 8


def test_changes_of_use_are_said(saved):
  """Longer rows and other frequencies are what a long-context stage is."""
  path, _ = saved(make_config(attention__method="full"))
  config = make_config(attention__method="moba", data__sequence_length=128)
  config.model.rope_scaling.update(rope_type="llama3", original_max_position_embeddings=64)
  config.optimizer.peak_lr = 0.5
  config.nosa.eviction_head = "dma"
  _, new = make_new(config)
  _, notes = continuation.load(path, new, config)
  assert notes == [
    f"weights are those of {path}",
    "train.init_from: attention.method was 'full', is 'moba'",
    "train.init_from: data.sequence_length was 64, is 128",
    "train.init_from: model.rope_scaling.original_max_position_embeddings was 8192, is 64",
    "train.init_from: model.rope_scaling.rope_type was 'default', is 'llama3'",
    "train.init_from: nosa.eviction_head was 'ed_dma', is 'dma'",
  ]


def test_damaged_weights_are_refused(tmp_path):
  path, _ = save(tmp_path, make_config())
  _, new = make_new(make_config())
  for file in (path / "state").rglob("_METADATA"):
    file.unlink()
  with pytest.raises(errors.CheckpointError, match="is damaged: "):
    continuation.load(path, new, make_config())
