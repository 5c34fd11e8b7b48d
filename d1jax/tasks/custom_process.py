"""The process of a custom task: `custom` starts it, and it answers calls that come over a socket.

The user's file is imported here and nowhere else. Whatever it does (raise, exit, hang, crash, close files, fork, use up
memory, change its arguments) affects only this process, which `custom` watches and replaces.
"""

import importlib.util
import os
import resource
import signal
import sys
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from d1jax.helper import limit_memory
from d1jax.tasks import checked
from d1jax.tasks.base import Task, TaskError

_PREFIX = "d1jax_custom_"

_MEMBERS = sorted({*Task.__annotations__, *(name for name in vars(Task) if not name.startswith("_"))})


class Settings(NamedTuple):
  """What builds a task: its file, and the keywords of its `build`."""

  path: str
  keywords: Mapping[str, Any]


def build(settings: Settings) -> Task:
  """Build the task of a user's file.

  Raises:
    TaskError: the file cannot be found or run, or does not build a `Task`.
  """
  path = settings.path
  maker = getattr(load(path), "build", None)
  if not callable(maker):
    raise TaskError(f"{path}: defines no build(*, seed, root, sizes); add it, such as `build = MyTask`")
  try:
    task = maker(**settings.keywords)
  except BaseException as error:  # SystemExit too: it would end the process and say nothing.
    raise TaskError(f"{place(path, error)}: build(seed, root, sizes, options) failed: {described(error)}") from error
  try:
    _check(task, path)
  except TaskError:
    raise
  except Exception as error:  # of a property
    raise TaskError(f"{place(path, error)}: the task that build() made fails: {described(error)}") from error
  return task


def _check(task: object, path: str) -> None:
  """Raises a TaskError unless it has what a task has."""
  if not isinstance(task, Task):
    missing = ", ".join(name for name in _MEMBERS if not hasattr(task, name))
    raise TaskError(f"{path}: build() made a {type(task).__name__} without {missing}; a task has {', '.join(_MEMBERS)}")
  if not isinstance(task.name, str) or not task.name or "/" in task.name:
    raise TaskError(f"{path}: the task's name is {checked.shortened(task.name)}, expected a text without a slash")
  if not isinstance(task.splits, tuple | list) or not all(isinstance(split, str) for split in task.splits):
    raise TaskError(f"{path}: the task's splits are {checked.shortened(task.splits)}, expected a tuple of texts")


def load(path: str, defines: str = "build") -> ModuleType:
  """Import a user's file under a module name of its own, so that its classes can be pickled. `defines` is the name that
  the file should define, for the message.

  Raises:
    TaskError: it cannot be found, or running it fails.
  """
  file = Path(path).resolve()
  name = f"{_PREFIX}{file.stem}"
  spec = importlib.util.spec_from_file_location(name, file)
  if not file.is_file() or spec is None or spec.loader is None:
    raise TaskError(f"{path}: no such Python file under {Path.cwd()}; name the .py file that defines {defines}")
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  try:
    spec.loader.exec_module(module)
  except BaseException as error:
    raise TaskError(f"{place(path, error)}: {described(error)}; run it with Python alone to see more") from error
  return module


def answer(task: Task, path: str, method: str, arguments: tuple[Any, ...]) -> Any:
  """Call a method of the task, and check what it returns.

  Raises:
    TaskError: it raised any exception, or returned a value that is not allowed.
  """
  try:
    result = getattr(task, method)(*arguments)
  except BaseException as error:
    raise TaskError(f"{place(path, error)}: {checked.called(method, arguments)} failed: {described(error)}") from error
  try:
    return checked.check_answer(method, arguments, result)
  except Exception as error:  # also of a mapping whose methods raise
    problem = str(error) if type(error) is ValueError else f"returned what cannot be read: {described(error)}"
    raise TaskError(f"{path}: {checked.called(method, arguments)} {problem}") from error


def serve(connection: Connection) -> None:
  """Answer calls until the other side is closed: first the settings, then a method and its arguments each time.

  Every call comes with its seconds; after twice that time this process ends by itself, in case no other process is left
  to end it.
  """
  this_process, path = os.getpid(), ""
  task: Task
  reply: tuple[bool, Any]
  while True:
    seconds, request = connection.recv()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 2 * seconds)
    try:
      if isinstance(request, Settings):
        task, path = build(request), request.path
        reply = (True, (task.name, tuple(task.splits)))
      else:
        reply = (True, answer(task, path, *request))
    except TaskError as error:
      reply = (False, str(error))
    signal.setitimer(signal.ITIMER_REAL, 0)
    if os.getpid() != this_process:  # The task forked, and this is the copy.
      os._exit(0)
    connection.send(reply)


def main() -> None:
  """Serve, and end at once when the socket closes: remaining threads of the task do not keep the process alive.

  The arguments are the number of the socket, and the bytes of memory that the task may take.
  """
  connection = Connection(int(sys.argv[1]))
  limit_memory(int(sys.argv[2]), resource.RLIMIT_DATA)

  stops = (signal.SIGTERM, signal.SIGINT)

  def forked() -> None:
    connection.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)

  # Stop signals are for the run to answer. What the task starts answers them itself again, from its first moment on:
  # a signal that comes while a process forks waits until the copy is ready for it.
  for number in stops:
    signal.signal(number, lambda *_: None)
  os.register_at_fork(
    before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, stops),
    after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, stops),
    after_in_child=forked,
  )
  try:
    serve(connection)
  except (EOFError, OSError):
    os._exit(0)


def place(path: str, error: BaseException) -> str:
  """The file, and the line that failed, if it is known."""
  lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(Path(path).resolve())]
  line = error.lineno if isinstance(error, SyntaxError) and not lines else next(reversed(lines), None)
  return path if line is None else f"{path} line {line}"


def described(error: BaseException) -> str:
  """The kind and the text of what was raised."""
  try:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
  except Exception:
    text = "(its text fails too)"
  most, _ = resource.getrlimit(resource.RLIMIT_DATA)
  if isinstance(error, MemoryError) and most > 0:
    text = f"{text} (the process of a task may take {most / 2**30:.1f} GiB)"
  return " ".join(f"{type(error).__name__}: {text}".split()).removesuffix(":")[:500]
