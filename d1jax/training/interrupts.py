"""SIGTERM and Ctrl-C as requests to save and stop, answered between two iterations."""

import signal
import types
from typing import Any

from d1jax.errors import InterruptedRunError, PreemptedError, RunError


class Interrupts:
  """Collects stop signals while it is entered. A second Ctrl-C stops at once."""

  def __init__(self) -> None:
    self._received: int | None = None
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

  @property
  def pending(self) -> bool:
    """Whether a stop was asked for."""
    return self._received is not None

  def error(self, where: str) -> RunError:
    """The exception to leave with, once the run is saved."""
    kind = PreemptedError if self._received == signal.SIGTERM else InterruptedRunError
    name = signal.Signals(self._received or signal.SIGINT).name
    return kind(f"{name}: saved at {where}; run the same command again to go on")
