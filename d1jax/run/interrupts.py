"""SIGTERM, SIGHUP and Ctrl-C as requests to save and stop, answered by all processes together: between two iterations,
and between two batches of an evaluation.
"""

import signal
import types
from typing import Any

from d1jax.errors import InterruptedRunError, PreemptedError, RunError
from d1jax.parallel import multihost

_RANKS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
"""The signals, the one that is answered first last: a machine that goes down does not wait for a person."""


class Interrupts:
  """Collects stop signals while it is entered. A second Ctrl-C stops at once.

  SIGHUP comes from a terminal that closes. It ends a run as SIGTERM does; where it was ignored, as `nohup` does, it
  stays so.
  """

  def __init__(self) -> None:
    self._received = 0  # the signal's rank, from 1; 0: none
    self._agreed = 0  # the highest that any process had when all asked
    self._interrupted = False
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> "Interrupts":
    for number in _RANKS:
      if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
        self._previous[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *exception: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame: types.FrameType | None) -> None:
    del frame
    if number == signal.SIGINT:
      if self._interrupted:
        raise KeyboardInterrupt
      self._interrupted = True
    self._received = max(self._received, _RANKS.index(signal.Signals(number)) + 1)

  def pending(self) -> bool:
    """Whether a stop was asked for, of any process; all ask together.

    SIGTERM goes before SIGHUP, and SIGHUP before Ctrl-C.
    """
    self._agreed = multihost.largest(self._received)  # a signal that comes meanwhile is heard the next time
    return self._agreed > 0

  def error(self, where: str) -> RunError:
    """The exception to leave with, once the run is saved."""
    number = _RANKS[self._agreed - 1]
    kind = InterruptedRunError if number == signal.SIGINT else PreemptedError
    return kind(f"{number.name}: saved at {where}; run the same command again to go on")
