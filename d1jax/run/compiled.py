"""Compiled programs on disk: when a run resumes, it loads the programs that the attempt before it compiled.

A compiled program is code. It lies beside the work directories, in a folder that only their user can write, and never
inside of one: a work directory that is given away contains no code, and reading a run loads none (SECURITY.md).
"""

import contextlib
import hashlib
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import jax
from jax._src import compilation_cache
from jax._src.compilation_cache_interface import CacheInterface

from d1jax.run.workdir import Folder

log = logging.getLogger(__name__)

NAME = ".d1jax-compiled"
"""The folder of compiled programs, beside the work directories that use it."""
LEAST_SECONDS = 1.0
"""In a bucket, only programs that take at least this long to compile are kept; on a disk, all are."""


class Programs(CacheInterface):
  """A cache of compiled programs by key, in the form that JAX needs.

  JAX's own cache never replaces a file, so that half a program, left by a kill, would stay for ever. Here each file
  begins with a hash of the rest: a file that is damaged, or not yet complete, counts as absent and is written again.
  """

  def __init__(self, folder: Folder):
    """Stores the folder; nothing is read or written yet."""
    self._path = folder  # JAX needs this name
    self._writes = True

  def get(self, key: str) -> bytes | None:
    """A compiled program; None if it is absent or damaged."""
    try:
      content = (self._path / key).read_bytes()
    except OSError:
      return None
    digest, program = content[:32], content[32:]
    return program if hashlib.sha256(program).digest() == digest else None

  def put(self, key: str, value: bytes) -> None:
    """Stores a compiled program. If that fails, one warning is given and the run continues."""
    if not self._writes:
      return
    try:
      (self._path / key).write_bytes(hashlib.sha256(value).digest() + value)
    except OSError as error:
      self._writes = False
      log.warning("%s takes no compiled program (%s); the run goes on without", self._path, error.strerror or error)


def _folder(workdir: Folder) -> Folder:
  """The folder for the programs of a run; it is made if it is missing.

  Raises:
    OSError: it cannot be made, or other users could write there.
  """
  if not isinstance(workdir, Path):
    return workdir.parent / NAME  # buckets have no folders of their own
  folder = workdir.absolute().parent / NAME
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  found = folder.lstat()
  if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
    raise PermissionError(f"{folder} is a link, belongs to another user, or others may write there")
  return folder


@contextlib.contextmanager
def kept(workdir: Folder) -> Iterator[None]:
  """Within this context, JAX stores compiled programs beside `workdir` and loads them from there.

  If the user has set JAX_COMPILATION_CACHE_DIR, JAX's own cache in that folder is used instead. If neither works, a
  message says so and everything is compiled. All processes read the cache, and only the first one writes.
  """
  settings = dict(jax.config.values)
  if settings["jax_compilation_cache_dir"] or not settings["jax_enable_compilation_cache"]:
    yield
    return
  try:
    folder = _folder(workdir)
  except OSError as error:
    log.warning(
      "compiled programs are not kept for the next attempt (%s): set JAX_COMPILATION_CACHE_DIR to a folder of your own",
      error,
    )
    yield
    return
  least = "jax_persistent_cache_min_compile_time_secs"
  compilation_cache.reset_cache()
  compilation_cache._cache = Programs(folder)
  if least.upper() not in os.environ:
    jax.config.update(least, 0.0 if isinstance(folder, Path) else LEAST_SECONDS)
  try:
    yield
  finally:
    jax.config.update(least, settings[least])
    compilation_cache.reset_cache()
