"""The programs as people run them: train, be killed, carry on, evaluate, make mistakes."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs import base
from sparsejax.evaluation import subject

ROOT = pathlib.Path(__file__).parents[1]
NUM_STEPS = 16
SMALL = {
  "model.num_hidden_layers": 2,
  "model.hidden_size": 32,
  "model.intermediate_size": 64,
  "model.num_attention_heads": 2,
  "model.num_key_value_heads": 1,
  "model.head_dim": 16,
  "model.vocab_size": 384,
  "attention.block_size": 8,
  "attention.num_blocks": 2,
  "loss.chunk_length": 64,
  "data.sources": "recall",
  "data.sequence_length": 64,
  "data.batch_size": 8,
  "optimizer.warmup_steps": 4,
  "train.num_steps": NUM_STEPS,
  "train.log_every": 1,
  "train.eval_every": 8,
  "train.eval_batches": 1,
  "train.save_every": 4,
  "train.keep_latest": 20,
  "train.sample_tokens": 8,
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
  """One device, and one cache of compiled programs for all the processes started here."""
  kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTEST_CURRENT_TEST")}
  return kept | dict(
    JAX_COMPILATION_CACHE_DIR=str(tmp_path_factory.mktemp("compiled")),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    JAX_PLATFORMS="cpu",
    PYTHONUNBUFFERED="1",
  )


def train_command(workdir, *arguments, **changes):
  values = SMALL | {k.replace("__", "."): v for k, v in changes.items()}
  overrides = [f"--config.{key}={value}" for key, value in values.items()]
  return [
    sys.executable,
    "train.py",
    "--config=configs/smoke.py",
    f"--workdir={workdir}",
    *overrides,
    *arguments,
  ]


def call(command, environment):
  return subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
  )


def train(workdir, environment, *arguments, **changes):
  done = call(train_command(workdir, *arguments, **changes), environment)
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
  return done.stdout + done.stderr


class Running:
  """A training process that is going to be hurt."""

  def __init__(self, workdir, environment, **changes):
    self.log = workdir.with_suffix(".log")
    with open(self.log, "w") as log:
      self.process = subprocess.Popen(
        train_command(workdir, **changes),
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
      )

  def wait_until(self, condition):
    deadline = time.monotonic() + 240
    while not condition():
      assert self.process.poll() is None, self.log.read_text()[-4000:]
      assert time.monotonic() < deadline, self.log.read_text()[-4000:]
      time.sleep(0.0005)

  def kill(self):
    self.process.kill()
    assert self.process.wait() == -signal.SIGKILL


def has_logged(workdir, step):
  """Whether the metrics of a step are there; the last line may be half written."""
  file = workdir / "metrics.jsonl"
  lines = file.read_text().splitlines(keepends=True) if file.exists() else []
  return any(json.loads(line)["step"] >= step for line in lines if line.endswith("\n"))


def losses(workdir):
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {
    row["step"]: {k: row[k] for k in ("train/loss", "opt/grad_norm")}
    for row in rows
    if "train/loss" in row
  }


def assert_same_run(workdir, other):
  """Every logged loss and every bit of parameters and optimizer."""
  assert losses(workdir) == losses(other)
  assert sorted(losses(workdir)) == list(range(1, NUM_STEPS + 1))
  records = [
    json.loads((path / "checkpoints" / str(NUM_STEPS) / "_CHECKPOINT_METADATA").read_text())[
      "custom_metadata"
    ]
    for path in (workdir, other)
  ]
  assert records[0]["next_row"] == records[1]["next_row"] == NUM_STEPS * 8
  assert len(records[0]["checksums"]) > 20
  assert records[0]["checksums"] == records[1]["checksums"]
  params = [
    jax.device_get(subject.load(path, base.get_config()).params) for path in (workdir, other)
  ]
  jax.tree.map(np.testing.assert_array_equal, *params)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, environment):
  workdir = tmp_path_factory.mktemp("whole") / "run"
  output = train(workdir, environment)
  return workdir, output


def test_a_run_says_what_it_does(uninterrupted):
  workdir, output = uninterrupted
  for what in (
    r"model: [\d,]+ parameters, 2 layers of 32",
    r"attention: ssa, 2 blocks of 8 keys \(budget 16\)",
    r"backend of full_attention: xla \(cudnn needs an NVIDIA GPU, this is cpu\)",
    r"backend of block_selection: xla \(",
    r"backend of block_sparse_attention: xla \(mosaic_gpu needs a Hopper GPU, this is cpu; ",
    r"backend of dual_path_attention: separate \(",
    r"devices: 1 x cpu",
    r"unigram\) \d\.\d+",
    r"sample after step 16",
  ):
    assert len(re.findall(what, output)) == 1, f"{what} is not in\n{output}"
  assert (
    json.loads((workdir / "config.json").read_text())["config"]["attention.method"] == "ssa"
  )
  environment_of_run = json.loads((workdir / "environment.jsonl").read_text())
  assert environment_of_run["versions"]["jax"] == jax.__version__
  assert (workdir / "samples" / f"{NUM_STEPS}.txt").is_file()
  assert list(workdir.glob("events.out.tfevents*"))


def test_killed_in_the_middle_it_carries_on_as_if_nothing_had_been(
  tmp_path, environment, uninterrupted
):
  workdir = tmp_path / "run"
  running = Running(workdir, environment)
  running.wait_until(lambda: has_logged(workdir, 6) and (workdir / "checkpoints/4").is_dir())
  running.kill()
  output = train(workdir, environment, data__num_workers=1)
  assert re.search(r"resuming at step (4|8|12)\b", output)
  assert_same_run(workdir, uninterrupted[0])


def test_killed_while_saving_it_carries_on_as_if_nothing_had_been(
  tmp_path, environment, uninterrupted
):
  workdir = tmp_path / "run"
  checkpoints = workdir / "checkpoints"
  running = Running(workdir, environment)

  def is_caught_saving():
    """Holds the process still to make sure that the save is under way, not over."""
    if not (checkpoints / "4").is_dir() or not list(checkpoints.glob("*-tmp")):
      return False
    running.process.send_signal(signal.SIGSTOP)
    if list(checkpoints.glob("*-tmp")):
      return True
    running.process.send_signal(signal.SIGCONT)
    return False

  running.wait_until(is_caught_saving)
  running.kill()
  assert list(checkpoints.glob("*-tmp"))
  output = train(workdir, environment)
  assert re.search(r"resuming at step (4|8|12)\b", output)
  assert not list(checkpoints.glob("*-tmp"))
  assert_same_run(workdir, uninterrupted[0])


def test_asked_to_stop_it_saves_and_says_so(tmp_path, environment, uninterrupted):
  workdir = tmp_path / "run"
  # No save is due before the signal comes, so that the step found was saved because of it.
  running = Running(workdir, environment, train__save_every=1000, train__eval_every=1000)
  running.wait_until(lambda: has_logged(workdir, 3))
  running.process.send_signal(signal.SIGTERM)
  assert running.process.wait(timeout=60) == 75, running.log.read_text()[-4000:]
  stopped_at = int(re.search(r"SIGTERM: saved step (\d+)", running.log.read_text())[1])
  assert 3 < stopped_at < NUM_STEPS
  assert [p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()] == [
    str(stopped_at)
  ]
  output = train(workdir, environment, train__save_every=1000, train__eval_every=1000)
  assert f"resuming at step {stopped_at}" in output
  assert_same_run(workdir, uninterrupted[0])


def test_the_table_of_perplexities(environment, uninterrupted, tmp_path):
  workdir, _ = uninterrupted
  command = [
    sys.executable,
    "eval.py",
    f"--workdir={workdir}",
    "--tasks=perplexity",
    "--modes=full,sparse",
    "--budgets=16,64",
    "--max_rows=8",
    f"--out={tmp_path}/out",
  ]
  done = call(command, environment)
  assert done.returncode == 0, done.stderr[-4000:]
  rows = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in done.stdout.splitlines()
    if line.startswith("|")
  ]
  by_name = {(row[1], row[2]): row for row in rows}
  assert {("full", "-"), ("sparse", "16"), ("sparse", "64"), ("unigram", "-")} <= set(by_name)
  # Every block allowed is full attention.
  assert by_name["sparse", "64"][3] == by_name["full", "-"][3]
  (saved,) = pathlib.Path(tmp_path / "out").glob("*.json")
  assert {"versions", "device", "commit"} <= set(json.loads(saved.read_text())["environment"])
  refused = call([*command, "--kernels=strict"], environment)
  assert_one_error(refused, "no GPU kernel can run full_attention.*--kernels=auto")


def test_a_changed_config_is_refused_unless_allowed(environment, uninterrupted):
  """Naming the key, its two values and the way on; the finished run is left as it was."""
  workdir, _ = uninterrupted
  before = (workdir / "metrics.jsonl").read_bytes()
  done = call(train_command(workdir, optimizer__peak_lr=1e-4), environment)
  assert_one_error(done, r"optimizer.peak_lr.*0\.003.*0\.0001.*allow_config_change")
  assert (workdir / "metrics.jsonl").read_bytes() == before
  train(
    workdir, environment, "--allow_config_change=optimizer.peak_lr", optimizer__peak_lr=1e-4
  )


def test_weights_of_another_run_to_start_from(environment, uninterrupted, tmp_path):
  """Only its parameters: the optimizer, the step and the data begin anew."""
  workdir, _ = uninterrupted
  train(
    tmp_path / "run",
    environment,
    train__init_from=workdir,
    train__num_steps=1,
    optimizer__warmup_steps=0,
    optimizer__peak_lr=1e-12,
  )
  old, new = (
    jax.device_get(subject.load(path, base.get_config()).params)
    for path in (workdir, tmp_path / "run")
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), old, new)
  done = call(
    train_command(tmp_path / "other", train__init_from=workdir, model__hidden_size=48),
    environment,
  )
  assert_one_error(done, "is of another model:.*float32.* saved, .* wanted")


def assert_one_error(done, message):
  output = done.stdout + done.stderr
  assert done.returncode == 2, output[-4000:]
  assert "Traceback" not in output
  assert len(re.findall(r"^error: ", output, re.MULTILINE)) == 1, output[-4000:]
  assert re.search(message, output, re.DOTALL), output[-4000:]


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
  ],
)
def test_a_mistake_gets_one_clear_error(environment, tmp_path, program, arguments, message):
  (tmp_path / "w").mkdir()
  arguments = [a.replace("--workdir=w", f"--workdir={tmp_path}/w") for a in arguments]
  done = call([sys.executable, program, *arguments], environment)
  assert_one_error(done, message)
  assert not (tmp_path / "w" / "checkpoints").exists()


def test_what_can_be_asked_before_training(environment):
  presets = call([sys.executable, "train.py", "--list_configs"], environment)
  assert presets.returncode == 0
  names = {"smoke", "ssa_20m", "moba_20m", "full_20m", "ssa_1b", "moba_1b", "full_1b"}
  assert names <= set(re.findall(r"^configs/(\w+)\.py", presets.stdout, re.MULTILINE))
  shown = call(
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
  dry = call(train_command("unused", "--dry_run"), environment)
  assert dry.returncode == 0, dry.stderr[-4000:]
  assert re.search(r"[\d,]+ parameters", dry.stdout)
  assert not (ROOT / "unused").exists()
