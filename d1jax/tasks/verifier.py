"""A process that compares expressions with `math-verify`, and is replaced when it hangs or dies.

The process is a Python interpreter that imports nothing of this package (`verifier_process`). It starts with the first
question, in whatever process that is asked; neither `math-verify` nor sympy is imported there.
"""

import atexit
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

PROGRAM = Path(__file__).with_name("verifier_process.py")
"""What the process runs."""

START_SECONDS = 300
"""The wall time in which the process must be ready: it reads some thousand files."""

ANSWER_SECONDS = 120
"""The wall time of a question; long before, the process has spent the CPU time that it allows itself."""

MOST_QUESTIONS = 10_000
"""After so many a fresh process takes over: whatever sympy remembers does not grow for days."""


class Verifier:
  """Asks one question at a time, from any thread; a process that was forked off starts its own."""

  def __init__(self, program: Path = PROGRAM):
    """Keeps what to run; nothing starts yet.

    Args:
      program: a Python file that answers as `verifier_process` does.
    """
    self._program = program
    self._forget()
    os.register_at_fork(after_in_child=self._forget)
    atexit.register(self.close)

  def ask(self, gold: str, answer: str) -> bool:
    """Tell whether two expressions are equal; a process that dies or hangs over it says no.

    Raises:
      RuntimeError: the process cannot start.
    """
    with self._lock:
      connection = self._socket
      is_alive = self._process is not None and self._process.poll() is None
      if connection is None or not is_alive or self._asked >= MOST_QUESTIONS:
        self._stop()
        connection = self._start()
      self._asked += 1
      return self._exchange(connection, json.dumps([gold, answer]).encode() + b"\n", ANSWER_SECONDS) == b"1"

  def close(self) -> None:
    """Ends the process, if there is one."""
    with self._lock:
      self._stop()

  def _forget(self) -> None:
    self._lock = threading.Lock()
    self._process: subprocess.Popen[bytes] | None = None
    self._socket: socket.socket | None = None
    self._asked = 0

  def _start(self) -> socket.socket:
    # The parent's modules, sets in the same order every time, and no Ctrl-C, which is the parent's alone.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONHASHSEED": "0"}
    ours, theirs = socket.socketpair()
    with theirs:
      self._process = subprocess.Popen(
        [sys.executable, "-P", str(self._program), str(theirs.fileno())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        env=environment,
        start_new_session=True,
      )
    self._socket, self._asked = ours, 0
    if not self._exchange(ours, b"", START_SECONDS):
      raise RuntimeError(
        "math-verify does not start; `pip install -r requirements.txt` installs it, `python -c 'import math_verify'`"
        " shows what it lacks"
      )
    return ours

  def _exchange(self, connection: socket.socket, question: bytes, seconds: float) -> bytes:
    """Send a question and return the byte that answers it, nothing where the process ended first or had to be."""
    reply = b""
    try:
      connection.settimeout(seconds)
      connection.sendall(question)
      reply = connection.recv(1)
    except OSError:
      pass
    finally:  # Whatever happened, an answer that is still on its way would be taken for the next one's.
      if not reply:
        self._stop()
    return reply

  def _stop(self) -> None:
    if self._socket is not None:
      self._socket.close()
    if self._process is not None:
      self._process.kill()
      self._process.wait()
    self._process = self._socket = None


shared = Verifier()
"""The one that graders ask."""
