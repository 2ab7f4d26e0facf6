"""What the programs say before they do anything, and to a mistake."""

import re
import sys

import pytest

from tests.end_to_end import programs


@pytest.mark.parametrize(
  ("program", "arguments", "message"),
  [
    ("train.py", [], "name a --config; --list_configs"),
    ("train.py", ["--config=configs/smok.py", "--workdir=w"], "configs/smok.*configs/smoke"),
    ("train.py", ["--config=configs/smoke.py"], "name a --workdir"),
    (
      "train.py",
      ["--config=configs/smoke.py", "--workdir=w", "--config.attention.blok_size=8"],
      "blok_size.*attention.block_size",
    ),
    (
      "train.py",
      ["--config=configs/smoke.py", "--workdir=w", "--config.data.sequence_length=250"],
      r"250.*block_size.*(240|256)",
    ),
    (
      "train.py",
      ["--config=configs/smoke.py", "--workdir=w", "--config.data.sources=no/such/folder"],
      "no/such/folder",
    ),
    (
      "train.py",
      ["--config=configs/smoke.py", "--workdir=/proc/none", "--config.data.sources=recall"],
      "cannot write to --workdir=/proc/none",
    ),
    (
      "train.py",
      ["--config=configs/smoke.py", "--workdir=w", "--config.mesh.tensor=3"],
      "3.*device",
    ),
    (
      "train.py",
      [
        "--config=configs/smoke.py",
        "--workdir=w",
        "--config.data.sources=recall",
        "--config.attention.kernels=strict",
      ],
      "no GPU kernel can run block_sparse_attention .*Set attention.kernels to 'auto'",
    ),
    (
      "train.py",
      ["--config=configs/smoke.py", "--dry_run", "--config.attention.kernels=strict"],
      "no GPU kernel can run block_sparse_attention .*Set attention.kernels to 'auto'",
    ),
    ("eval.py", [], "name the --workdir"),
    ("eval.py", ["--workdir=no/such/run"], "no/such/run holds no checkpoint"),
    ("eval.py", ["--workdir=w,v"], "2 checkpoints have one table; .* with --out"),
    ("eval.py", ["--workdir=w", "--rope_scaling=yarn"], "unknown --rope_scaling 'yarn'"),
    (
      "eval.py",
      ["--workdir=w", "--tasks=lm_eval", "--lm_eval_tasks=piqa", "--lm_eval_path=no/where"],
      "--lm_eval_path=no/where is no folder",
    ),
  ],
)
def test_a_mistake_gets_one_clear_error(environment, tmp_path, program, arguments, message):
  (tmp_path / "w").mkdir()
  arguments = [a.replace("--workdir=w", f"--workdir={tmp_path}/w") for a in arguments]
  done = programs.call([sys.executable, program, *arguments], environment)
  programs.assert_one_error(done, message)
  assert not (tmp_path / "w" / "checkpoints").exists()


def test_what_can_be_asked_before_training(environment):
  presets = programs.call([sys.executable, "train.py", "--list_configs"], environment)
  assert presets.returncode == 0
  names = {"smoke", "ssa_20m", "moba_20m", "full_20m", "ssa_1b", "moba_1b", "full_1b"}
  assert names <= set(re.findall(r"^configs/(\w+)\.py", presets.stdout, re.MULTILINE))
  shown = programs.call(
    [
      sys.executable,
      "train.py",
      "--config=configs/ssa_1b.py",
      "--config.train.num_steps=1e3",
      "--print_config",
    ],
    environment,
  )
  assert re.search(r"train\.num_steps\W+1000\b", shown.stdout), shown.stdout + shown.stderr
  dry = programs.call(programs.train_command("unused", "--dry_run"), environment)
  assert dry.returncode == 0, dry.stderr[-4000:]
  assert re.search(r"[\d,]+ parameters", dry.stdout)
  assert not (programs.ROOT / "unused").exists()
