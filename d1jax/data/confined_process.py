"""The process behind `confined`: `python confined_process.py FD` runs tokenizers for questions that come over a socket.

A question is a line, the JSON list `[what, number, arguments]`; the answer is the line `{"value": ...}` or
`{"error": "..."}`. No question takes more CPU time and memory than the limits below: a timer ends the process in the
midst of whatever it computes, and an allocation beyond the limit fails.
"""

import contextlib
import json
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from d1jax.data.hugging_face import HuggingFaceTokenizer
from d1jax.helper import limit_memory

CPU_SECONDS = 2.0
"""Of a question, and again for each MiB of it: a prompt takes a millisecond, a vocabulary of 5 MB half a second."""

SPARE_BYTES = 512 << 20
"""Of address space that a question may take beyond what vocabularies take; a prompt takes next to nothing."""

BYTES_A_BYTE = 40
"""Of address space that reading a vocabulary takes for each byte of its files; half of that was measured."""


class Server:
  """The tokenizers by their numbers."""

  def __init__(self, limit: Callable[[int], None], allow: Callable[[float], None]):
    """Starts without any.

    Args:
      limit: sets the memory that may be taken from now on, in bytes.
      allow: sets the CPU seconds that may be spent from now on; 0 is any.
    """
    self._limit, self._allow = limit, allow
    self._tokenizers: dict[int, HuggingFaceTokenizer] = {}
    limit(SPARE_BYTES)

  def answer(self, line: bytes) -> bytes:
    """Answers one question; whatever goes wrong is an answer too."""
    what, number, arguments = json.loads(line)
    self._allow(CPU_SECONDS * (1 + len(line) / (1 << 20)))
    try:
      answer = json.dumps({"value": self._value(what, number, arguments)})
    except ValueError as error:
      answer = json.dumps({"error": str(error)})
    except BaseException as error:  # MemoryError, RecursionError; a panic of the library is no Exception
      answer = json.dumps({"error": f"the tokenizer fails ({type(error).__name__}: {str(error)[:200]})"})
    self._allow(0.0)
    return answer.encode()

  def _value(self, what: str, number: int, arguments: Sequence[Any]) -> Any:
    if what == "load":
      files = {name: content.encode("latin-1") for name, content in arguments[0].items()}
      self._limit(SPARE_BYTES + BYTES_A_BYTE * sum(map(len, files.values())))
      try:
        self._tokenizers[number] = HuggingFaceTokenizer(files)
      finally:
        self._limit(SPARE_BYTES)
      return None
    if what == "forget":
      return self._tokenizers.pop(number, None) and None
    tokenizer = self._tokenizers[number]
    if what == "ids":
      return {name: getattr(tokenizer, name) for name in ("vocab", "mask_id", "stop_ids", "pad_id", "unk_id")}
    tried, decoded = ("try_template", "try_tokenizer"), ("decode_all", "decode_raw")
    methods = (*tried, "prompt", "completion", "written", "encode", "unknown", *decoded)
    return {name: getattr(tokenizer, name) for name in methods}[what](*arguments)


def limit_time(seconds: float) -> None:
  """Lets the process spend so much CPU time; 0 is any."""
  signal.setitimer(signal.ITIMER_PROF, seconds)


def serve(connection: socket.socket) -> None:
  """Answers questions until the other side is closed."""
  server = Server(limit_memory, limit_time)
  connection.sendall(b"ready\n")
  for line in connection.makefile("rb"):
    connection.sendall(server.answer(line) + b"\n")


if __name__ == "__main__":
  # The signal of the timer ends the process whatever the parent made of it.
  # Signals that stop a run are for the run to answer, which still needs this process to save itself.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  signal.signal(signal.SIGPROF, signal.SIG_DFL)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  with contextlib.suppress(BrokenPipeError, ConnectionResetError):
    serve(socket.socket(fileno=int(sys.argv[1])))
