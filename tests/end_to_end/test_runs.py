"""Training is killed, carries on, and is evaluated: all of it about one small run.

One file, because a file's tests share a process and with it the run that nobody interrupted.
"""

import json
import re
import signal
import sys

import jax
import numpy as np
import pytest

from configs import base
from sparsejax.evaluation import subject
from tests.end_to_end import programs


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
  assert sorted(losses(workdir)) == list(range(1, programs.NUM_STEPS + 1))
  metadata = f"checkpoints/{programs.NUM_STEPS}/_CHECKPOINT_METADATA"
  records = [
    json.loads((path / metadata).read_text())["custom_metadata"] for path in (workdir, other)
  ]
  assert records[0]["next_row"] == records[1]["next_row"] == programs.NUM_STEPS * 8
  assert len(records[0]["checksums"]) > 20
  assert records[0]["checksums"] == records[1]["checksums"]
  params = [
    jax.device_get(subject.load(path, base.get_config()).params) for path in (workdir, other)
  ]
  jax.tree.map(np.testing.assert_array_equal, *params)


def test_diagnostics_are_logged_with_every_validation(uninterrupted):
  workdir, _ = uninterrupted
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  steps = [row["step"] for row in rows if "eval/gap" in row]
  for name in ("kl", "align", "full/entropy", "sparse/attn_sparsity/layer_1"):
    assert [row["step"] for row in rows if f"diagnostics/{name}" in row] == steps


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, environment):
  workdir = tmp_path_factory.mktemp("whole") / "run"
  output = programs.train(workdir, environment, diagnostics__enabled=True)
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
  assert (workdir / "samples" / f"{programs.NUM_STEPS}.txt").is_file()
  assert list(workdir.glob("events.out.tfevents*"))


def test_killed_in_the_middle_it_carries_on_as_if_nothing_had_been(
  tmp_path, environment, uninterrupted
):
  workdir = tmp_path / "run"
  running = programs.Running(workdir, environment)
  running.wait_until(lambda: has_logged(workdir, 6) and (workdir / "checkpoints/4").is_dir())
  running.kill()
  output = programs.train(workdir, environment, data__num_workers=1)
  assert re.search(r"resuming at step (4|8|12)\b", output)
  assert_same_run(workdir, uninterrupted[0])


def test_killed_while_saving_it_carries_on_as_if_nothing_had_been(
  tmp_path, environment, uninterrupted
):
  workdir = tmp_path / "run"
  checkpoints = workdir / "checkpoints"
  running = programs.Running(workdir, environment)

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
  output = programs.train(workdir, environment)
  assert re.search(r"resuming at step (4|8|12)\b", output)
  assert not list(checkpoints.glob("*-tmp"))
  assert_same_run(workdir, uninterrupted[0])


def test_asked_to_stop_it_saves_and_says_so(tmp_path, environment, uninterrupted):
  workdir = tmp_path / "run"
  # No save is due before the signal comes, so that the step found was saved because of it.
  running = programs.Running(
    workdir, environment, train__save_every=1000, train__eval_every=1000
  )
  running.wait_until(lambda: has_logged(workdir, 3))
  running.process.send_signal(signal.SIGTERM)
  assert running.process.wait(timeout=60) == 75, running.log.read_text()[-4000:]
  stopped_at = int(re.search(r"SIGTERM: saved step (\d+)", running.log.read_text())[1])
  assert 3 < stopped_at < programs.NUM_STEPS
  assert [p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()] == [
    str(stopped_at)
  ]
  output = programs.train(workdir, environment, train__save_every=1000, train__eval_every=1000)
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
  done = programs.call(command, environment)
  assert done.returncode == 0, done.stderr[-4000:]
  rows = [
    [cell.strip() for cell in line.strip("|").split("|")]
    # Below it are losses by context.
    for line in done.stdout.partition("\nloss by tokens read before\n")[0].splitlines()
    if line.startswith("|")
  ]
  by_name = {(row[1], row[2]): row for row in rows}
  assert {("full", "-"), ("sparse", "16"), ("sparse", "64"), ("unigram", "-")} <= set(by_name)
  # Every block allowed is full attention.
  assert by_name["sparse", "64"][3] == by_name["full", "-"][3]
  saved = tmp_path / "out" / "perplexity.json"
  assert {"versions", "device", "commit"} <= set(json.loads(saved.read_text())["environment"])
  assert "data:image/webp;base64," in (tmp_path / "out" / "report.html").read_text()
  refused = programs.call([*command, "--kernels=strict"], environment)
  programs.assert_one_error(refused, "no GPU kernel can run full_attention.*--kernels=auto")


def test_text_from_a_checkpoint(environment, uninterrupted, tmp_path):
  workdir, _ = uninterrupted
  command = [sys.executable, "-m", "sparsejax.generate", f"--workdir={workdir}"]
  command += ["--prompt=abc", "--max_new_tokens=5", "--temperature=0"]
  one = programs.call(command, environment)
  assert one.returncode == 0, one.stderr[-4000:]
  assert one.stdout.startswith("abc")
  assert re.search(r"^backend of decode_attention: xla \(", one.stderr, re.MULTILINE)
  assert re.search(r"^\d tokens in [\d.]+ s, .*; step 16 of ", one.stderr, re.MULTILINE)
  assert "backend of chunk_attention: xla (" in one.stderr
  two = programs.call([*command, "--num_texts=2", "--prefill_chunk=8"], environment)
  # Greedy texts are all the same.
  assert two.stdout == f"--- text 0\n{one.stdout}--- text 1\n{one.stdout}"
  # A prompt within the budget is the same read either way.
  mixed = programs.call([*command, "--mode=sparse", "--prefill_mode=full"], environment)
  assert mixed.stdout == one.stdout
  assert "backend of chunk_attention: xla (" in mixed.stderr
  wrong = programs.call([*command, "--mode=full", "--prefill_mode=sparse"], environment)
  programs.assert_one_error(wrong, "read sparse are continued sparse, not full")
  refused = programs.call([*command, "--budget=4"], environment)
  programs.assert_one_error(refused, "a budget of 4 keys is 0 blocks of 8.*take at least 8")


def test_a_changed_config_is_refused_unless_allowed(environment, uninterrupted):
  """Naming the key, its two values and the way on; the finished run is left as it was."""
  workdir, _ = uninterrupted
  before = (workdir / "metrics.jsonl").read_bytes()
  done = programs.call(programs.train_command(workdir, optimizer__peak_lr=1e-4), environment)
  programs.assert_one_error(done, r"optimizer.peak_lr.*0\.003.*0\.0001.*allow_config_change")
  assert (workdir / "metrics.jsonl").read_bytes() == before
  programs.train(
    workdir, environment, "--allow_config_change=optimizer.peak_lr", optimizer__peak_lr=1e-4
  )


def test_weights_of_another_run_to_start_from(environment, uninterrupted, tmp_path):
  """Only its parameters: the optimizer, the step and the data begin anew."""
  workdir, _ = uninterrupted
  output = programs.train(
    tmp_path / "run",
    environment,
    train__init_from=workdir,
    train__num_steps=1,
    model__rope_scaling__rope_type="llama3",
    optimizer__warmup_steps=0,
    optimizer__peak_lr=1e-12,
  )
  assert f"weights are those of {workdir}/checkpoints/{programs.NUM_STEPS}\n" in output
  changed = "model.rope_scaling.rope_type was 'default', is 'llama3'"
  assert f"train.init_from: {changed}\n" in output
  old, new = (
    jax.device_get(subject.load(path, base.get_config()).params)
    for path in (workdir, tmp_path / "run")
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), old, new)
  done = programs.call(
    programs.train_command(tmp_path / "other", train__init_from=workdir, model__hidden_size=48),
    environment,
  )
  programs.assert_one_error(done, "is of another model:.*float32.* saved, .* wanted")
