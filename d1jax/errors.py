"""How a run ends when it does not end well: one line that names the thing and the remedy, and an exit code."""

import contextlib
import errno
import re
import sys
import sysconfig
import traceback
import unicodedata
from collections.abc import Iterator

PREEMPTED = 75
"""The run saved itself after SIGTERM: run the same command again (EX_TEMPFAIL)."""


class RunError(Exception):
  """A run that cannot go on; the message is one line. `exit_code` 2: wrong input, fix it first."""

  exit_code = 2


class NotFiniteError(RunError):
  """A loss, a gradient or a weight is not finite; the message says how to go on."""

  exit_code = 70


class OutOfMemoryError(RunError):
  """Device memory ran out."""

  exit_code = 71


class StorageError(RunError):
  """A file could not be written; what was saved before is intact."""

  exit_code = 74


class PreemptedError(RunError):
  """SIGTERM came; the run is saved."""

  exit_code = PREEMPTED


class InterruptedRunError(RunError):
  """Ctrl-C came; the run is saved."""

  exit_code = 130


class LostError(RunError):
  """Another process of the run is gone: run the same command again."""

  exit_code = PREEMPTED


class LeftError(RunError):
  """Code that the run called, such as a task's grader, tried to end the process; the run is not finished."""

  exit_code = 1


_LOST_WORDS = (
  "Gloo",
  "Connection closed by peer",
  "Connection reset by peer",
  "Socket closed",
  "coordination service",
  "CoordinationService",
  "ncclRemoteError",
)
"""What JAX says of a process that is gone, in a run of several."""

_STORAGE_WORDS = (
  "No space left",
  "File too large",
  "Disk quota",
  "RESOURCE_EXHAUSTED: Error writing",
)
"""What the writer of checkpoints says of a disk that takes nothing more."""

_UNREACHABLE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
"""Of a path that no command can use as it is."""

_OUT_OF_MEMORY_WORDS = ("RESOURCE_EXHAUSTED", "Out of memory", "OUT_OF_MEMORY")

_RUNTIME = ("jax", "jaxlib", "orbax", "tensorstore")
_WRITERS = (*_RUNTIME, "etils", "fsspec", "gcsfs")


def line_of(error: BaseException, longest: int = 160) -> str:
  """The first line of an exception's text; its type where it says nothing."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:longest]


def steers(char: str) -> bool:
  """Whether a character would steer a terminal: move the cursor, vanish, or turn the direction of what follows."""
  return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def harmless(text: str) -> str:
  """Text that cannot steer a terminal: what would becomes U+FFFD, but for line feeds and tabs."""
  return "".join("\ufffd" if char not in "\n\t" and steers(char) else char for char in text)


def _raised_in(error: BaseException, packages: tuple[str, ...]) -> bool:
  """Whether the code that raised an exception belongs to some packages.

  Only the place counts, never the text: a task's grader may say any word. The place is the innermost frame that is not
  Python's own library (`asyncio` hands on what others raised); where JAX removes its frames, it leaves a note.
  """
  if any("JAX has removed its internal frames" in note for note in getattr(error, "__notes__", ())):
    return True
  frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
  rooms = [str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame in frames]
  own = [room for room in rooms if room not in sys.stdlib_module_names or room == "__main__"]
  return bool(own) and own[-1] in packages


def _of_runtime(error: BaseException) -> bool:
  """Whether JAX's runtime raised an exception, which it does as an error of its own or as a ValueError."""
  jax = sys.modules.get("jax")  # graders in processes of their own go without
  if jax is None:
    return False
  return isinstance(error, jax.errors.JaxRuntimeError) or _raised_in(error, _RUNTIME)


def is_storage_failure(error: BaseException) -> bool:
  """Whether an exception, or one behind it, says that a file system took no more bytes."""
  full = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)
  return any(
    (isinstance(seen, OSError) and seen.errno in full)
    or (any(word in str(seen) for word in _STORAGE_WORDS) and _raised_in(seen, _WRITERS))
    for seen in _chain(error)
  )


def is_lost(error: BaseException | None) -> bool:
  """Whether an exception, or one behind it, is JAX's word in a run of several processes that another one is gone."""
  jax = sys.modules.get("jax")
  several = jax is not None and jax.distributed.is_initialized()
  return any(
    isinstance(seen, LostError) or (several and any(w in str(seen) for w in _LOST_WORDS) and _of_runtime(seen))
    for seen in _chain(error)
  )


def is_out_of_memory(error: BaseException) -> bool:
  """Whether JAX's runtime says that a device has no memory left."""
  return any(word in str(error) for word in _OUT_OF_MEMORY_WORDS) and _of_runtime(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  """An exception and those behind it."""
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


@contextlib.contextmanager
def input_checked() -> Iterator[None]:
  """Turns the ValueErrors of wrong settings and data files into a `RunError`; for the time before anything is
  computed.
  """
  try:
    yield
  except ValueError as error:
    if is_lost(error):  # JAX raises these as ValueErrors too
      raise
    raise RunError(" ".join(str(error).split())) from error


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
  """Says of a package that cannot be imported which of d1jax's extras brings it, as a `RunError`.

  Args:
    name: the extra that brings what is imported inside, one of `project.optional-dependencies` in pyproject.toml.
  """
  try:
    yield
  except ModuleNotFoundError as error:
    raise RunError(missing(error.name or str(error), name)) from error


def missing(package: str, name: str) -> str:
  """The message about a package that is not installed, and the extra that brings it."""
  return (
    f'{package} is not installed: pip install "d1jax[{name}]" brings it; in a clone of the repository,'
    " pip install -r requirements.txt"
  )


def smaller_batches(field: str, size: int) -> str:
  """The remedy of `explained` where batches of a size that a field of the configuration says do not fit."""
  return f"smaller batches: --config.{field}={size // 2}" if size > 1 else "more devices"


@contextlib.contextmanager
def explained(stage: str, remedy: str) -> Iterator[None]:
  """Turns failures of the machine into a `RunError`; other exceptions pass.

  Args:
    stage: what was running.
    remedy: what to try when device memory runs out, e.g. `smaller micro-batches: --config.grpo.accumulation=4`.
  """
  try:
    yield
  except RunError:
    raise
  except SystemExit as error:
    raise LeftError(
      f"{stage}: code of the run called sys.exit({'' if error.code is None else repr(error.code)}), at {_place(error)};"
      " the run is not finished. Let it raise an error instead"
    ) from error
  except Exception as error:
    if is_lost(error):
      raise LostError(
        f"{stage}: another process of the run is gone ({line_of(error)}); run the same command again, it goes on from"
        " the last checkpoint"
      ) from error
    if is_storage_failure(error):
      raise StorageError(
        f"{stage}: the work directory took no more data ({line_of(error)}); free space and run the same command again,"
        " it goes on from the last checkpoint"
      ) from error
    if isinstance(error, OSError) and error.errno in _UNREACHABLE and error.filename:
      raise RunError(f"{error.filename}: {error.strerror}; change its rights, or name another path") from error
    if is_out_of_memory(error):
      raise OutOfMemoryError(f"{stage}: device memory ran out; try {remedy}") from error
    raise


def _place(error: BaseException) -> str:
  """File and line that raised an exception, Python's own library aside; of a worker process there is a text alone."""
  found = re.findall(r'File "(.+)", line (\d+)', str(error.__cause__ or ""))
  found = found or [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
  library = sysconfig.get_paths()["stdlib"]
  own = [f"{name}:{line}" for name, line in found if not name.startswith(library)]
  return own[-1] if own else "an unknown line"
