"""SIGTERM and Ctrl-C as requests to save and stop, answered between two iterations by all processes together."""

import signal
import types
from typing import Any

from d1jax.errors import InterruptedRunError, PreemptedError, RunError
from d1jax.parallel import multihost


class Interrupts:
  """Collects stop signals while it is entered. A second Ctrl-C stops at once."""

  def __init__(self) -> None:
    self._received = 0  # the signal's number
    self._agreed = 0  # the largest that any process had when all asked
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> "Interrupts":
    for number in (signal.SIGTERM, signal.SIGINT):
      self._previous[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *exception: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame: types.FrameType | None) -> None:
    del frame
    if self._received == number == signal.SIGINT:
      raise KeyboardInterrupt
    self._received = number

  def pending(self) -> bool:
    """Whether a stop was asked for, of any process; all ask together. SIGTERM goes before Ctrl-C."""
    self._agreed = multihost.largest(self._received)  # a signal that comes meanwhile is heard the next time
    return self._agreed > 0

  def error(self, where: str) -> RunError:
    """The exception to leave with, once the run is saved."""
    kind = PreemptedError if self._agreed == signal.SIGTERM else InterruptedRunError
    name = signal.Signals(self._agreed).name
    return kind(f"{name}: saved at {where}; run the same command again to go on")
