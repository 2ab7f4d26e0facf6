"""Config files and the overrides of the command line."""

import pathlib

import ml_collections
import pytest

from configs import base
from sparsejax import errors
from sparsejax.configuration import checks, overrides

ROOT = pathlib.Path(__file__).parents[3]
PRESETS = sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py"))


def load(*arguments, preset="base"):
  return overrides.load(str(ROOT / "configs" / f"{preset}.py"), arguments)


def get(config, key):
  return overrides.flatten(config)[key]


def write_config(folder, body):
  path = folder / "mine.py"
  path.write_text(body)
  return str(path)


@pytest.mark.parametrize(
  ("argument", "key", "value"),
  [
    ("seed=7", "seed", 7),
    ("train.num_steps=1000", "train.num_steps", 1000),
    ("train.num_steps=1e3", "train.num_steps", 1000),
    ("train.num_steps=1_000", "train.num_steps", 1000),
    ("train.num_steps=5.0", "train.num_steps", 5),
    ("ssa.full_ratio=1", "ssa.full_ratio", 1.0),
    ("optimizer.peak_lr=3e-4", "optimizer.peak_lr", 3e-4),
    ("attention.method=moba", "attention.method", "moba"),
    ("attention.method='moba'", "attention.method", "moba"),
    ("model.remat=none", "model.remat", "none"),
    ("attention.gate=false", "attention.gate", False),
    ("attention.gate=0", "attention.gate", False),
    ("attention.gate=No", "attention.gate", False),
    ("train.tensorboard=yes", "train.tensorboard", True),
    ("train.tensorboard", "train.tensorboard", True),
    ("model.rope_scaling.factor=8", "model.rope_scaling.factor", 8.0),
    ("data.sources=stdlib", "data.sources", ("stdlib",)),
    ("data.sources=a/b,c", "data.sources", ("a/b", "c")),
    ("data.sources=('a', 'b')", "data.sources", ("a", "b")),
    ("data.sources=['a']", "data.sources", ("a",)),
    ("data.weights=1,0.5", "data.weights", (1, 0.5)),
    ("data.weights=()", "data.weights", ()),
    ("mesh.data=-1", "mesh.data", -1),
    ("train.init_from=runs/a", "train.init_from", "runs/a"),
    ("train.init_from=none", "train.init_from", None),
    ("train.peak_tflops=989", "train.peak_tflops", 989.0),
    ("train.peak_tflops=None", "train.peak_tflops", None),
    ("train.wandb_project=a=b", "train.wandb_project", "a=b"),
  ],
)
def test_an_override_takes_the_type_of_its_key(argument, key, value):
  read = get(load(f"--config.{argument}"), key)
  assert read == value
  assert type(read) is type(value)


def test_a_negated_flag_is_false():
  assert load("--noconfig.attention.gate").attention.gate is False


def test_the_last_of_two_overrides_wins_and_a_filled_key_can_be_emptied():
  arguments = ["--config.train.init_from=a", "--config.train.init_from=none"]
  assert load(*arguments).train.init_from is None
  arguments = ["--config.train.peak_tflops=1", "--config.train.peak_tflops=null"]
  assert load(*arguments).train.peak_tflops is None
  assert load("--config.seed=1", "--config.seed=2").seed == 2


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    (
      "train.num_steps=1.5",
      r"'train.num_steps' takes a whole number \(1000, 1_000 or 1e3\); '1",
    ),
    ("train.num_steps=many", r"takes a whole number .*; 'many' is none"),
    ("train.num_steps=none", r"'train.num_steps' takes a whole number .*; not None"),
    ("train.num_steps", r"takes a whole number .*; 'true' is none"),
    ("optimizer.peak_lr=fast", r"'optimizer.peak_lr' takes a number; 'fast' is none"),
    ("attention.gate=maybe", r"'attention.gate' takes true or false; 'maybe' is none"),
    ("train.peak_tflops=lots", r"'train.peak_tflops' takes a number; 'lots' is none"),
  ],
)
def test_a_wrong_type_is_refused_with_an_example(argument, message):
  with pytest.raises(errors.ConfigError, match=message):
    load(f"--config.{argument}")


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    (
      "attention.num_block=4",
      r"unknown config key 'attention.num_block'. .*'attention.num_blo",
    ),
    ("atention.num_blocks=4", r"Did you mean 'attention.num_blocks'"),
    ("num_blocks=4", r"Did you mean 'attention.num_blocks'"),
    ("train.batch_size=4", r"Did you mean 'data.batch_size'"),
    ("model.rope_scaling.factors=4", r"'model.rope_scaling.factor'"),
    ("seeed=4", r"Did you mean 'seed'\? Top-level keys: attention, data, diagnostics, infll"),
    ("zzzz=4", r"unknown config key 'zzzz'\. Top-level keys"),
    ("loss.zzzz=4", r"'loss.zzzz'\. Keys of 'loss': chunk_length, ignore_first"),
    ("seed.inner=4", r"unknown config key 'seed.inner'"),
    ("model=4", r"'model' is a section; set one of its keys: model.dtype, "),
  ],
)
def test_an_unknown_key_gets_the_nearest_names(argument, message):
  with pytest.raises(errors.ConfigError, match=message):
    load(f"--config.{argument}")


@pytest.mark.parametrize(
  ("theirs", "ours"),
  [
    ("block_counts", "attention.num_blocks"),
    ("topk", "attention.num_blocks"),
    ("batch", "data.batch_size"),
    ("seq_len", "data.sequence_length"),
    ("learning_rate", "optimizer.peak_lr"),
    ("optimizer.lr", "optimizer.peak_lr"),
    ("train.steps", "train.num_steps"),
    ("gradient_accumulation_steps", "train.accumulate_steps"),
  ],
)
def test_names_of_other_codebases_are_understood(theirs, ours):
  with pytest.raises(errors.ConfigError, match=rf"Did you mean '{ours}'"):
    load(f"--config.{theirs}=4")


def test_names_of_other_codebases_lead_to_keys_that_exist():
  assert set(overrides.ALSO_KNOWN_AS.values()) <= set(overrides.flatten(base.get_config()))


def test_only_config_arguments_are_overrides():
  assert overrides.is_override("--config.seed=1")
  assert overrides.is_override("--noconfig.attention.gate")
  assert not overrides.is_override("--config=configs/base.py")
  assert not overrides.is_override("--workdir=--config.seed=1")


@pytest.mark.parametrize(
  ("body", "message"),
  [
    ("x = 1", r"mine.py has no function get_config\(\)"),
    ("def get_config():\n  return {}", r"returned dict; it must return a ConfigDict"),
    ("def get_config():\n  raise ValueError('one\\ntwo')", r"as a config: one$"),
    ("def get_config(:", r"mine.py cannot be read as a config: .*"),
    ("import no_such_module_of_anybody", r"No module named 'no_such_module_of_anybody'"),
    (
      "from configs import base\ndef get_config():\n"
      "  c = base.get_config()\n  c.train.num_step = 3\n  return c",
      r"mine.py cannot be read as a config: .*num_step",
    ),
    (
      "from configs import base\ndef get_config():\n"
      "  c = base.get_config()\n  c.train.num_steps = 'a'\n  return c",
      r"mine.py cannot be read as a config: .*",
    ),
  ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, body, message):
  with pytest.raises(errors.ConfigError, match=message) as caught:
    overrides.load(write_config(tmp_path, body))
  assert "\n" not in str(caught.value)
  assert "Other fields" not in str(caught.value)


def test_a_missing_file_gets_the_nearest_presets(monkeypatch):
  monkeypatch.chdir(ROOT)
  with pytest.raises(errors.ConfigError, match=r"no config .*Did you mean configs/smoke.py"):
    overrides.load("configs/smok.py")
  with pytest.raises(errors.ConfigError, match=r"--list_configs shows the presets"):
    overrides.load("zzzz")


def test_a_file_that_is_not_python_is_refused(tmp_path):
  (tmp_path / "base.yaml").write_text("seed: 1")
  with pytest.raises(errors.ConfigError, match=r"a config file ends in \.py"):
    overrides.load(str(tmp_path / "base.yaml"))


def test_a_loaded_config_takes_no_new_key(tmp_path):
  body = (
    "from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict(dict(a=1))"
  )
  with pytest.raises(AttributeError):
    overrides.load(write_config(tmp_path, body)).new = 1


def test_every_preset_is_listed_with_its_docstring():
  listed = overrides.presets(ROOT / "configs")
  assert [pathlib.Path(path).stem for path in listed] == PRESETS
  assert all(docstring.endswith(".") for docstring in listed.values())
  assert listed[str(ROOT / "configs/ssa_1b.py")] == (
    "Sparse Sparse Attention, 1B (arXiv:2511.20102, Table A1)."
  )


def test_a_preset_without_docstring_is_listed_too(tmp_path):
  write_config(tmp_path, "x = 1")
  assert list(overrides.presets(tmp_path).values()) == [""]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_passes_the_checks_and_has_the_keys_of_base(preset):
  config = load(preset=preset)
  checks.check(config)
  assert list(overrides.flatten(config)) == list(overrides.flatten(base.get_config()))


@pytest.mark.parametrize("preset", ["full_1b", "moba_1b", "nsa_1b", "ssa_1b"])
def test_the_1b_presets_are_the_papers_table_a1(preset):
  config = load(preset=preset)
  assert config.attention.method == preset.removesuffix("_1b")
  published = {
    "attention.block_size": 16,
    "attention.num_blocks": 16,
    "attention.gate": preset != "nsa_1b",  # which has a gate for every branch
    "model.hidden_size": 2048,
    "model.intermediate_size": 8192,
    "model.num_hidden_layers": 16,
    "model.num_attention_heads": 32,
    "model.num_key_value_heads": 2,
    "model.head_dim": 64,
    "model.vocab_size": 128256,
    "model.rms_norm_eps": 1e-5,
    "model.initializer_range": 0.02,
    "model.tie_word_embeddings": True,
    "model.dtype": "bfloat16",
    "model.rope_theta": 500_000.0,
    "model.rope_scaling.rope_type": "default",
    "model.rope_scaling.factor": 4.0,
    "model.rope_scaling.low_freq_factor": 1.0,
    "model.rope_scaling.high_freq_factor": 4.0,
    "model.rope_scaling.original_max_position_embeddings": 8192,
    "ssa.full_ratio": 0.5,
    "ssa.align_weight": 10.0,
    "data.sequence_length": 8192,
    "data.batch_size": 384,
    "optimizer.schedule": "cosine",
    "optimizer.peak_lr": 1e-3,
    "optimizer.end_lr": 0.0,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.95,
    "optimizer.weight_decay": 0.1,
    "optimizer.clip": 1.0,
    "seed": 42,
  }
  flat = overrides.flatten(config)
  assert {key: flat[key] for key in published} == published
  # 100B tokens, of which a hundredth warms up.
  tokens = config.train.num_steps * config.data.batch_size * config.data.sequence_length
  assert abs(tokens / 100e9 - 1) < 0.01
  assert config.optimizer.warmup_steps == config.train.num_steps // 100


def test_text_has_a_line_for_every_key():
  config = load("--config.seed=3", preset="smoke")
  lines = overrides.as_text(config).splitlines()
  assert "seed = 3" in lines
  assert "model.rope_scaling.rope_type = 'default'" in lines
  assert "data.sources = ('stdlib',)" in lines
  assert "train.init_from = None" in lines
  assert [line.partition(" = ")[0] for line in lines] == list(overrides.flatten(config))


def test_flattening_names_leaves_by_their_path():
  config = ml_collections.ConfigDict(dict(b=dict(z=1, a=dict(c=2)), a=3))
  assert overrides.flatten(config) == {"a": 3, "b.a.c": 2, "b.z": 1}


@pytest.mark.parametrize(
  ("preset", "method"),
  [
    ("infllmv2_1b", "infllmv2"),
    ("dma_1b", "dma"),
    ("nosa_1b", "nosa"),
    ("ssa_nosa_1b", "ssa"),
    ("nosa_3b", "nosa"),
    ("nosa_8b", "nosa"),
  ],
)
def test_presets_of_the_long_stage_have_nosas_setting(preset, method):
  config = load(preset=preset)
  assert config.attention.method == method
  published = {
    "attention.block_size": 64,
    "attention.num_blocks": 64,
    "infllmv2.num_initial": 1,
    "infllmv2.num_local": 16,
    "infllmv2.local_window": "paper",
    "infllmv2.window_size": 32,
    "infllmv2.window_stride": 16,
    "infllmv2.num_windows": 5,
    "nosa.num_query_aware": 16,
    "nosa.eviction_head": "ed_dma",
    "model.num_key_value_heads": 2,
    "data.sequence_length": 16384,
  }
  flat = overrides.flatten(config)
  assert {key: flat[key] for key in published} == published
  tokens = flat["train.num_steps"] * flat["data.batch_size"] * flat["data.sequence_length"]
  assert tokens == pytest.approx(5e9, rel=1e-3)


def test_nosas_8b_shape():
  model = load(preset="nosa_8b").model
  assert (model.num_hidden_layers, model.hidden_size) == (32, 4096)
  assert (model.num_attention_heads, model.num_key_value_heads, model.head_dim) == (32, 2, 128)


def test_blocks_and_windows_of_base_are_a_quarter_of_nosas():
  """So that the bound on locality is the paper's."""
  ours, paper = (overrides.flatten(load(preset=p)) for p in ("nosa_20m", "nosa_1b"))
  for key in (
    "attention.block_size",
    "attention.num_blocks",
    "infllmv2.num_local",
    "infllmv2.window_size",
    "infllmv2.window_stride",
    "nosa.num_query_aware",
  ):
    assert 4 * ours[key] == paper[key], key
