"""What a terminal sees of texts while they are drawn: themselves, and how far they are."""

from collections.abc import Callable, Iterable, Sequence
import sys
import time

import tqdm

# Between lines of progress, where there is no terminal.
_SECONDS = 60.0


class Stream:
  """Writes a text as it is drawn: what its ids stand for, once no later id can change it."""

  def __init__(self, decode: Callable[[Sequence[int]], str], prompt: str):
    self._decode, self._ids, self._written = decode, [], 0
    # Shown with the first id: until then there may be other things to say.
    self._prompt = prompt

  def __call__(self, number: int, token: int) -> None:
    del number  # there is one
    if not self._ids:
      _write(self._prompt)
    self._ids.append(token)
    text = self._decode(self._ids)
    # Characters of several bytes may come in several tokens.
    if not text.endswith("\ufffd"):
      _write(text[self._written :])
      self._written = len(text)

  def end(self) -> None:
    _write(self._decode(self._ids)[self._written :] + "\n")


class Texts:
  """Writes every text as it ends."""

  def __init__(
    self,
    decode: Callable[[Sequence[int]], str],
    prompt: str,
    stop_ids: Iterable[int],
    max_new_tokens: int,
  ):
    self._decode, self._prompt = decode, prompt
    self._stop_ids, self._max_new_tokens = frozenset(stop_ids), max_new_tokens
    self._ids = {}

  def __call__(self, number: int, token: int) -> None:
    ids = self._ids.setdefault(number, [])
    ids.append(token)
    if token in self._stop_ids or len(ids) == self._max_new_tokens:
      text = self._decode(self._ids.pop(number))
      # Off the line that a bar of progress is in.
      with tqdm.tqdm.external_write_mode(file=sys.stdout):
        _write(f"--- text {number}\n{self._prompt}{text}\n")

  def end(self) -> None:
    """Nothing is left to write."""


class Progress:
  """Tokens drawn so far, and how many a second of late.

  On a terminal that is a line which is written again and again. Where text is written on the
  same one as it is drawn, the line is gone with the first token.
  """

  def __init__(
    self,
    num_texts: int,
    max_new_tokens: int,
    *,
    prompt_length: int,
    stream=None,
    output=None,
    clock=time.monotonic,
  ):
    """Starts.

    Args:
      num_texts: that are drawn; one is shown as it is drawn.
      max_new_tokens: of each, at most.
      prompt_length: tokens that are read before the first.
      stream: to write to; None is stderr.
      output: where texts go; None is stdout.
      clock: seconds, between lines where there is no terminal.
    """
    self._stream, self._clock = sys.stderr if stream is None else stream, clock
    output = sys.stdout if output is None else output
    self._total, self._done = num_texts * max_new_tokens, 0
    self._is_brief = num_texts == 1 and output.isatty()
    # A line in the middle of a text would be taken for a part of it.
    self._has_lines = num_texts > 1
    self._said = self._clock(), 0
    self._bar = tqdm.tqdm(
      total=self._total,
      dynamic_ncols=True,
      file=self._stream,
      leave=False,
      unit=" tokens",
      # The speed is that of late, not of what is read and compiled at first.
      bar_format="{desc}|{bar}| {n_fmt}/{total_fmt} tokens [{elapsed}, {rate_noinv_fmt}]",
      desc=f"reading {prompt_length:,d} tokens ",
      disable=not self._stream.isatty(),
    )

  def say(self, line: str) -> None:
    """Writes a line that stays."""
    with self._bar.external_write_mode(file=self._stream):
      self._stream.write(f"{line}\n")

  def count(self) -> None:
    """Counts a token."""
    if not self._done:
      self._bar.set_description_str("", refresh=False)
    self._done += 1
    if self._is_brief:
      self.close()
      return
    self._bar.update()
    now, (then, before) = self._clock(), self._said
    if self._bar.disable and self._has_lines and now - then >= _SECONDS:
      speed = f"{(self._done - before) / (now - then):.1f} tokens/s"
      self._said = now, self._done
      self._stream.write(f"{self._done} of at most {self._total} tokens, {speed}\n")
      self._stream.flush()

  def close(self) -> None:
    """Takes the line away."""
    self._bar.close()


def _write(text: str) -> None:
  sys.stdout.write(text)
  sys.stdout.flush()
