"""How far an evaluation is, and how long it will take: a bar, or a line now and then."""

import collections
import datetime
import sys
import time

import tqdm

# Between lines, where there is no terminal.
_SECONDS = 60.0


class Progress:
  """Counts units of tasks; those of one task are taken to be alike."""

  def __init__(self, tasks: list[str], *, stream=None, clock=time.monotonic):
    """Starts.

    Args:
      tasks: of every unit that is to be measured, the name of its task.
      stream: to write to; None is stderr.
      clock: seconds.
    """
    self._stream, self._clock = sys.stderr if stream is None else stream, clock
    self._left = collections.Counter(tasks)
    self._total, self._done = len(tasks), 0
    self._seconds: dict[str, list[float]] = collections.defaultdict(list)
    self._said = self._clock()
    self._bar = tqdm.tqdm(
      total=self._total,
      unit="cell",
      dynamic_ncols=True,
      file=self._stream,
      # Its own estimate knows one speed; see `remaining`.
      bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
      disable=not self._stream.isatty(),
    )

  def begin(self, what: str) -> None:
    """Says what is measured now."""
    self._bar.set_description_str(what)

  def end(self, task: str, seconds: float) -> None:
    """A unit of a task was measured."""
    self._left[task] -= 1
    self._done += 1
    self._seconds[task].append(seconds)
    left = str(datetime.timedelta(seconds=round(self.remaining())))
    self._bar.set_postfix_str(f"ETA {left}", refresh=False)
    self._bar.update()
    now = self._clock()
    if self._bar.disable and (now - self._said >= _SECONDS or self._done == self._total):
      self._said = now
      self._stream.write(f"{task}: {self._done} of {self._total} cells measured, ETA {left}\n")
      self._stream.flush()

  def remaining(self) -> float:
    """Seconds until the end, units of tasks that have not begun being as long as others."""
    known = [seconds for own in self._seconds.values() for seconds in own]
    total = 0.0
    for task, count in self._left.items():
      own = self._seconds.get(task) or known
      total += count * sum(own) / max(1, len(own))
    return total

  def close(self) -> None:
    self._bar.close()
