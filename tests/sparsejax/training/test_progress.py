"""What a person watching sees."""

import types

import jax
import pytest

from sparsejax.training import progress

VALUES = {
  "train/loss": 3.14159,
  "train/ce": 3.0,
  "train/align": 0.0,
  "train/num_skipped": 0.0,
  "opt/grad_norm": 1.234,
  "opt/learning_rate": 2.5e-4,
  "perf/tokens_per_second": 123456.0,
  "perf/step_seconds": 0.5,
  "perf/data_wait_share": 0.0125,
  "perf/memory_gib": 12.34,
}


def test_a_line_has_what_people_look_for():
  assert progress.step_line(20, 7240, VALUES) == (
    "step 20/7240 loss 3.1416 ce 3.0000 grad 1.23 lr 2.5e-04 | 123k tok/s 0.5 s/step "
    "data 1.2% | mem 12.3 GiB | ETA 1:00:10"
  )


def test_a_line_has_more_where_there_is_more_to_say():
  more = {
    "train/align": 0.00321,
    "train/num_skipped": 2.0,
    "perf/mfu": 0.412,
    "perf/mfu_dense_equivalent": 0.305,
    "perf/memory_limit_gib": 139.7,
    "perf/tokens_per_second": 2.5e6,
  }
  assert progress.step_line(240, 240, VALUES | more) == (
    "step 240/240 loss 3.1416 ce 3.0000 align 3.21e-03 grad 1.23 lr 2.5e-04 | 2.5M tok/s "
    "41.2% MFU (30.5% dense-equivalent) 0.5 s/step data 1.2% | mem 12.3/139.7 GiB "
    "| ETA 0:00:00 | 2 steps skipped (not finite)"
  )


@pytest.mark.parametrize(
  ("speed", "text"), [(87.3, "87.3 tok/s"), (999.0, "999 tok/s"), (1000.0, "1k tok/s")]
)
def test_speeds_are_short(speed, text):
  line = progress.step_line(1, 2, VALUES | {"perf/tokens_per_second": speed})
  assert f"| {text}" in line


def test_lines_go_to_stdout(capsys):
  bar = progress.Progress(first_step=3, num_steps=6)
  bar.line("hello")
  bar.advance()
  bar.close()
  said = capsys.readouterr()
  assert said.out == "hello\n"
  assert said.err == ""


def test_only_one_process_speaks(capsys):
  bar = progress.Progress(first_step=0, num_steps=2, is_quiet=True)
  bar.line("hello")
  bar.advance()
  bar.close()
  assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_that_begins_where_the_run_does(monkeypatch, capsys):
  monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
  bar = progress.Progress(first_step=3, num_steps=6)
  bar.advance()
  bar.close()
  said = capsys.readouterr().err
  assert "3/6" in said
  assert "4/6" in said
  assert "step" in said


@pytest.mark.parametrize(
  ("stats", "expected"),
  [
    (
      dict(bytes_in_use=2**30, peak_bytes_in_use=3 * 2**30, bytes_limit=8 * 2**30),
      {"perf/memory_gib": 3.0, "perf/memory_limit_gib": 8.0},
    ),
    (dict(bytes_in_use=2**30), {"perf/memory_gib": 1.0}),
  ],
)
def test_memory_is_the_peak_of_the_device(monkeypatch, stats, expected):
  device = types.SimpleNamespace(memory_stats=lambda: stats)
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  assert progress.memory() == expected


def test_memory_is_that_of_the_process_where_devices_do_not_say():
  values = progress.memory()
  assert list(values) == ["perf/memory_gib"]
  assert 0.05 < values["perf/memory_gib"] < 64
