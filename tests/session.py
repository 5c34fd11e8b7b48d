"""What holds for a session of tests as a whole: its folder, its CPU time, and that nothing outlives it.

All processes of a session, the workers of pytest-xdist and whatever tests start, find its folder in the environment.
Temporary files go there, compiled programs, and runs that several tests read. `tests/conftest.py` registers this
module as a plugin.
"""

import atexit
import contextlib
import fcntl
import gc
import os
import pickle
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

Value = TypeVar("Value")

VARIABLE = "D1JAX_TEST_SESSION"
"""The environment variable that names the folder, and by which a process of the session is known."""

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ

YARDSTICK = 0.0084
"""CPU seconds of `yardstick` on the machine of the budgets, two idle cores."""

BUDGETS = {"not slow": 600.0, "(slow or hypothesis) and not long": None}
"""CPU seconds, on the machine of the yardstick, of the quick and of the slow tests, by their marks (see Makefile); the
slow ones only say what they took."""

MARGIN = 1.1
"""CPU time of the same session differs from one time to the next by less than this."""


def _open() -> Path:
  """The folder of the session, which the first of its processes makes."""
  if IS_WORKER:
    return Path(os.environ[VARIABLE])
  os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # pytest's own folders stay where they are
  for number in (signal.SIGINT, signal.SIGHUP):  # nohup and background jobs of a shell ignore them, and so would tests
    if signal.getsignal(number) is signal.SIG_IGN:
      signal.signal(number, signal.SIG_DFL if number == signal.SIGHUP else signal.default_int_handler)
  folder = Path(tempfile.mkdtemp(prefix="d1jax-tests-"))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  for name in ("tmp", "cache", "shared"):
    (folder / name).mkdir()
  os.environ |= {VARIABLE: str(folder), "TMPDIR": str(folder / "tmp")}
  tempfile.tempdir = None  # it is read anew
  return folder


FOLDER = _open()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
  with path.open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def shared(name: str, make: Callable[[Path], Value]) -> tuple[Path, Value]:
  """A folder that one test of the session makes and all of them read; who changes it copies it first.

  Args:
    name: of the folder.
    make: fills a folder that does not exist yet.

  Returns:
    The folder, and what `make` returned.
  """
  folder = FOLDER / "shared" / name
  with _locked(folder.with_suffix(".lock")):
    if not (done := folder.with_suffix(".done")).exists():
      shutil.rmtree(folder, ignore_errors=True)  # of an attempt that failed
      done.write_bytes(pickle.dumps(make(folder)))
    return folder, pickle.loads(done.read_bytes())


def yardstick() -> float:
  """CPU seconds of a computation that is always the same."""
  start = time.process_time()
  sum(i * i for i in range(200_000))
  return time.process_time() - start


def cpu_seconds() -> float:
  """CPU time of this process and of all that it has waited for, and those of theirs."""
  usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
  return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class Watch:
  """Times the yardstick now and then, as the machine's load changes, in the processes that run tests."""

  def __init__(self) -> None:
    self.began = time.monotonic()
    self.readings: list[float] = []
    self._next = 0.0
    self.lines: list[str] = []

  def read(self) -> None:
    if time.monotonic() >= self._next:
      self.readings.append(yardstick())
      self._next = time.monotonic() + 5

  def scaled(self, seconds: float) -> float:
    """What the same work would have taken on the machine of the yardstick."""
    return seconds * YARDSTICK * len(self.readings) / sum(self.readings) if self.readings else seconds


watch = Watch()


def pytest_configure(config: pytest.Config) -> None:
  if IS_WORKER:
    config.workeroutput["readings"] = watch.readings  # sent at the end, when it is full


def pytest_runtest_teardown() -> None:
  watch.read()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
  watch.readings += getattr(node, "workeroutput", {}).get("readings", [])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Makes most cases slow where a test asks for few, and refuses slow tests that do not say why they are."""
  cases: dict[str, list[pytest.Item]] = {}
  for item in items:
    if item.get_closest_marker("few"):
      cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
  for own in cases.values():
    mark = own[0].get_closest_marker("few")
    (count,) = mark.args
    quick = {i * len(own) // count for i in range(count)}  # from all over
    for i, item in enumerate(own):
      if i not in quick:
        item.add_marker(pytest.mark.slow(**mark.kwargs))
  silent = {item.nodeid for item in items for mark in item.iter_markers("slow") if not mark.kwargs.get("reason")}
  if silent:
    names = "\n  ".join(sorted(silent))
    refusal = f'a slow test says why: @pytest.mark.slow(reason="..."):\n  {names}'
    (FOLDER / "refusal").write_text(refusal)
    raise pytest.UsageError(refusal)


def pytest_collection_finish() -> None:
  """What is imported and collected stays: a sixth of a test's time was the search for garbage among it."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(20_000, 20, 20)


def pytest_unconfigure() -> None:
  """Says what a worker refused, which pytest-xdist does not."""
  if not IS_WORKER and (FOLDER / "refusal").exists():
    print((FOLDER / "refusal").read_text())


@pytest.hookimpl(trylast=True)  # the workers have ended by then
def pytest_sessionfinish(session: pytest.Session) -> None:
  if IS_WORKER:
    return
  config = session.config
  marks, whole = config.option.markexpr, config.args_source is config.ArgsSource.TESTPATHS
  if whole and not config.option.keyword and not config.option.collectonly and marks in BUDGETS:
    _judge_time(session, BUDGETS[marks])
  if left := leftovers():
    watch.lines += ["FAILED: this outlived the tests:", *(f"  {line}" for line in left)]
  if session.exitstatus == pytest.ExitCode.OK and any(line.startswith("FAILED") for line in watch.lines):
    session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _judge_time(session: pytest.Session, budget: float | None) -> None:
  wall, cpu = time.monotonic() - watch.began, cpu_seconds()
  scaled = watch.scaled(cpu)
  line = f"time: {wall:.0f} s of wall, {cpu:.0f} s of CPU, {scaled:.0f} s of CPU scaled to the machine of the budgets"
  watch.lines.append(line + (f" (budget {budget:.0f} s, margin {MARGIN - 1:.0%})" if budget else ""))
  if budget and session.exitstatus == pytest.ExitCode.OK and scaled > budget * MARGIN:
    watch.lines.append("FAILED: that is more; make tests quicker or mark them slow (--durations=50 shows the longest)")


def pytest_terminal_summary(terminalreporter) -> None:
  for line in watch.lines:
    terminalreporter.write_line(line, red=line.startswith("FAILED"))


def leftovers(grace: float = 10) -> list[str]:
  """Processes of the session that run on without one that would end them, which are killed, and temporary files."""
  end = time.monotonic() + grace
  while (processes := _orphans()) and time.monotonic() < end:
    time.sleep(0.1)
  for pid in processes:
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, signal.SIGKILL)
  files = [f"temporary file {path.name}" for path in sorted((FOLDER / "tmp").iterdir())]
  return [f"process {pid}: {command}" for pid, command in processes.items()] + files


def _orphans() -> dict[int, str]:
  """The command lines of the session's processes that do not descend from this one; {} where there is no /proc."""
  parents, commands = {}, {}
  for folder in Path("/proc").glob("[0-9]*"):
    try:
      state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
      if state != "Z":
        parents[int(folder.name)] = int(parent)
        if f"{VARIABLE}={FOLDER}".encode() in (folder / "environ").read_bytes().split(b"\0"):
          commands[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ").strip()
    except OSError:  # it has just ended, or is another's
      continue
  return {pid: command for pid, command in commands.items() if os.getpid() not in _line(pid, parents)}


def _line(pid: int, parents: dict[int, int]) -> set[int]:
  """A process and its forebears."""
  found = set()
  while pid in parents and pid not in found:
    found.add(pid)
    pid = parents[pid]
  return found
