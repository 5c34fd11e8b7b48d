"""How a failed run ends: one line that names the problem and the remedy, and an exit code."""

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
  """The run cannot continue; the message is one line. `exit_code` 2 means wrong input, which must be fixed first."""

  exit_code = 2


class NotFiniteError(RunError):
  """A loss, a gradient or a weight is not finite; the message says how to go on."""

  exit_code = 70


class OutOfMemoryError(RunError):
  """Device memory ran out."""

  exit_code = 71


class StorageError(RunError):
  """A file could not be written; everything that was saved before is intact."""

  exit_code = 74


class PreemptedError(RunError):
  """The process received SIGTERM; the run is saved."""

  exit_code = PREEMPTED


class InterruptedRunError(RunError):
  """The user pressed Ctrl-C; the run is saved."""

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
"""Parts of JAX's messages about a lost process, in a run of several processes."""

_STORAGE_WORDS = (
  "No space left",
  "File too large",
  "Disk quota",
  "RESOURCE_EXHAUSTED: Error writing",
)
"""Parts of the checkpoint writer's messages about a full disk."""

_UNREACHABLE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
"""Error numbers of paths that no command can use as they are."""

_OUT_OF_MEMORY_WORDS = ("RESOURCE_EXHAUSTED", "Out of memory", "OUT_OF_MEMORY")

_RUNTIME = ("jax", "jaxlib", "orbax", "tensorstore")
_WRITERS = (*_RUNTIME, "etils", "fsspec", "gcsfs")


def line_of(error: BaseException) -> str:
  """The first line of an exception's text, or its type if the text is empty."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def steers(char: str) -> bool:
  """Whether a character would steer a terminal: move the cursor, vanish, or turn the direction of what follows."""
  return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def harmless(text: str) -> str:
  """Text that cannot steer a terminal: each character that could becomes U+FFFD, except line feeds and tabs."""
  return "".join("\ufffd" if char not in "\n\t" and steers(char) else char for char in text)


def _raised_in(error: BaseException, packages: tuple[str, ...]) -> bool:
  """Whether the code that raised an exception belongs to one of some packages.

  Only the place counts, never the text, because a task's grader may raise any text. The place is the innermost frame
  outside of Python's own library (`asyncio` re-raises exceptions of others); if JAX removes frames, it leaves a note.
  """
  if any("JAX has removed its internal frames" in note for note in getattr(error, "__notes__", ())):
    return True
  frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
  rooms = [str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame in frames]
  own = [room for room in rooms if room not in sys.stdlib_module_names or room == "__main__"]
  return bool(own) and own[-1] in packages


def _of_runtime(error: BaseException) -> bool:
  """Whether JAX's runtime raised an exception; the type is JAX's own error or ValueError."""
  jax = sys.modules.get("jax")  # a grader in its own process does not import JAX
  if jax is None:
    return False
  return isinstance(error, jax.errors.JaxRuntimeError) or _raised_in(error, _RUNTIME)


def is_storage_failure(error: BaseException) -> bool:
  """Whether an exception, or a cause of it, says that a file system accepts no more bytes."""
  full = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)
  return any(
    (isinstance(seen, OSError) and seen.errno in full)
    or (any(word in str(seen) for word in _STORAGE_WORDS) and _raised_in(seen, _WRITERS))
    for seen in _chain(error)
  )


def is_lost(error: BaseException | None) -> bool:
  """Whether an exception, or a cause of it, is JAX's report that another process of the run is gone."""
  jax = sys.modules.get("jax")
  several = jax is not None and jax.distributed.is_initialized()
  return any(
    isinstance(seen, LostError) or (several and any(w in str(seen) for w in _LOST_WORDS) and _of_runtime(seen))
    for seen in _chain(error)
  )


def is_out_of_memory(error: BaseException) -> bool:
  """Whether JAX's runtime reports that a device has no memory left."""
  return any(word in str(error) for word in _OUT_OF_MEMORY_WORDS) and _of_runtime(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  """An exception and its causes."""
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


@contextlib.contextmanager
def input_checked() -> Iterator[None]:
  """Turns the ValueErrors of wrong settings and data files into a `RunError`, before anything is computed."""
  try:
    yield
  except ValueError as error:
    if is_lost(error):  # JAX raises these as ValueErrors too
      raise
    raise RunError(" ".join(str(error).split())) from error


@contextlib.contextmanager
def reworded(before: str, after: str = "", kind: type[Exception] = ValueError) -> Iterator[None]:
  """Puts a place or a field before the text of a ValueError, and a remedy behind it; raises it again as `kind`."""
  try:
    yield
  except ValueError as error:
    raise kind(f"{before}{error}{after}") from error


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
  """Turns a failed import into a `RunError` that names the extra of d1jax which installs the package.

  Args:
    name: the extra, one of `project.optional-dependencies` in pyproject.toml.
  """
  try:
    yield
  except ModuleNotFoundError as error:
    raise RunError(missing(error.name or str(error), name)) from error


@contextlib.contextmanager
def environment() -> Iterator[None]:
  """Ends the program in one line if Python lacks a package that each command needs: no environment is active, say."""
  try:
    yield
  except ModuleNotFoundError as error:
    if (error.name or "d1jax").startswith("d1jax"):
      raise
    line = (
      f"d1jax: {error.name} is not installed in {sys.executable}: run make setup, then source .venv/bin/activate"
      " (docs/install.md has other ways)"
    )
    print(line, file=sys.stderr)
    sys.exit(RunError.exit_code)


def missing(package: str, name: str) -> str:
  """The message about a package that is not installed, with the extra that installs it."""
  return (
    f'{package} is not installed: pip install "d1jax[{name}]" brings it; in a clone of the repository,'
    f' pip install ".[{name}]"'
  )


def smaller_batches(field: str, size: int) -> str:
  """The remedy for `explained` when batches do not fit; `field` of the configuration sets their `size`."""
  return f"smaller batches: --config.{field}={size // 2}" if size > 1 else "more devices"


@contextlib.contextmanager
def explained(stage: str, remedy: str) -> Iterator[None]:
  """Turns failures of the machine into a `RunError`; other exceptions pass unchanged.

  Args:
    stage: the name of the running stage.
    remedy: advice for the case that device memory runs out, e.g. `smaller micro-batches:
      --config.grpo.accumulation=4`.
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
  """File and line that raised an exception, outside of Python's own library; a worker process sends only a text."""
  found = re.findall(r'File "(.+)", line (\d+)', str(error.__cause__ or ""))
  found = found or [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
  library = sysconfig.get_paths()["stdlib"]
  own = [f"{name}:{line}" for name, line in found if not name.startswith(library)]
  return own[-1] if own else "an unknown line"
