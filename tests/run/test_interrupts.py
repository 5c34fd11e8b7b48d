"""Signals become one decision of all processes."""

import signal

import pytest

from d1jax.errors import InterruptedRunError, PreemptedError
from d1jax.parallel import multihost
from d1jax.run.interrupts import Interrupts


def test_a_signal_that_comes_while_the_processes_ask_each_other_is_heard_the_next_time(monkeypatch):
  def largest(value):
    signal.raise_signal(signal.SIGTERM)
    return value

  with Interrupts() as interrupts:
    monkeypatch.setattr(multihost, "largest", largest)
    assert not interrupts.pending()
    assert interrupts.pending()
    assert isinstance(interrupts.error("here"), PreemptedError)


def test_the_signal_of_another_process_is_answered_by_all(monkeypatch):
  with Interrupts() as interrupts:
    monkeypatch.setattr(multihost, "largest", lambda value: max(value, 1))
    assert interrupts.pending()
    assert isinstance(interrupts.error("here"), InterruptedRunError)


def test_a_second_ctrl_c_stops_at_once():
  with Interrupts() as interrupts:
    signal.raise_signal(signal.SIGINT)
    assert interrupts.pending()
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
  ("numbers", "kind", "name"),
  [
    (["SIGINT"], InterruptedRunError, "SIGINT"),
    (["SIGTERM", "SIGINT"], PreemptedError, "SIGTERM"),
    (["SIGINT", "SIGTERM"], PreemptedError, "SIGTERM"),
    (["SIGHUP"], PreemptedError, "SIGHUP"),
    (["SIGTERM", "SIGHUP"], PreemptedError, "SIGTERM"),
    (["SIGHUP", "SIGINT"], PreemptedError, "SIGHUP"),
  ],
)
def test_of_several_signals_the_most_urgent_is_answered(numbers, kind, name):
  with Interrupts() as interrupts:
    for number in numbers:
      signal.raise_signal(signal.Signals[number])
    assert interrupts.pending()
    error = interrupts.error("grpo iteration 3")
  assert type(error) is kind
  assert str(error) == f"{name}: saved at grpo iteration 3; run the same command again to go on"


def test_a_second_ctrl_c_stops_at_once_after_sigterm_too():
  with Interrupts():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)


def test_a_hang_up_that_is_ignored_stays_so():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with Interrupts() as interrupts:
      signal.raise_signal(signal.SIGHUP)
      assert not interrupts.pending()
  finally:
    signal.signal(signal.SIGHUP, before)
