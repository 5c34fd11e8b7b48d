"""Tasks of a user's own: one small file that defines `build(*, seed, root, sizes, **options) -> Task`.

A frozen dataclass with those fields is enough (`build = MyTask`); `tests/tasks/parity_task.py` is a worked example. The
file is run as ordinary Python with the rights of the run: point only at files that you trust.

It runs in a separate process (`custom_process`), because a grader that hangs in a regular expression, calls `os._exit`
or runs out of memory cannot be stopped in the run's own process. A call costs about 0.1 ms more, and the start half a
second.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from d1jax.tasks import checked
from d1jax.tasks.base import Grade, Message, Record, TaskError
from d1jax.tasks.common import split_hash
from d1jax.tasks.custom_process import Settings

CALL_SECONDS = 30.0
"""The wall time of a call, such as one grade."""

START_SECONDS = 600.0
"""The wall time of calls that may read files: the start with its `build`, and the records of a split."""

MEMORY_SHARE = 0.5
"""The share of the machine's memory that the process of a task may use; each process that it starts may use as much."""

ATTEMPTS = 2
"""How often a call is tried if its process dies: a first death may be due to a lack of memory, or to a signal to all
processes.
"""

TRIED = 2
"""Records of each split that are graded before a run."""

GARBAGE = "\0 ?? </answer> 1/0 \\boxed{ [None] 9e999"
"""A text that is tried."""

PROGRAM = "from d1jax.tasks import custom_process; custom_process.main()"
"""What the process runs."""

HELD_OUT = {"validation", "test"}
"""The splits whose questions belong to no other. SFT and diffu-GRPO may train on the same ones."""

log = logging.getLogger(__name__)


def most_bytes() -> int:
  """Bytes of memory that the process of a task may use."""
  return int(MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def build(
  path: str,
  *,
  seed: int = 0,
  root: str | None = None,
  sizes: Mapping[str, int] | None = None,
  options: Mapping[str, Any] | None = None,
) -> "Custom":
  """Build the task of a user's file.

  `path` leads to the file from the working directory. The other arguments are handed on, `options` as keywords.

  Raises:
    TaskError: the file cannot be found or run, or does not build a `Task`; the message names it and says why.
  """
  keywords = {"seed": seed, "root": root, "sizes": dict(sizes or {}), **(options or {})}
  return Custom(Settings(path, keywords))


class Custom:
  """The task of a user's file, which lives in another process. Every answer is checked, and every call bounded.

  It may be called from any thread; calls run one after the other. When it is pickled only its settings are: another
  process starts its own.

  Attributes:
    name: the name of the task.
    splits: the names of its splits.
  """

  _process: "_Process | None"

  def __init__(self, settings: Settings):
    """Starts the process and builds the task.

    Raises:
      TaskError: see `build`.
    """
    self._settings = settings
    self._forget()
    self.name, self.splits = self._call()

  def records(self, split: str) -> Sequence[Record]:
    """Return the records of one split; the task is asked twice, once, and must answer the same.

    Raises:
      TaskError: it does not, or there are none; as of every method, the call fails in one of the ways that docs name.
    """
    if split not in self._records:
      records, again = self._call("records", split), self._call("records", split)
      call = f"{self._settings.path}: {checked.called('records', (split,))}"
      if split_hash(records) != split_hash(again):
        raise TaskError(f"{call} returned other records the second time: draw them with a generator seeded by `seed`")
      if not records and self._settings.keywords["sizes"].get(split) != 0:
        raise TaskError(f"{call} returned no record: leave the split out of `splits`, or set task.sizes.{split}=0")
      self._records[split] = tuple(records)
    return self._records[split]

  def prompt(self, record: Record, style: str) -> tuple[list[Message], str]:
    """Return the chat messages and the text that the completion starts with."""
    return self._call("prompt", record, style)

  def demonstration(self, record: Record, style: str) -> str:
    """Write a correct completion."""
    return self._call("demonstration", record, style)

  def baseline(self, record: Record, style: str) -> str:
    """Write the completion of a model that knows nothing but the format."""
    return self._call("baseline", record, style)

  def cluster(self, record: Record) -> str:
    """Name the record's cluster."""
    return self._call("cluster", record)

  def grade(self, text: str, record: Record, protocol: str = "strict") -> Grade:
    """Grade a completion."""
    return self._call("grade", text, record, protocol)

  def try_out(self, style: str, protocol: str) -> None:
    """Ask for all records and prompts, and grade a few texts, so that mistakes show before anything is compiled.

    Training pays by `protocol`; `strict` is tried in any case.

    Raises:
      TaskError: a call fails, or a question of `validation` or `test` is in another split too.
    """
    seen: dict[str, str] = {}
    for split in self.splits:
      records = self.records(split)
      for record in records:
        self._check_split(split, record, style, seen)
      for record in records[:TRIED]:
        texts = ["", GARBAGE]
        if split == "demonstrations":
          texts.append(self.demonstration(record, style))
        elif split in HELD_OUT:
          texts.append(self.baseline(record, style))
          self.cluster(record)
        for text in texts:
          for name in dict.fromkeys(("strict", protocol)):
            self.grade(text, record, name)

  def _check_split(self, split: str, record: Record, style: str, seen: dict[str, str]) -> None:
    messages, _ = self.prompt(record, style)
    question = " ".join(" ".join(message["content"] for message in messages).split())
    other = seen.setdefault(question, split)
    if other != split and {other, split} & HELD_OUT:
      raise TaskError(
        f"{self._settings.path}: the question {checked.shortened(question)} is in the splits {other} and {split}:"
        f" records() must give a question of {' or '.join(sorted(HELD_OUT))} to no other split, or nothing is held out"
      )

  def _call(self, method: str = "", *arguments: Any) -> Any:
    """What the task's process answers; it is replaced where it dies, and ended where it takes too long.

    Without a method: the name and the splits of the task.
    """
    path = f"{self._settings.path}:"
    with self._lock:
      for _ in range(ATTEMPTS):
        is_built, seconds = False, START_SECONDS
        try:
          if self._process is None or not self._process.is_usable():
            self._process = _Process(self._settings)
          if not method:
            return self._process.task
          is_built, seconds = True, START_SECONDS if method == "records" else CALL_SECONDS
          return self._process.ask((method, arguments), seconds)
        except TimeoutError:
          call = checked.called(method, arguments) if is_built else "build()"
          raise TaskError(f"{path} {call} took more than {seconds:g} seconds and was ended: bound its time") from None
        except _DiedError as error:
          code, call = error.code, checked.called(method, arguments) if is_built else "build()"
          log.warning("%s %s ended the process of the task (exit code %d)", path, call, code)
    raise TaskError(
      f"{path} {call} ended its process twice (exit code {code}; -6 or -9: memory ran out, of which it may take"
      f" {most_bytes() / 2**30:.1f} GiB); it must return"
    )

  def __getstate__(self) -> dict[str, Any]:
    return {"_settings": self._settings, "name": self.name, "splits": self.splits}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._forget()

  def _forget(self) -> None:
    self._lock, self._process = threading.Lock(), None
    self._records: dict[str, Sequence[Record]] = {}


class _DiedError(Exception):
  """The process of a task ended over a call."""

  def __init__(self, code: int):
    super().__init__(code)
    self.code = code


class _Process:
  """One process of a task. It ends with this object, with this process, and when a call was not answered.

  Attributes:
    task: name and splits.
  """

  def __init__(self, settings: Settings):
    """Starts it, and has it build the task."""
    # The worker imports this process's modules, and iterates over sets in the same order in every attempt of a run.
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    ours, theirs = socket.socketpair()
    with theirs:
      self._program = subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM, str(theirs.fileno()), str(most_bytes())],
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        env={**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
      )
    self._connection = Connection(ours.detach())
    self._owner = os.getpid()
    self._end = weakref.finalize(self, _end, self._program, self._connection, self._owner)
    self.task: tuple[str, Sequence[str]] = self.ask(settings, START_SECONDS)

  def is_usable(self) -> bool:
    """Whether it can be asked from here; a process that was forked off starts its own."""
    return self._end.alive and self._owner == os.getpid()

  def ask(self, request: Any, seconds: float) -> Any:
    """What it answers.

    Raises:
      TaskError: the task refused.
      TimeoutError: it took too long.
      _DiedError: it died.
    """
    try:
      self._connection.send((seconds, request))
      if not self._connection.poll(seconds):
        raise TimeoutError
      is_well, reply = self._connection.recv()
    except (EOFError, ConnectionError):
      with contextlib.suppress(subprocess.TimeoutExpired):
        self._program.wait(1)
      self._end()
      raise _DiedError(self._program.returncode) from None
    except BaseException:  # An answer that is still on its way would be taken for the next one's.
      self._end()
      raise
    if not is_well:
      raise TaskError(reply)
    return reply


def _end(program: subprocess.Popen[bytes], connection: Connection, owner: int) -> None:
  """Ends a process and its children, if this process started it."""
  connection.close()
  if owner == os.getpid():
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(program.pid, signal.SIGKILL)
    program.kill()
    program.wait()
