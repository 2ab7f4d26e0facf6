"""Where numbers go, and that a resumed run leaves no step twice."""

import builtins
import json
import struct

import pytest
from tensorboardX.proto import event_pb2

from sparsejax import errors
from sparsejax.training import metrics


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def write(writer, steps):
  for step in steps:
    writer.write(step, {"train/loss": step / 2})
  writer.close()


def test_a_line_is_written_at_once(tmp_path):
  path = tmp_path / "metrics.jsonl"
  writer = metrics.JsonLines(path, 0)
  writer.write(3, {"train/loss": 1.5, "perf/mfu": 0.25})
  (line,) = read(path)
  assert line.pop("time") > 1.7e9
  assert line == {"step": 3, "train/loss": 1.5, "perf/mfu": 0.25}
  writer.close()


def test_a_resumed_run_drops_the_steps_it_takes_again(tmp_path):
  path = tmp_path / "metrics.jsonl"
  write(metrics.JsonLines(path, 0), [1, 2, 3, 4, 4, 5])
  kept = path.read_text().splitlines()[:2]
  write(metrics.JsonLines(path, 2), [3])
  assert [line["step"] for line in read(path)] == [1, 2, 3]
  assert path.read_text().splitlines()[:2] == kept
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("broken", ['{"step": 3, "tra', "[1]", "{}", "null", ""])
def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path, broken):
  path = tmp_path / "metrics.jsonl"
  write(metrics.JsonLines(path, 0), [1, 2])
  with open(path, "a") as file:
    file.write(broken)
  write(metrics.JsonLines(path, 5), [6])
  assert [line["step"] for line in read(path)] == [1, 2, 6]


def test_a_new_run_in_an_old_directory_starts_an_empty_file(tmp_path):
  path = tmp_path / "metrics.jsonl"
  write(metrics.JsonLines(path, 0), [1, 2])
  metrics.JsonLines(path, 0).close()
  assert path.read_text() == ""


def read_events(directory):
  """TensorBoard's events: length, checksum, message, checksum."""
  events = []
  for path in sorted(directory.glob("events.out.tfevents.*")):
    content = path.read_bytes()
    while content:
      (size,) = struct.unpack("<Q", content[:8])
      events.append(event_pb2.Event.FromString(content[12 : 12 + size]))
      content = content[16 + size :]
  return events


def scalars(directory):
  return [
    (event.step, value.tag, value.simple_value)
    for event in read_events(directory)
    for value in event.summary.value
  ]


def test_tensorboard_can_read_the_events(tmp_path):
  writer = metrics.TensorBoard(tmp_path, 0)
  writer.write(1, {"train/loss": 2.5, "eval/gap": 0.5})
  writer.write(2, {"train/loss": 2.25})
  writer.close()
  expected = [(1, "train/loss", 2.5), (1, "eval/gap", 0.5), (2, "train/loss", 2.25)]
  assert scalars(tmp_path) == expected


@pytest.mark.parametrize(("first_step", "purged"), [(0, []), (7, [8])])
def test_tensorboard_is_told_what_a_resumed_run_takes_again(tmp_path, first_step, purged):
  write(metrics.TensorBoard(tmp_path, first_step), [])
  START = event_pb2.SessionLog.START
  found = [e.step for e in read_events(tmp_path) if e.session_log.status == START]
  assert found == purged


def test_weights_and_biases_is_an_extra(monkeypatch, tmp_path):
  import_ = builtins.__import__

  def without_wandb(name, *arguments):
    if name == "wandb":
      raise ImportError(name)
    return import_(name, *arguments)

  monkeypatch.setattr(builtins, "__import__", without_wandb)
  message = (
    r"train.wandb_project='mine' needs the package wandb; pip install -e "
    r"'\.\[wandb\]' in .*, or set it to none\."
  )
  with pytest.raises(errors.ConfigError, match=message):
    metrics.WeightsAndBiases("mine", tmp_path, {})


def test_weights_and_biases_gets_what_it_needs_to_resume(monkeypatch, tmp_path):
  calls = []

  class Run:
    def log(self, values, step):
      calls.append((step, values))

    def finish(self):
      calls.append("finished")

  class Wandb:
    @staticmethod
    def init(**arguments):
      calls.append(arguments)
      return Run()

  monkeypatch.setitem(__import__("sys").modules, "wandb", Wandb)
  directory = tmp_path / "run7"
  write(metrics.WeightsAndBiases("mine", directory, {"seed": 1}), [3])
  assert calls == [
    dict(project="mine", dir=str(directory), config={"seed": 1}, id="run7", resume="allow"),
    (3, {"train/loss": 1.5}),
    "finished",
  ]


def test_several_writers_are_one(tmp_path):
  paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
  write(metrics.Writers([metrics.JsonLines(path, 0) for path in paths]), [1, 2])
  assert [[line["step"] for line in read(path)] for path in paths] == [[1, 2], [1, 2]]
