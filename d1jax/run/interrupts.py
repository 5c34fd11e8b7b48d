"""SIGTERM, SIGHUP and Ctrl-C are requests to save and stop; all processes answer them together, between two iterations
or between two batches of an evaluation.
"""

import signal
import types
from typing import Any

from d1jax.errors import InterruptedRunError, PreemptedError, RunError
from d1jax.parallel import multihost

_RANKS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
"""The signals by ascending priority: a machine that shuts down does not wait, so SIGTERM goes before Ctrl-C."""


class Interrupts:
  """A context that collects stop signals. A second Ctrl-C stops at once.

  SIGHUP comes from a terminal that closes. It ends a run like SIGTERM, unless it was ignored before, as with `nohup`.
  """

  def __init__(self) -> None:
    self._received = 0  # the signal's rank, counted from 1; 0: no signal
    self._agreed = 0  # the highest rank of any process at the last exchange
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
    """Whether any process received a stop signal; all processes must call this together.

    SIGTERM has priority over SIGHUP, and SIGHUP over Ctrl-C.
    """
    self._agreed = multihost.largest(self._received)  # a signal during the exchange counts at the next one
    return self._agreed > 0

  def error(self, where: str) -> RunError:
    """The exception to raise when the run is saved."""
    number = _RANKS[self._agreed - 1]
    kind = InterruptedRunError if number == signal.SIGINT else PreemptedError
    return kind(f"{number.name}: saved at {where}; run the same command again to go on")
