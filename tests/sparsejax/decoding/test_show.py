"""What a terminal sees of texts while they are drawn."""

import io

import pytest

from sparsejax.decoding import show
from tests.terminal import Clock, Terminal


def decode(ids):
  """Ids are bytes."""
  return bytes(ids).decode("utf-8", errors="replace")


@pytest.fixture
def clock():
  return Clock()


def make_progress(num_texts, clock, *, stream, output):
  return show.Progress(
    num_texts, 100, prompt_length=1234, stream=stream, output=output, clock=clock
  )


def last_line(stream):
  return stream.getvalue().rpartition("\r")[2]


def test_a_character_of_several_tokens_is_shown_when_it_is_whole(capsys):
  shown, stream = [], show.Stream(decode, "a")
  assert capsys.readouterr().out == ""
  for token in "bä€".encode():
    stream(0, token)
    shown.append(capsys.readouterr().out)
  assert shown == ["ab", "", "ä", "", "", "€"]
  stream(0, 0xE2)
  stream.end()
  assert capsys.readouterr().out == "\ufffd\n"


@pytest.mark.parametrize(("num_texts", "output"), [(2, Terminal()), (1, io.StringIO())])
def test_a_terminal_has_a_line_of_progress(clock, num_texts, output):
  """Where that is in no text's way; it does not stay."""
  stream = Terminal()
  progress = make_progress(num_texts, clock, stream=stream, output=output)
  assert "reading 1,234 tokens" in last_line(stream)
  for _ in range(5):
    progress.count()
  progress._bar.refresh()
  line = last_line(stream)
  assert f"5/{100 * num_texts} tokens" in line
  assert "tokens/s" in line
  assert "reading" not in line
  progress.say("something else")
  assert "something else\n" in stream.getvalue()
  progress.close()
  assert last_line(stream).strip() == ""


def test_the_line_is_gone_before_a_text_is_written_in_its_place(clock):
  stream = Terminal()
  progress = make_progress(1, clock, stream=stream, output=Terminal())
  assert "reading 1,234 tokens" in last_line(stream)
  progress.count()
  assert last_line(stream).strip() == ""
  before = stream.getvalue()
  progress.count()
  progress.close()
  assert stream.getvalue() == before


@pytest.mark.parametrize(
  ("num_texts", "said"),
  [
    (2, "4 of at most 200 tokens, 0.1 tokens/s\n16 of at most 200 tokens, 0.2 tokens/s\n"),
    (1, ""),
  ],
)
def test_elsewhere_there_is_a_line_now_and_then(clock, num_texts, said):
  """Of several texts: in the middle of a single one it would be a part of it."""
  stream = io.StringIO()
  progress = make_progress(num_texts, clock, stream=stream, output=io.StringIO())
  for seconds in [15.0] * 4 + [5.0] * 12 + [59.0]:
    clock.now += seconds
    progress.count()
  progress.close()
  assert stream.getvalue() == said


def test_a_text_is_written_off_the_line_of_progress(monkeypatch, clock):
  terminal = Terminal()
  monkeypatch.setattr(show.sys, "stdout", terminal)
  monkeypatch.setattr(show.sys, "stderr", terminal)
  progress = make_progress(2, clock, stream=terminal, output=terminal)
  texts = show.Texts(decode, "a", stop_ids=(0,), max_new_tokens=3)
  for token in b"xy":
    texts(1, token)
  assert "--- text" not in terminal.getvalue()
  texts(1, ord("z"))
  before, _, _ = terminal.getvalue().partition("--- text 1\naxyz\n")
  assert before.rpartition("\r")[2].strip() == ""
  assert before.endswith("\r")
  progress.close()
