"""One run at a time in a folder, and none that a dead one locks."""

import json
import os
import signal
import subprocess
import sys

import pytest

from d1jax.errors import RunError
from d1jax.run import lock
from d1jax.run.lock import locked

HOLD = """
import sys, time
from pathlib import Path
from d1jax.run.lock import locked
with locked(Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(600)
"""

FORK = """
import os, sys, time
from pathlib import Path
from d1jax.run.lock import locked
with locked(Path(sys.argv[1])):
  if os.fork():
    os._exit(0)
  print(os.getpid(), flush=True)  # it is on its own by now
  time.sleep(600)
"""


def test_the_second_is_refused_and_told_of_the_first(tmp_path):
  told = rf"in use by another run \(process {os.getpid()} on .*workdir"
  with locked(tmp_path), pytest.raises(RunError, match=told), locked(tmp_path):
    pass
  with locked(tmp_path):
    pass
  assert not list(tmp_path.iterdir())


def test_a_killed_run_locks_nothing(tmp_path):
  holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
  try:
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunError, match=f"process {holder.pid} on"), locked(tmp_path):
      pass
  finally:
    holder.kill()
    holder.communicate()
  assert (tmp_path / lock.NAME).exists()
  with locked(tmp_path):
    assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


def test_a_forked_child_does_not_hold_the_lock_after_its_parent(tmp_path):
  parent = subprocess.Popen([sys.executable, "-c", FORK, tmp_path], stdout=subprocess.PIPE, text=True)
  child = int(parent.stdout.readline())
  parent.wait()
  try:
    with locked(tmp_path):
      pass
  finally:
    os.kill(child, signal.SIGKILL)
    parent.stdout.close()


def test_a_folder_that_nothing_was_written_to_goes_again(tmp_path):
  with pytest.raises(ValueError, match="wrong"), locked(tmp_path / "deep" / "run"):
    raise ValueError("wrong settings")
  assert not list(tmp_path.iterdir())
  with locked(tmp_path / "run"):
    (tmp_path / "run" / "config.json").write_text("{}")
  assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b"[" * 900])
def test_a_holder_that_cannot_be_read_still_holds(tmp_path, content):
  with locked(tmp_path):
    (tmp_path / lock.NAME).write_bytes(content)
    with pytest.raises(RunError, match="in use by another run"), locked(tmp_path):
      pass


@pytest.mark.parametrize("number", [30, 13])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, number):
  def fail(*arguments):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(lock.os, "open", fail)
  with pytest.raises(RunError, match="cannot be written"), locked(tmp_path):
    pass


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  for folder in (tmp_path / "file", tmp_path / "file" / "run"):
    with pytest.raises(RunError, match="is a file, expected a folder"), locked(folder):
      pass


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, caplog):
  def fail(*arguments):
    raise OSError(37, "No locks available")

  monkeypatch.setattr(lock.fcntl, "flock", fail)
  with locked(tmp_path):
    assert f"the file system of {tmp_path} has no locks" in caplog.text


def test_a_bucket_is_named(bucket, caplog):
  with locked(bucket / "run"):
    assert "gs://bucket/run lies in a bucket, which has no locks" in caplog.text


@pytest.mark.parametrize("what", ["a link", "a link to nothing", "a folder", "a pipe"])
def test_what_is_no_lock_is_left_alone(tmp_path, what):
  place, other = tmp_path / "run" / lock.NAME, tmp_path / "thesis"
  place.parent.mkdir()
  other.write_text("mine")
  make = {
    "a link": lambda: place.symlink_to(other),
    "a link to nothing": lambda: place.symlink_to(tmp_path / "new"),
    "a folder": place.mkdir,
    "a pipe": lambda: os.mkfifo(place),
  }
  make[what]()
  with pytest.raises(RunError, match=r"lock is no file .*: move it away"), locked(place.parent):
    pass
  assert other.read_text() == "mine"
  assert not (tmp_path / "new").exists()
  place.rename(tmp_path / "away")
  with locked(place.parent):
    pass
