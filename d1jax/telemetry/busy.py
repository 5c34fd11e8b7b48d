"""How long some devices compute, as the host sees it: the idle share of each side of an asynchronous run."""

import contextlib
import math
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax


class Busy:
  """The spans of time in which some devices compute one program after the other.

  A span begins when its program is dispatched and the one before it has ended, and ends when its results are there,
  for which a thread waits. What else these devices do, such as publishing and validation, counts as idle.
  """

  def __init__(self) -> None:
    """Begins without spans."""
    self._spans: list[list[float]] = []

  def watch(self, results: Any) -> Sequence[float]:
    """Notes a program that has just been dispatched; nothing may donate its `results`.

    Returns:
      Its begin and its end (`time.perf_counter`); the end is infinite until its results are there.
    """
    span = [time.perf_counter(), math.inf]
    self._spans.append(span)

    def wait() -> None:
      with contextlib.suppress(Exception):  # whoever uses the results sees the error
        jax.block_until_ready(results)
      span[1] = time.perf_counter()

    # No daemon: Python would end it inside of XLA when the process ends, which aborts the process.
    threading.Thread(target=wait).start()
    return span

  def idle(self, begin: float, end: float) -> float:
    """The share of a span of time (`time.perf_counter`) without a program; earlier spans are forgotten."""
    computing, free = 0.0, begin
    for start, stop in self._spans:
      computing += max(min(stop, end) - max(start, free), 0.0)
      free = max(free, stop)
    self._spans = [span for span in self._spans if span[1] > end]
    return 1 - computing / (end - begin)
