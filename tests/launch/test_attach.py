"""What runs on each host of a TPU: a command that outlives its connection."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.scripts import ROOT, Machine, python, wait_until

# Counts its starts, then works until it is told to stop or has a file `enough`.
WORK = """
import pathlib
folder = pathlib.Path(arguments[0])
def stop(*_):
  say("saved")
  sys.exit(75)
signal.signal(signal.SIGTERM, stop)
with open(folder / "starts", "a") as file:
  file.write(arguments[1] + "\\n")
say("working on " + arguments[1])
while not (folder / "enough").exists():
  time.sleep(0.02)
say("done")
sys.exit(int(arguments[2]))
"""


class Host:
  """A host, and connections to it."""

  def __init__(self, folder: Path) -> None:
    self.folder, self.program = folder, python(folder, WORK)
    self.environment = Machine(folder / "machine").environment(TMPDIR=str(folder), RUN="test", GRACE="5")

  def connect(self, *words: str) -> subprocess.Popen[str]:
    command = ["bash", "launch/attach.sh", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=self.environment, start_new_session=True, **pipes)

  def work(self, attempt: str, thing: str, code: int = 0) -> subprocess.Popen[str]:
    return self.connect(attempt, str(self.program), str(self.folder), thing, str(code))

  @property
  def starts(self) -> list[str]:
    path = self.folder / "starts"
    return path.read_text().splitlines() if path.exists() else []

  def enough(self) -> None:
    (self.folder / "enough").touch()


@pytest.fixture
def host(tmp_path):
  host = Host(tmp_path)
  yield host
  host.connect("--stop").wait(timeout=30)


def finish(connection: subprocess.Popen[str]) -> tuple[int, list[str]]:
  """(exit code, lines without the host's name)."""
  out, _ = connection.communicate(timeout=30)
  assert all(line.startswith(f"[{os.uname().nodename}] ") for line in out.splitlines())
  return connection.returncode, [line.partition("] ")[2] for line in out.splitlines()]


@pytest.mark.parametrize("code", [0, 2, 70, 75])
def test_output_and_exit_code_are_those_of_the_command(code, host):
  host.enough()
  assert finish(host.work("1", "a", code)) == (code, ["working on a", "done"])


def test_a_connection_that_breaks_is_taken_up_again_without_a_second_start(host):
  first = host.work("1", "a", 70)
  wait_until(lambda: host.starts == ["a"])
  os.killpg(first.pid, signal.SIGKILL)
  first.communicate()
  second = host.work("1", "a", 70)
  host.enough()
  assert finish(second) == (70, ["working on a", "done"])
  # And once more after it has ended.
  assert finish(host.work("1", "a", 70)) == (70, ["working on a", "done"])
  assert finish(host.connect()) == (70, ["working on a", "done"])
  assert host.starts == ["a"]


def test_a_new_attempt_lets_the_one_before_save_itself(host):
  first = host.work("1", "a")
  wait_until(lambda: host.starts == ["a"])
  second = host.work("2", "b")
  wait_until(lambda: host.starts == ["a", "b"])
  # Not 75: the start that was replaced must not replace the new one in turn.
  assert first.wait(timeout=30) == 130
  host.enough()
  assert finish(second) == (0, ["working on b", "done"])


def test_stop_ends_it(host):
  first = host.work("1", "a")
  wait_until(lambda: host.starts == ["a"])
  assert host.connect("--stop").wait(timeout=30) == 0
  assert finish(first) == (130, ["working on a", "saved"])
  assert host.connect("--stop").wait(timeout=30) == 0


def test_a_command_that_is_killed_is_no_success(host):
  first = host.work("1", "a")
  wait_until(lambda: host.starts == ["a"])
  pid = int(next(host.folder.glob("launch-*/pid")).read_text())
  os.kill(pid, signal.SIGKILL)
  code, lines = finish(first)
  assert code == 137
  assert lines[0] == "working on a"


def test_nothing_to_follow_is_said(host):
  connection = host.connect()
  _, error = connection.communicate(timeout=30)
  assert connection.returncode == 2
  assert "nothing was started on" in error


def planted(folder: Path, kind: str) -> tuple[Path, Path]:
  """What somebody else may put where the scripts keep their notes: (the place, a file that must not change)."""
  place, treasure = folder / f"launch-{os.popen('id -un').read().strip()}-test", folder / "treasure"
  treasure.write_text("mine")
  if kind == "link":
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "attempt").symlink_to(treasure)
    place.symlink_to(folder / "elsewhere")
  elif kind == "file":
    place.write_text("not a folder")
  else:
    place.mkdir()
    (place / "attempt").symlink_to(treasure)
    (place / "log").symlink_to(treasure)
    (place / "pid").write_text(str(os.getpid()))
    if kind == "of another user":
      os.chown(place, 12345, 12345)
  return place, treasure


@pytest.mark.parametrize("words", [("1", "true"), ("--stop",), ()], ids=["start", "stop", "follow"])
@pytest.mark.parametrize("kind", ["link", "file", "of another user"])
def test_a_planted_folder_is_refused_and_nothing_is_written_or_ended(host, kind, words):
  if kind == "of another user" and os.getuid():
    kind = "link"  # root alone gives folders away
  place, treasure = planted(host.folder, kind)
  connection = host.connect(*words)
  _, error = connection.communicate(timeout=30)
  assert connection.returncode == 2
  assert f"{place} is not a folder of" in error
  assert treasure.read_text() == "mine"
  place.unlink() if not place.is_dir() or place.is_symlink() else os.chown(place, os.getuid(), os.getgid())
  if place.is_dir():
    for path in place.iterdir():
      path.unlink()
    place.rmdir()


def test_no_other_user_can_enter_the_folder(host):
  host.enough()
  assert finish(host.work("1", "a"))[0] == 0
  assert next(host.folder.glob("launch-*")).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("watched", [False, True])
def test_a_host_that_nobody_watches_any_more_is_given_back(watched, host):
  host.environment |= {"AFTER": f"touch '{host.folder}/deleted'", "LINGER": "2" if watched else "0"}
  host.enough()
  assert finish(host.work("1", "a"))[0] == 0
  if watched:  # another attempt begins before the time is over
    host.environment["AFTER"] = ""
    assert finish(host.work("2", "b"))[0] == 0
    time.sleep(2.5)
    assert not (host.folder / "deleted").exists()
  else:
    wait_until((host.folder / "deleted").exists)


def test_a_command_whose_time_is_over_saves_itself(host):
  running = host.connect(
    "1", *["timeout", "--foreground", "--kill-after=9", "0.5"], str(host.program), str(host.folder), "a", "0"
  )
  code, lines = finish(running)
  assert (code, lines) == (124, ["working on a", "saved"])
