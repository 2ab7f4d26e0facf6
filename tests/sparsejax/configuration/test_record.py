"""What a run was: its hash, its record, and which changes a resumed run may make."""

import json
import pathlib
import subprocess
import sys

import jax
import pytest

from configs import base, smoke
from sparsejax import errors
from sparsejax.configuration import build, overrides, record
from tests import small

ROOT = pathlib.Path(__file__).parents[3]
KEYS = overrides.flatten(base.get_config())

# The promise to people who resume a run, written out a second time on purpose.
MAY_CHANGE = {
  "model.remat",
  "attention.kernels",
  "attention.full_implementation",
  "attention.sparse_implementation",
  "loss.chunk_length",
  "data.num_workers",
  "data.num_threads",
  "train.log_every",
  "train.eval_every",
  "train.eval_batches",
  "train.save_every",
  "train.keep_latest",
  "train.keep_every",
  "train.keep_best",
  "train.max_nonfinite_steps",
  "train.init_from",
  "train.sample_tokens",
  "train.peak_tflops",
  "train.tensorboard",
  "train.wandb_project",
  "train.watchdog_minutes",
  "mesh.data",
  "mesh.fsdp",
  "mesh.tensor",
  "diagnostics.enabled",
  "diagnostics.num_rows",
  "diagnostics.num_queries",
  "diagnostics.num_sink_keys",
  "diagnostics.tile",
}


def another(value):
  match value:
    case bool():
      return not value
    case int() | float():
      return value + 1
    case str():
      return value + "x"
    case tuple():
      return (*value, "x")
    case None:
      return None
  raise TypeError(value)


def changed(key):
  """The base config with one key changed."""
  config = base.get_config()
  holder, name = config, key
  while "." in name:
    section, _, name = name.partition(".")
    holder = holder[section]
  value = another(holder[name])
  if value is None:
    value = 1.0 if holder.get_type(name) is float else "x"
  holder[name] = value
  return config


def test_the_hash_changes_with_every_key():
  digests = {record.digest(changed(key)) for key in KEYS}
  assert len(digests | {record.digest(base.get_config())}) == len(KEYS) + 1


def test_the_hash_is_the_same_in_every_process():
  code = (
    "from configs import smoke; from sparsejax.configuration import record; "
    "print(record.digest(smoke.get_config()))"
  )
  found = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
  )
  assert found.stdout.strip() == record.digest(smoke.get_config())
  assert len(record.digest(smoke.get_config())) == 12


def test_as_json_survives_json():
  flat = record.as_json(base.get_config())
  assert json.loads(json.dumps(flat)) == flat
  assert flat["data.sources"] == ["data/smollm"]
  assert list(flat) == list(KEYS)


def test_a_config_comes_back_from_its_json():
  config = small.make_config(data__weights=(2.0,), attention__method="moba")
  restored = record.restore(record.as_json(config), base.get_config())
  assert overrides.flatten(restored) == overrides.flatten(config)
  assert restored.data.sources == ("stdlib",)
  with pytest.raises(AttributeError):
    restored.new = 1


def test_a_key_that_a_save_lacks_is_the_templates():
  flat = record.as_json(small.make_config())
  del flat["loss.chunk_length"]
  assert record.restore(flat, base.get_config()).loss.chunk_length == 512


def test_restoring_leaves_the_template_alone():
  template = base.get_config()
  record.restore(record.as_json(small.make_config()), template)
  assert record.digest(template) == record.digest(base.get_config())


def test_a_key_of_a_later_version_is_refused():
  flat = record.as_json(base.get_config()) | {"model.later": 1}
  with pytest.raises(
    errors.CheckpointError, match=r"has a key 'model.later' that this version"
  ):
    record.restore(flat, base.get_config())


@pytest.mark.parametrize("key", KEYS)
def test_a_change_of_what_is_computed_is_refused_by_name(key):
  saved, config = record.as_json(base.get_config()), changed(key)
  if key in MAY_CHANGE:
    record.check_same(saved, config, (), "runs/a/checkpoints/7")
    return
  new = record.as_json(config)[key]
  with pytest.raises(errors.CheckpointError) as caught:
    record.check_same(saved, config, (), "runs/a/checkpoints/7")
  message = str(caught.value)
  assert message.startswith("runs/a/checkpoints/7 was made with another configuration:\n")
  assert f"\n  {key}: {saved[key]!r} -> {new!r}\n" in message
  assert message.endswith(f"--allow_config_change={key}")
  record.check_same(saved, config, (key,), "there")
  if "." in key:
    record.check_same(saved, config, (key.partition(".")[0],), "there")


def test_allowing_one_key_allows_no_other():
  saved, config = record.as_json(base.get_config()), base.get_config()
  config.optimizer.peak_lr, config.data.batch_size = 0.5, 48
  with pytest.raises(errors.CheckpointError) as caught:
    record.check_same(saved, config, ("optimizer", "data.batch"), "there")
  assert "optimizer" not in str(caught.value)
  assert "--allow_config_change=data.batch_size" in str(caught.value)


def test_all_changes_are_listed_in_one_flag():
  saved, config = record.as_json(base.get_config()), base.get_config()
  config.optimizer.peak_lr, config.seed = 0.5, 1
  with pytest.raises(errors.CheckpointError) as caught:
    record.check_same(saved, config, (), "there")
  assert str(caught.value).endswith("--allow_config_change=optimizer.peak_lr,seed")


def test_a_key_that_only_one_side_has_is_a_difference():
  saved = record.as_json(base.get_config())
  old = {key: value for key, value in saved.items() if key != "ssa.coin"}
  assert record.differences(old, base.get_config()) == {"ssa.coin": (None, "step")}
  newer = saved | {"ssa.later": 2}
  assert record.differences(newer, base.get_config()) == {"ssa.later": (2, None)}


def test_a_run_writes_its_config_once_and_its_environment_at_every_start(tmp_path):
  config = small.make_config()
  record.write(config, tmp_path, ["full_attention: xla (slow)"])
  config.train.log_every = 5
  record.write(config, tmp_path, ["full_attention: cudnn (fast)"])
  written = json.loads((tmp_path / "config.json").read_text())
  assert written == dict(hash=record.digest(config), config=record.as_json(config))
  starts = [json.loads(x) for x in (tmp_path / "environment.jsonl").read_text().splitlines()]
  assert [start["config_hash"] for start in starts] == [
    record.digest(small.make_config()),
    record.digest(config),
  ]
  backends = [start["backends"] for start in starts]
  assert backends == [["full_attention: xla (slow)"], ["full_attention: cudnn (fast)"]]
  start = starts[0]
  assert start["versions"]["jax"] == jax.__version__
  assert set(start["versions"]) == set(record.PACKAGES)
  assert start["device"] == jax.devices()[0].device_kind
  assert start["num_devices"] == 8
  assert start["command"][1:] == sys.argv[1:]
  assert start["python"] == sys.version.split()[0]
  assert start["time"].endswith("+00:00")
  assert start["commit"]


@pytest.mark.parametrize(
  ("program", "recorded"),
  [
    (f"{ROOT}/sparsejax/decode_shapes.py", "sparsejax/decode_shapes.py"),
    ("train.py", "train.py"),
    ("/elsewhere/train.py", "/elsewhere/train.py"),
  ],
)
def test_a_program_of_this_repository_is_recorded_by_its_place_in_it(
  monkeypatch, program, recorded
):
  monkeypatch.setattr(sys, "argv", [program, "--config=x"])
  assert record.environment()["command"] == [recorded, "--config=x"]


def test_the_commit_may_be_told(monkeypatch):
  """With a repository or without: a copy's repository need not be the source's."""
  monkeypatch.setenv("SPARSEJAX_COMMIT", "abc")
  assert record.commit() == "abc"
  monkeypatch.setenv("PATH", "")
  assert record.commit() == "abc"
  monkeypatch.delenv("SPARSEJAX_COMMIT")
  assert record.commit() == "unknown"


def test_a_package_that_is_not_there_is_said_so(monkeypatch):
  monkeypatch.setattr(record, "PACKAGES", ("no-such-package-of-anybody",))
  versions = record.environment()["versions"]
  assert versions == {"no-such-package-of-anybody": "not installed"}


def test_objects_are_built_from_their_keys():
  config = small.make_config(
    model__rope_scaling=dict(
      rope_type="llama3",
      factor=8.0,
      low_freq_factor=2.0,
      high_freq_factor=3.0,
      original_max_position_embeddings=128,
    ),
    ssa__align_weight=7.0,
    loss__z_loss_weight=0.5,
    attention__selection="half_local",
  )
  transformer = build.make_model(config, max_documents=9)
  assert transformer.shape.hidden_size == 32
  assert transformer.shape.rope_scaling.factor == 8.0
  assert transformer.options.selection == "half_local"
  assert transformer.options.ssa.align_weight == 7.0
  assert transformer.options.max_documents == 9
  options = build.make_loss_options(config)
  assert (options.align_weight, options.z_loss_weight, options.chunk_length) == (7.0, 0.5, 24)


def test_the_schedule_spans_the_run():
  config = small.make_config(optimizer__peak_lr=0.5)
  _, schedule = build.make_optimizer(config)
  assert float(schedule(2)) == pytest.approx(0.5)
  assert float(schedule(6)) == pytest.approx(0.0, abs=1e-7)
  assert float(schedule(5)) > 0.01


def test_a_budget_changes_the_blocks_and_nothing_else():
  transformer = small.make_model()
  wider = build.with_budget(transformer, 48)
  assert wider.options.num_blocks == 6
  assert wider.options.budget == 48
  assert wider.options.block_size == transformer.options.block_size
  assert wider.shape == transformer.shape


def test_synthetic_data_follow_the_config(tmp_path):
  config = small.make_config(data__sources=("recall",), data__recall_pairs=2)
  config.data.recall_queries = 2
  corpus = build.make_corpus(config, tmp_path)
  assert corpus.sources[0].name == "recall"
  assert corpus.sources[0].train[0].inputs.shape == (64,)
