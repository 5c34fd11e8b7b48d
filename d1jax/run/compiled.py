"""Compiled programs on disk: an attempt that goes on with a run loads what the attempt before it has compiled.

A compiled program is code. It lies beside the work directories, in a folder of their own user, and never inside of one:
whoever hands a run over hands over no code, and whoever reads a run loads none (SECURITY.md).
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
"""How long a program takes to compile that is worth two visits to a bucket; on a disk all are kept."""


class Programs(CacheInterface):
  """Compiled programs by their keys, as JAX asks for them and hands them over.

  JAX's own folder never replaces a file, so that half a program, which a kill left behind, would be there for ever.
  Here each file begins with a hash of the rest: one that is damaged, or is being written, counts as absent, and is
  written anew.
  """

  def __init__(self, folder: Folder):
    """Nothing is read or written yet."""
    self._path = folder  # as JAX calls it
    self._writes = True

  def get(self, key: str) -> bytes | None:
    """A compiled program; None where it is not there, or damaged."""
    try:
      content = (self._path / key).read_bytes()
    except OSError:
      return None
    digest, program = content[:32], content[32:]
    return program if hashlib.sha256(program).digest() == digest else None

  def put(self, key: str, value: bytes) -> None:
    """Keeps a compiled program; where the disk takes none, that is said once and the run goes on."""
    if not self._writes:
      return
    try:
      (self._path / key).write_bytes(hashlib.sha256(value).digest() + value)
    except OSError as error:
      self._writes = False
      log.warning("%s takes no compiled program (%s); the run goes on without", self._path, error.strerror or error)


def _folder(workdir: Folder) -> Folder:
  """The folder for the programs of a run, made where it is missing.

  Raises:
    OSError: it cannot be made, or others than this user could write there.
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
  """Within it JAX keeps what it compiles beside `workdir`, and loads from there what it finds.

  Where the user has named a folder for JAX (JAX_COMPILATION_CACHE_DIR), that one is used as JAX does it; where neither
  is possible, that is said and everything is compiled. Of several processes all read, and the first writes.
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
