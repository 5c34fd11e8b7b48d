"""The process behind `verifier`: `python verifier_process.py FD` answers questions that come over a socket.

It says `+`, a line, when it is ready. A question is a line, the JSON list `[gold, answer]` of two LaTeX expressions;
the answer is a line, `1` or `0`. `math-verify` is asked for LaTeX alone: its reader of plain expressions is Python's
`eval` behind a filter. No question takes more than the CPU time below; CPU time, unlike wall time, does not depend on
what else a machine does. The signal ends the process, in the midst of whatever it computes.
"""

import contextlib
import functools
import json
import logging
import random
import resource
import signal
import socket
import sys
from typing import Any

import math_verify
from latex2sympy2_extended import NormalizationConfig
from sympy.core import random as sympy_random

CPU_SECONDS = 2.0
"""Of a question; those on MATH's answers take 0.6 at most in a fresh process, some milliseconds in the middle."""

MOST_BYTES = 1 << 30
"""Of address space; the process uses a tenth."""

DIGITS = 12
"""Decimals to which a decimal fraction must agree with an expression: an approximation is no answer."""

_LATEX = math_verify.LatexExtractionConfig(
  boxed_match_priority=-1,
  # Units are gone; what it takes for one may be a variable: 2h would be 2.
  normalization_config=NormalizationConfig(units=False, malformed_operators=True, boxed="none"),
)


@functools.lru_cache(256)
def _parse(expression: str) -> list[Any]:
  return math_verify.parse(
    f"${expression}$", extraction_config=[_LATEX], fallback_mode="no_fallback", parsing_timeout=None
  )


def is_equal(gold: str, answer: str) -> bool:
  """Tell whether `math-verify` finds an answer equal to the gold one, always the same."""
  random.seed(0)
  sympy_random.seed(0)
  return math_verify.verify(_parse(gold), _parse(answer), float_rounding=DIGITS, timeout_seconds=None)


def serve(connection: socket.socket) -> None:
  """Answer questions until the other side is closed."""
  connection.sendall(b"+\n")
  for line in connection.makefile("rb"):
    gold, answer = json.loads(line)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    verdict = is_equal(gold, answer)
    signal.setitimer(signal.ITIMER_PROF, 0)
    connection.sendall(b"1\n" if verdict else b"0\n")


def _bound() -> None:
  """Limit memory, and have the signal of the timer end the process whatever the parent made of it."""
  # Signals that stop a run are for the run to answer, which still needs this process to save itself.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  signal.signal(signal.SIGPROF, signal.SIG_DFL)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  with contextlib.suppress(OSError, ValueError):  # Not on every system, and not above a lower limit.
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
  logging.disable()


if __name__ == "__main__":
  _bound()
  with contextlib.suppress(BrokenPipeError, ConnectionResetError):
    serve(socket.socket(fileno=int(sys.argv[1])))
