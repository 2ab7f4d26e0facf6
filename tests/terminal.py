"""A terminal and a clock for tests of what is said while something goes on."""

import io


class Clock:
  """Seconds that pass when told."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


class Terminal(io.StringIO):
  def isatty(self):
    return True
