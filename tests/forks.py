"""Real processes that do not import the package anew: a server that has imported it, and done nothing else, forks them.

`Fork` is a `subprocess.Popen`. Its process is a child of the test's process, has its own signals, streams, limits, exit
code and JAX backend, and ends as any Python process does. Two servers take turns, so that a process and the next one
hash strings differently, as processes do that are started one by one.
"""

import array
import atexit
import ctypes
import functools
import gc
import importlib
import itertools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SEVERAL = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
"""The only variable of JAX that is read anew in each process; the others are read where JAX is imported."""

_PR_SET_CHILD_SUBREAPER = 36
_turn = itertools.count()
_one_at_a_time = threading.Lock()


class Fork(subprocess.Popen):
  """`python -m MODULE ARGUMENTS` of a module that has a function `main`; it takes what Popen takes."""

  def __init__(self, arguments: list[str], *, largest_file_kib: int | None = None, **more: Any) -> None:
    """Starts it; no file that it writes may grow beyond `largest_file_kib`."""
    self._largest_file_kib = largest_file_kib
    super().__init__(arguments, **more)

  def _execute_child(self, args, executable, preexec, close, passed, cwd, env, info, flags, shell, *pipes_and_more):
    _, _, _, out, _, err = pipes_and_more[:6]
    imported = {name: env[name] for name in sorted(env) if name.startswith(("JAX_", "PYTHON")) and name != SEVERAL}
    asked = {"arguments": args, "cwd": os.fspath(cwd), "environment": env, "largest_file_kib": self._largest_file_kib}
    with _one_at_a_time:
      server = _server(next(_turn) % 2, json.dumps(imported))
      _adopt(True)
      try:
        _send(server, json.dumps(asked).encode(), [out, err])
        self.pid = int(server.recv(32))
      finally:
        _adopt(False)
    self._child_created = True
    self._close_pipe_fds(*pipes_and_more[:6])


def _adopt(orphans: bool) -> None:
  """Makes this process the parent of what its descendants leave behind, or not."""
  ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(orphans), 0, 0, 0)


@functools.cache
def _server(number: int, environment: str) -> socket.socket:
  """A connection to a server, which ends when it is closed."""
  ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
  command = [sys.executable, "-m", "tests.forks", str(theirs.fileno())]
  with theirs:
    process = subprocess.Popen(
      command, cwd=ROOT, env=os.environ | json.loads(environment), pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL
    )
  atexit.register(lambda: (ours.close(), process.wait()))  # its CPU time counts, too
  return ours


def _send(connection: socket.socket, message: bytes, files: list[int]) -> None:
  rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))
  connection.sendmsg([message], [rights])


def _serve(connection: socket.socket) -> dict[str, Any]:
  """Forks for each message, until the other side is closed; returns in what it forked, with the message."""
  while True:
    message, files, _, _ = socket.recv_fds(connection, 2**18, 2)
    if not message:
      sys.exit()
    reading, writing = os.pipe()
    if between := _fork():
      os.close(writing)
      with open(reading, "rb") as stream:
        pid = stream.read()
      os.waitpid(between, 0)  # who asked is the parent by now
      for file in files:
        os.close(file)
      connection.send(pid)
      continue
    if forked := _fork():
      os.write(writing, str(forked).encode())
      os._exit(0)
    os.close(reading)
    os.close(writing)
    connection.close()
    for stream, file in enumerate(files, 1):
      os.dup2(file, stream)
      os.close(file)
    return json.loads(message)


def _fork() -> int:
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of threads: OpenBLAS's, which expect it
    return os.fork()


def _become(asked: dict[str, Any]) -> None:
  """Runs what was asked for as `python -m` does."""
  signal.signal(signal.SIGINT, signal.default_int_handler)
  os.chdir(asked["cwd"])
  os.environ.clear()
  os.environ.update(asked["environment"])
  if (limit := asked["largest_file_kib"]) is not None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * limit, 1024 * limit))
  import jax

  jax.config.update(SEVERAL.lower(), float(os.environ[SEVERAL]))
  _, _, module, *arguments = asked["arguments"]
  main = sys.modules["__main__"] = importlib.import_module(module)
  sys.argv = [main.__file__, *arguments]
  main.main()


if __name__ == "__main__":
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C to all processes is for those that run something
  for imported in ("d1jax.main", "d1jax.recipe", "d1jax.evaluation.command", "d1jax.generation.command"):
    importlib.import_module(imported)
  gc.freeze()  # so that a collection in what is forked copies no page of it
  _become(_serve(socket.socket(fileno=int(sys.argv[1]))))
