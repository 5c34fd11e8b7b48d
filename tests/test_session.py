"""The rules of `tests/session.py`, on made-up sessions."""

import os
import re
import signal
import subprocess
import sys
import types

import pytest

from tests import jobs, session

DETACHED = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(300)"], start_new_session=True,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(child.pid)
"""


class Item:
  """A case of a test, with some marks."""

  def __init__(self, nodeid: str, *marks: pytest.MarkDecorator) -> None:
    self.nodeid, self.marks = nodeid, [mark.mark for mark in marks]

  def get_closest_marker(self, name: str):
    return next(self.iter_markers(name), None)

  def iter_markers(self, name: str):
    return (mark for mark in self.marks if mark.name == name)

  def add_marker(self, mark: pytest.MarkDecorator) -> None:
    self.marks.append(mark.mark)


def test_few_cases_are_quick_and_from_all_over():
  items = [Item(f"t.py::test[{i}]", pytest.mark.few(3, reason="long")) for i in range(7)]
  items += [Item("t.py::other[0]", pytest.mark.few(2, reason="long")), Item("t.py::plain")]
  session.pytest_collection_modifyitems(items)
  assert [item.nodeid for item in items if not item.get_closest_marker("slow")] == [
    *(f"t.py::test[{i}]" for i in (0, 2, 4)),
    *("t.py::other[0]", "t.py::plain"),
  ]
  assert items[1].get_closest_marker("slow").kwargs == {"reason": "long"}


@pytest.mark.parametrize("mark", [pytest.mark.slow, pytest.mark.slow(reason=""), pytest.mark.few(1)])
def test_a_slow_test_says_why(mark, tmp_path, monkeypatch):
  monkeypatch.setattr(session, "FOLDER", tmp_path)
  items = [Item(f"t.py::test[{i}]", mark) for i in range(2)]
  with pytest.raises(pytest.UsageError, match=r"a slow test says why: .*reason=.*\n  t\.py::test\[1\]"):
    session.pytest_collection_modifyitems(items[1:] if mark.name == "slow" else items)


@pytest.mark.parametrize(("budget", "code"), [(1e9, 0), (1e-9, 0), (1e-9, 1), (None, 0)])
def test_a_session_that_takes_longer_than_its_budget_fails(monkeypatch, budget, code):
  watch = session.Watch()
  monkeypatch.setattr(session, "watch", watch)
  watch.read()
  watch.read()  # too early for a second reading
  assert len(watch.readings) == 1
  assert watch.scaled(3) == pytest.approx(3 * session.YARDSTICK / watch.readings[0])
  session._judge_time(types.SimpleNamespace(exitstatus=code), budget)
  assert re.match(r"time: \d+ s of wall, \d+ s of CPU, \d+ s of CPU scaled ", watch.lines[0])
  assert (" margin 10%)" in watch.lines[0]) == (budget is not None)
  assert len(watch.lines) == 1 + (budget == 1e-9 and not code)


def test_what_outlives_the_tests_is_known_by_its_environment():
  found = subprocess.run([sys.executable, "-S", "-c", DETACHED], capture_output=True, text=True, check=True)
  pid = int(found.stdout)
  try:
    assert "time.sleep(300)" in session._orphans()[pid]
  finally:
    os.kill(pid, signal.SIGKILL)
  own = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
  assert own.pid not in session._orphans()
  own.communicate(b"\n")


def test_a_shared_folder_is_made_once():
  made = []

  def make(folder):
    folder.mkdir()
    made.append(folder)
    return len(made)

  name = f"test_session-{os.getpid()}"
  assert session.shared(name, make) == session.shared(name, make) == (made[0], 1)


def test_the_budgets_are_those_of_the_makefile():
  assert re.findall(r' -m "(.*?)"', (jobs.ROOT / "Makefile").read_text()) == list(session.BUDGETS)
