"""How far an evaluation is, where there is no terminal and where there is one."""

import io

import pytest

from sparsejax.evaluation import progress
from tests.terminal import Clock, Terminal


def test_units_of_a_task_are_taken_to_be_alike():
  shown = progress.Progress(["a", "a", "b", "b", "b", "c"], stream=io.StringIO())
  assert shown.remaining() == 0.0  # nothing is known yet
  shown.end("a", 10.0)
  assert shown.remaining() == pytest.approx(10 + 3 * 10 + 10)
  shown.end("b", 2.0)
  # Of `c` nothing is known but what others take.
  assert shown.remaining() == pytest.approx(10 + 2 * 2 + 6)


def test_lines_come_now_and_then_and_at_the_end():
  stream, clock = io.StringIO(), Clock()
  shown = progress.Progress(["a"] * 4, stream=stream, clock=clock)
  for seconds in (30.0, 31.0, 1.0, 1.0):
    shown.begin("run a full")
    clock.now += seconds
    shown.end("a", seconds)
  shown.close()
  assert stream.getvalue().splitlines() == [
    "a: 2 of 4 cells measured, ETA 0:01:01",
    "a: 4 of 4 cells measured, ETA 0:00:00",
  ]


def test_a_terminal_has_a_bar():
  stream = Terminal()
  shown = progress.Progress(["a"] * 4, stream=stream)
  shown.begin("run a full")
  shown.end("a", 600.0)
  shown.close()
  said = stream.getvalue()
  assert "run a full" in said
  assert "1/4" in said
  assert "ETA 0:30:00" in said


def test_nothing_to_do_says_nothing():
  stream = io.StringIO()
  progress.Progress([], stream=stream).close()
  assert stream.getvalue() == ""
