"""How a run ends when it does not end well: one line that names the thing and the remedy, and an exit code."""

import contextlib
import errno
from collections.abc import Iterator

PREEMPTED = 75
"""The run saved itself after SIGTERM: run the same command again (EX_TEMPFAIL)."""


class RunError(Exception):
  """A run that cannot go on; the message is one line. `exit_code` 2: wrong input, fix it first."""

  exit_code = 2


class NotFiniteError(RunError):
  """A loss or gradient is not finite. Never retry: the same command would end the same way."""

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


_LOST_WORDS = (
  "Gloo",
  "Connection closed by peer",
  "Connection reset by peer",
  "Socket closed",
  "coordination service",
  "CoordinationService",
  "ncclRemoteError",
)

_STORAGE_WORDS = (
  "No space left",
  "File too large",
  "Disk quota",
  "RESOURCE_EXHAUSTED: Error writing",
)


def is_storage_failure(error: BaseException) -> bool:
  """Whether an exception, or one behind it, says that a file system took no more bytes."""
  full = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)
  return any(
    (isinstance(seen, OSError) and seen.errno in full) or any(word in str(seen) for word in _STORAGE_WORDS)
    for seen in _chain(error)
  )


def is_lost(error: BaseException | None) -> bool:
  """Whether an exception, or one behind it, says that another process of the run is gone."""
  return any(isinstance(e, LostError) or any(word in str(e) for word in _LOST_WORDS) for e in _chain(error))


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
  except Exception as error:
    if is_lost(error):
      reason = str(error).strip().splitlines()[0][:120]
      raise LostError(
        f"{stage}: another process of the run is gone ({reason}); run the same command again, it goes on from the last"
        " checkpoint"
      ) from error
    if is_storage_failure(error):
      reason = str(error).strip().splitlines()[0][:200]
      raise StorageError(
        f"{stage}: the work directory took no more data ({reason}); free space and run the same command again,"
        " it goes on from the last checkpoint"
      ) from error
    if "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error):
      raise OutOfMemoryError(f"{stage}: device memory ran out; try {remedy}") from error
    raise
