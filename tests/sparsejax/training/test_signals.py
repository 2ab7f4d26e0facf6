"""A signal is a polite request, and only while a run lasts."""

import signal

import pytest

from sparsejax.training import signals

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_asks_to_stop(number):
  with signals.StopSignal() as stop:
    assert not stop.is_requested(1)
    signal.raise_signal(number)
    assert stop.is_requested(2)
    assert stop.is_requested(3)
    assert stop.received is number


def test_handlers_are_as_before_when_it_is_over():
  before = [signal.getsignal(number) for number in NUMBERS]
  with signals.StopSignal():
    assert all(signal.getsignal(n) is not old for n, old in zip(NUMBERS, before, strict=True))
    signal.raise_signal(signal.SIGTERM)
  assert [signal.getsignal(number) for number in NUMBERS] == before


def test_handlers_are_as_before_when_it_fails():
  before = [signal.getsignal(number) for number in NUMBERS]
  with pytest.raises(RuntimeError, match="broken"), signals.StopSignal():
    raise RuntimeError("broken")
  assert [signal.getsignal(number) for number in NUMBERS] == before


def test_a_second_ctrl_c_means_now():
  with signals.StopSignal():
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)


def test_several_processes_ask_the_service_that_they_share(monkeypatch):
  before = signal.getsignal(signal.SIGTERM)
  asked = []

  def sync_point(step):
    asked.append(step)
    return step == 5

  monkeypatch.setattr(signals.jax, "process_count", lambda: 2)
  monkeypatch.setattr(signals.multihost_utils, "reached_preemption_sync_point", sync_point)
  with signals.StopSignal() as stop:
    # JAX's own service listens for signals there.
    assert signal.getsignal(signal.SIGTERM) is before
    assert [stop.is_requested(step) for step in (4, 5)] == [False, True]
  assert asked == [4, 5]


def test_the_exit_status_asks_for_another_try():
  assert signals.EXIT_INTERRUPTED == 75
