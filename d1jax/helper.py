"""Runs a Python program in its own process, for work that may hang, crash or grow; it answers lines with lines.

The program gets the number of a socket as its argument, writes one line when it is ready, and answers each line with
one line. The program sets its own limits. If it ends, the next question starts it again. It ends with this process.
"""

import atexit
import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

START_SECONDS = 300
"""The wall time within which a program must be ready; it may read thousands of files."""

ANSWER_SECONDS = 600
"""The largest wall time of a question. Programs limit their CPU time, which does not depend on the machine's load."""

MOST_BYTES = 64 << 20
"""The largest size of an answer, in bytes."""


_TAKEN = {resource.RLIMIT_AS: 0, resource.RLIMIT_DATA: 5}
"""The field of /proc/self/statm that holds a process's use of each limited resource, in pages."""


def limit_memory(spare: int, kind: int = resource.RLIMIT_AS) -> None:
  """Limits the memory of this process to its present use and `spare` more; some systems have no such limit.

  Args:
    spare: the additional bytes.
    kind: `RLIMIT_AS` counts all addresses, also of files and of memory that is only reserved; `RLIMIT_DATA` counts
      memory that the process may write to, and suits programs that reserve much and use little.
  """
  with contextlib.suppress(OSError, ValueError, IndexError):
    with open("/proc/self/statm", "rb") as file:
      taken = int(file.read().split()[_TAKEN[kind]]) * os.sysconf("SC_PAGE_SIZE")
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (taken + spare if hard < 0 else min(taken + spare, hard), hard))


class EndedError(Exception):
  """The process ended, or had to be stopped, during a question; the message completes "it ..."."""


class Helper:
  """Asks one question at a time, from any thread; a forked process starts its own program."""

  def __init__(self, program: Path, environment: Mapping[str, str] | None = None):
    """Stores the arguments; nothing starts yet.

    Args:
      program: a Python file.
      environment: variables in addition to those of this process.
    """
    self._program = program
    self._environment = dict(environment or {})
    self._started = 0
    self._forget()
    os.register_at_fork(after_in_child=self._forget)
    atexit.register(self.close)

  def start(self) -> int:
    """Starts the program if it is not running, and returns how often it was started.

    A caller that sends data first must hold `lock` from here until its question: a new number means a new process,
    which has not received the data.

    Raises:
      EndedError: the program does not start.
    """
    with self.lock:
      if self._process is None or self._process.poll() is not None:
        self._stop()
        self._start()
      return self._started

  def ask(self, line: bytes) -> bytes:
    """Sends a line and returns the answer, both without a line feed.

    Raises:
      EndedError: there is no answer, because the process is gone.
    """
    with self.lock:
      self.start()
      return self._exchange(line + b"\n", ANSWER_SECONDS)

  def close(self) -> None:
    """Stops the process, if there is one."""
    with self.lock:
      self._stop()

  def _forget(self) -> None:
    self.lock = threading.RLock()
    self._process: subprocess.Popen[bytes] | None = None
    self._socket: socket.socket | None = None
    self._answers: BinaryIO | None = None

  def _start(self) -> None:
    # The child imports the parent's modules, iterates over sets in a fixed order, and does not receive Ctrl-C.
    places = [str(Path(__file__).parents[1]), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "PYTHONHASHSEED": "0", **self._environment}
    ours, theirs = socket.socketpair()
    with theirs:
      try:
        self._process = subprocess.Popen(
          [sys.executable, "-P", str(self._program), str(theirs.fileno())],
          stdin=subprocess.DEVNULL,
          stdout=subprocess.DEVNULL,
          stderr=subprocess.DEVNULL,
          pass_fds=[theirs.fileno()],
          env=environment,
          start_new_session=True,
        )
      except OSError as error:
        ours.close()
        raise EndedError(f"does not start ({error})") from None
    self._socket, self._answers = ours, ours.makefile("rb")
    self._started += 1
    try:
      self._exchange(b"", START_SECONDS)
    except EndedError as error:
      raise EndedError(f"does not start: it {error}") from None

  def _exchange(self, line: bytes, seconds: float) -> bytes:
    assert self._socket is not None
    assert self._answers is not None
    answer, reason = b"", ""
    try:
      self._socket.settimeout(seconds)
      self._socket.sendall(line)
      answer = self._answers.readline(MOST_BYTES)
    except TimeoutError:
      reason = f"gave no answer in {seconds:.0f} s"
    except OSError:
      pass
    finally:  # stopped here, since a late answer would be taken for the next one's
      if not answer.endswith(b"\n"):
        reason = reason or (f"wrote more than {MOST_BYTES >> 20} MiB" if answer else "")
        reason = self._stop(killed=bool(reason)) or reason
    if reason:
      raise EndedError(reason)
    return answer[:-1]

  def _stop(self, *, killed: bool = True) -> str:
    """Stops the process. Returns how it ended by itself, or an empty text if it was killed here."""
    process, self._process = self._process, None
    if self._answers is not None:
      self._answers.close()
    if self._socket is not None:
      self._socket.close()
    self._answers = self._socket = None
    if process is None:
      return ""
    if not killed:
      with contextlib.suppress(subprocess.TimeoutExpired):  # it closed its socket, so it has ended or soon will
        process.wait(1)
    code = process.poll()
    process.kill()
    process.wait()
    if killed or code is None:
      return "" if killed else "closed its side"
    if code == -signal.SIGPROF:
      return "used up its CPU time"
    if code == -signal.SIGABRT:
      return "used up its memory, or crashed"
    return f"ended with the exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
