"""Stopping cleanly when the machine is taken away."""

import signal
from types import FrameType
from typing import Self

import jax
from jax.experimental import multihost_utils

# sysexits.h: "temporary failure; the user is invited to retry".
EXIT_INTERRUPTED = 75


class StopSignal:
  """A context that turns SIGTERM, SIGUSR1 and the first Ctrl-C into a polite request.

  One process has to catch signals itself: JAX's preemption notice works only where
  `jax.distributed` runs. With several processes that service is asked instead, so that all
  of them stop at the same step.
  """

  _SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

  def __init__(self):
    self.received: signal.Signals | None = None
    self._previous: dict[int, object] = {}

  def __enter__(self) -> Self:
    if jax.process_count() == 1:
      for number in self._SIGNALS:
        self._previous[number] = signal.signal(number, self._receive)
    return self

  def __exit__(self, *exception) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def is_requested(self, step: int) -> bool:
    """Whether to stop after this step; every process gets the same answer."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self.received is not None

  def _receive(self, number: int, frame: FrameType | None) -> None:
    del frame
    self.received = signal.Signals(number)
    # A second Ctrl-C means now.
    signal.signal(signal.SIGINT, signal.default_int_handler)
