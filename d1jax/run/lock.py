"""Allows one run at a time in a work directory.

Process 0 holds a lock (flock) on `WORKDIR/lock` while the run lives. The system releases the lock whenever the process
ends, so that a killed run does not block the next one. The file says which process holds the lock.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from d1jax.errors import RunError, input_checked
from d1jax.files import FileError, read_json, write_check
from d1jax.parallel import multihost
from d1jax.run.workdir import Folder, unwritable

log = logging.getLogger(__name__)
NAME = "lock"

_held: set[int] = set()
"""Open lock files of this process. A forked child closes them, or it would hold the lock after its parent's end."""


def _forget() -> None:
  while _held:
    os.close(_held.pop())


os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def locked(workdir: Folder) -> Iterator[None]:
  """Holds the lock of a work directory. A folder that was made for the lock is removed if nothing was written to it.

  Raises:
    RunError: another run holds it; the message says which.
  """
  if not isinstance(workdir, Path):
    if multihost.is_main():
      log.warning("%s lies in a bucket, which has no locks: start no second run in it", workdir)
    yield
    return
  file: int | None = None
  made: list[Path] = []

  def acquire() -> None:
    nonlocal file
    file = _acquire(workdir, made)

  try:
    multihost.from_main(acquire)
    yield
  finally:
    if file is not None:
      (workdir / NAME).unlink(missing_ok=True)
      _held.discard(file)
      os.close(file)
    with contextlib.suppress(OSError):  # the folder is not empty
      for folder in made:
        folder.rmdir()


@input_checked()
def _acquire(workdir: Path, made: list[Path]) -> int | None:
  """The open lock file; None if the file system has no locks. `made` receives the folders made for it."""
  write_check(workdir)
  absent = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    made += absent
    while True:
      _check(workdir / NAME)
      file = os.open(workdir / NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file), os.stat(workdir / NAME)):
          break
      except BlockingIOError:
        os.close(file)
        raise RunError(f"{workdir} is in use by {_holder(workdir / NAME)}; {REMEDY}") from None
      except FileNotFoundError:  # the run that held the lock has just ended and removed the file
        pass
      os.close(file)
  except OSError as error:
    if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
      log.warning("the file system of %s has no locks: start no second run in it", workdir)
      os.close(file)
      return None
    raise unwritable(workdir, error) or error from None
  _held.add(file)
  os.ftruncate(file, 0)
  holder = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
  os.write(file, json.dumps(holder).encode())
  return file


def _check(path: Path) -> None:
  """Raises a RunError if `path` is not a regular file, because the target of a link would be overwritten."""
  if path.is_symlink() or (path.exists() and not path.is_file()):
    raise RunError(f"{path} is no file but a link, a folder or the like: move it away")


REMEDY = "wait for its end or stop it, or use --config.workdir=... for a new run"


def _holder(path: Path) -> str:
  """The process that holds the lock, as named in the file."""
  try:
    found = read_json(path, dict, largest=1000)
    return f"another run (process {found['pid']} on {found['host']}, since {found['since']})"
  except (FileError, KeyError):
    return "another run"
