"""Starting the programs as people do, on a model that trains in seconds."""

import pathlib
import re
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
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


def assert_one_error(done, message):
  output = done.stdout + done.stderr
  assert done.returncode == 2, output[-4000:]
  assert "Traceback" not in output
  assert len(re.findall(r"^error: ", output, re.MULTILINE)) == 1, output[-4000:]
  assert re.search(message, output, re.DOTALL), output[-4000:]
