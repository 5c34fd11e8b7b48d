"""Signals become one decision of all processes."""

import signal

import pytest

from d1jax.errors import InterruptedRunError, PreemptedError
from d1jax.parallel import multihost
from d1jax.training.interrupts import Interrupts


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
    monkeypatch.setattr(multihost, "largest", lambda value: max(value, signal.SIGINT))
    assert interrupts.pending()
    assert isinstance(interrupts.error("here"), InterruptedRunError)


def test_a_second_ctrl_c_stops_at_once():
  with Interrupts() as interrupts:
    signal.raise_signal(signal.SIGINT)
    assert interrupts.pending()
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
