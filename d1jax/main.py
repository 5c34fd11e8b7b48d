"""`python -m d1jax.main --config=configs/grpo.py`: reads the configuration and runs the mode that it names."""

import contextlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from d1jax import errors, presets
from d1jax.parallel import cluster, multihost
from d1jax.run import fields

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, with preset words behind a colon.")


def _mode(config: ConfigDict) -> Callable[[ConfigDict], Any]:
  """The function that runs a mode. It is imported late, so that a mistyped flag is answered at once."""
  if config.mode in ("grpo", "sft"):
    with errors.extra("train"):
      from d1jax import recipe

    return recipe.run
  if config.mode == "eval":
    with errors.extra("eval"):
      from d1jax.evaluation import command

    return command.run
  if config.mode == "report":
    with errors.extra("train"):
      from d1jax.page import command as page

    return page.run
  if config.mode == "export":
    from d1jax import export

    return export.run
  if config.mode == "generate" and config.chat:
    from d1jax.serving import chat

    return chat.run
  if config.mode == "generate":
    from d1jax.generation import command as generation

    return generation.run
  if config.mode == "aot":
    from d1jax.aot import command as aot

    return aot.run
  if config.mode == "serve":
    with errors.extra("serve"):
      from d1jax.serving import command as serving

    return serving.run
  raise errors.RunError(f"config.mode is {config.mode!r}; known: grpo, sft, eval, report, export, generate, serve, aot")


def _meet(config: ConfigDict) -> None:
  """Connects to the other processes of the run."""
  if "distributed" in config:
    multihost.initialize(config.workdir if "workdir" in config else config.mode, **config.distributed)
  else:
    multihost.check_alone(config.mode)


def _run(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise errors.RunError(f"unexpected argument {argv[1]!r}; fields are set with --config.FIELD=VALUE")
  if _CONFIG.value is None:
    raise errors.RunError("no configuration; try --config=configs/grpo.py")
  config = _CONFIG.value
  with contextlib.ExitStack() as stack:
    stack.enter_context(contextlib.redirect_stderr(cast(TextIO, Output(sys.stderr))))
    if config.mode != "generate":  # the text of `generate` is its result, so it ends when nobody reads it
      stack.enter_context(contextlib.redirect_stdout(cast(TextIO, Output(sys.stdout, errors.harmless))))
    _start(config, stack)


def _start(config: ConfigDict, stack: contextlib.ExitStack) -> None:
  # A failure in a writing thread is raised where that thread is waited for.
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  threading.excepthook = lambda failure: logging.debug("in %s: %s", failure.thread, failure.exc_value)
  logging.basicConfig(level=logging.WARNING, force=True)
  logging.getLogger().handlers[0].setFormatter(Formatter("%(levelname)s: %(message)s"))
  cluster.check_xla_flags(os.environ)
  _meet(config)
  multihost.prepare(config.cpu_devices)
  with errors.explained(config.mode, "smaller batches"):
    if not multihost.is_main():  # all processes would print the same
      nowhere = stack.enter_context(_nowhere())
      stack.enter_context(contextlib.redirect_stdout(nowhere))
      logging.getLogger().setLevel(logging.ERROR)
    _mode(config)(config)
    multihost.barrier("end")


def _parse(argv: list[str]) -> list[str]:
  """Parses the flags; an error in them is one line."""
  for path in (arg.partition("=")[2].partition(":")[0] for arg in argv if arg.startswith("--config=")):
    if not Path(path).is_file():
      raise errors.RunError(f"--config={path}: no such file; the configurations are in {presets.shown()}")
  optional, argv[:] = fields.take_flags(argv)
  chosen: list[tuple[str, str, str]] = []
  if any("config.grpo." in arg for arg in argv):
    from d1jax.run import parts

    chosen, argv[:] = parts.take_flags(argv)
  try:
    rest = flags.FLAGS(argv)
    if _CONFIG.value is not None:
      fields.choose(_CONFIG.value, optional)
      fields.complete(_CONFIG.value)
    if chosen:
      parts.choose(_CONFIG.value.grpo, chosen)
    return rest
  except (AttributeError, KeyError) as error:
    reason = " ".join(str(error.args[0]).replace("\\n", " ").replace("\\'", "'").strip("\"'").split())
    raise errors.RunError(f"unknown field '{reason}") from error
  except (flags.Error, TypeError, ValueError) as error:
    # An exception of the configuration file arrives with its traceback; the last line has the message.
    reason = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
    raise errors.RunError(f"wrong flag: {reason.removeprefix('ValueError: ')}") from error


class Formatter(logging.Formatter):
  """Log lines that cannot steer a terminal: they may contain file names that others chose."""

  def format(self, record: logging.LogRecord) -> str:
    """Formats one record."""
    return errors.harmless(super().format(record))


def _nowhere() -> TextIO:
  return os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")


class Output:
  """A standard stream whose reader may be gone: output that cannot be written is dropped, and the run continues.

  For example, `... | head -1` ends after a line, a terminal is closed, or a task's code closes the stream. A run must
  not be lost for this, since its numbers are in its work directory.
  """

  def __init__(self, stream: TextIO | None, shown: Callable[[str], str] = str):
    """Writes to a stream; `shown` converts each text before it is written, such as `errors.harmless`."""
    self._stream = stream or _nowhere()  # a program may be started without this stream
    self._shown = shown

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    """Writes if there is a reader; characters that the stream's encoding lacks become escapes."""
    with self._lasting():
      encoding = self._stream.encoding or "utf-8"
      self._stream.write(self._shown(text).encode(encoding, "backslashreplace").decode(encoding))
    return len(text)

  def flush(self) -> None:
    """Flushes if there is a reader."""
    with self._lasting():
      self._stream.flush()

  def close(self) -> None:
    """Does nothing: the stream stays open, because others write to it too."""

  @contextlib.contextmanager
  def _lasting(self) -> Iterator[None]:
    try:
      yield
    except (OSError, ValueError):
      nowhere = _nowhere()
      with contextlib.suppress(OSError, ValueError):
        # The rest of its buffer would fail again when Python ends.
        os.dup2(nowhere.fileno(), self._stream.fileno())
      self._stream = nowhere


def _say(message: str) -> None:
  """Writes the last line of standard error, which may contain names that others chose."""
  with contextlib.suppress(OSError, ValueError):
    print(errors.harmless(message), file=sys.stderr, flush=True)


def main() -> None:
  """Runs the command line; a failure is one line on standard error and an exit code (see `d1jax.errors`)."""
  try:
    app.run(_run, flags_parser=_parse)
  except errors.RunError as error:
    code, message = error.exit_code, str(error)
    lost = errors.is_lost(error) and not multihost.alone()
    if lost:
      code, message = multihost.failure_of_another() or (code, message)
      multihost.say_last(message)
    else:
      _say(f"d1jax: {message}")
    multihost.leave(code, message, together=not lost)
    if isinstance(error, errors.StorageError):
      # At exit, writers would try again on the full disk, and their errors would hide the line above.
      os._exit(code)
    sys.exit(code)
  except KeyboardInterrupt:
    message = "stopped at once by Ctrl-C; what was saved before is intact"
    _say(f"d1jax: {message}")
    multihost.leave(errors.InterruptedRunError.exit_code, message)
    sys.exit(errors.InterruptedRunError.exit_code)
  except Exception as error:
    _say(traceback.format_exc())
    multihost.leave(1, f"{type(error).__name__}: {errors.line_of(error)}")
    sys.exit(1)


if __name__ == "__main__":
  main()
