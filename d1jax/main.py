"""`python -m d1jax.main --config=configs/grpo.py`: reads the configuration and runs the mode that it names."""

import contextlib
import functools
import importlib
import logging
import os
import runpy
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

from d1jax import errors

with errors.environment():
  from absl import app, flags
  from ml_collections import ConfigDict, config_flags

  from d1jax import commands, presets
  from d1jax.parallel import cluster, multihost
  from d1jax.run import fields

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, with preset words behind a colon.")
_CHECK = flags.DEFINE_boolean("check", False, "Says whether flags, model and data of a training are there; no more.")


_MODES: Mapping[str, tuple[str, str | None]] = {
  **dict.fromkeys(("grpo", "dpo", "sft"), ("d1jax.recipe", "train")),
  "distill": ("d1jax.distill", "train"),
  "eval": ("d1jax.evaluation.command", "eval"),
  "report": ("d1jax.page.command", "train"),
  "export": ("d1jax.export", None),
  "generate": ("d1jax.generation.command", None),
  "serve": ("d1jax.serving.command", "serve"),
  "aot": ("d1jax.aot.command", None),
}
"""Of each mode the module whose `run` runs it, and the extra that installs what it needs."""


def _mode(config: ConfigDict) -> Callable[[ConfigDict], Any]:
  """The function that runs a mode. It is imported late, so that a mistyped flag is answered at once."""
  if config.mode not in _MODES:
    raise errors.RunError(f"config.mode is {config.mode!r}; known: {', '.join(_MODES)}")
  module, extra = _MODES[config.mode]
  if config.mode == "generate" and config.chat:
    module = "d1jax.serving.chat"
  with errors.extra(extra) if extra else contextlib.nullcontext():
    found = importlib.import_module(module)
  if config.mode == "generate" and not config.chat and config.show_steps and found.has_screen():
    from d1jax.serving import chat

    return functools.partial(found.run, live=chat.live)
  return found.run


def _run(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise errors.RunError(f"unexpected argument {argv[1]!r}; fields are set with --config.FIELD=VALUE")
  if _CONFIG.value is None:
    raise errors.RunError("no configuration; try --config=configs/grpo.py")
  config = _CONFIG.value
  with contextlib.ExitStack() as stack:
    stack.enter_context(contextlib.redirect_stderr(cast(TextIO, Output(sys.stderr))))
    if _CHECK.value:
      from d1jax.run import check

      check.run(config)
      return
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
  if "distributed" in config:
    multihost.initialize(config.workdir if "workdir" in config else config.mode, **config.distributed)
  else:
    multihost.check_alone(config.mode)
  multihost.prepare(config.cpu_devices)
  with errors.explained(config.mode, "smaller batches"):
    if not multihost.is_main():  # all processes would print the same
      nowhere = stack.enter_context(_nowhere())
      stack.enter_context(contextlib.redirect_stdout(nowhere))
      logging.getLogger().setLevel(logging.ERROR)
    _mode(config)(config)
    multihost.barrier("end")


def read(argv: list[str], values: flags.FlagValues) -> list[str]:
  """Reads a command line; for `--help` and `--print_config`, it prints and ends the program.

  Args:
    argv: the name of the program, and its arguments; those of the configuration are taken out.
    values: where the configuration goes, as the value of `config`.

  Returns:
    The arguments that are no flags.

  Raises:
    RunError: a flag is wrong; the message is one line, and names the fields that may be meant.
    SystemExit: something was printed.
  """
  given = next((arg.partition("=")[2] for arg in argv if arg.startswith("--config=")), None)
  if {"--help", "-h", "--helpfull", "--helpshort"} & {*argv}:
    print(_help(given), file=cast(TextIO, Output(sys.stdout)))
    sys.exit()
  if given is not None:
    _check_file(given)
  asked, argv[:] = "--print_config" in argv, [arg for arg in argv if arg != "--print_config"]
  optional, argv[:] = fields.take_flags(argv)
  chosen: list[tuple[str, str, str]] = []
  if any("config.grpo." in arg for arg in argv):
    from d1jax.run import parts

    chosen, argv[:] = parts.take_flags(argv)
  empty, argv[:] = fields.take_none(argv)
  try:
    rest = _with_argv(values, argv)
    config = values["config"].value
    if config is not None:
      fields.choose(config, optional)
      fields.complete(config)
    if empty:
      from d1jax.run import limits

      known = [*limits.LOCAL, *(name for name, limit in limits.TABLE.items() if limit.optional)]
      fields.clear(config, empty, known)
    if chosen and config is not None:
      parts.choose(config.grpo, chosen)
  except (AttributeError, KeyError, flags.UnrecognizedFlagError) as error:
    raise errors.RunError(_unknown(given, argv) or f"unknown flag: {errors.line_of(error)}") from error
  except (flags.Error, TypeError, ValueError) as error:
    # An exception of the configuration file arrives with its traceback; the last line has the message.
    reason = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
    raise errors.RunError(f"wrong flag: {reason.removeprefix('ValueError: ')}") from error
  if asked:
    if given is None:
      raise errors.RunError("no configuration to print; try --config=configs/grpo.py --print_config")
    print(_listing(config, given), file=cast(TextIO, Output(sys.stdout)))
    sys.exit()
  return rest


def _help(given: str | None) -> str:
  """The help text for a configuration file that was named, or for the program."""
  name = Path((given or "").partition(":")[0]).stem
  command = next((each for each, one in commands.COMMANDS.items() if one.preset == name), None)
  if command is None:
    return commands.usage()
  return commands.help_of(command, f"{name}:{given.partition(':')[2]}".rstrip(":") if given else name)


def _listing(config: ConfigDict, given: str) -> str:
  """All fields of a configuration, with the comments of its file."""
  from d1jax.run import listing

  source = Path(given.partition(":")[0]).read_text(encoding="utf-8")
  return listing.listing(config, commands.about(config.mode) | listing.comments(source))


def _check_file(given: str) -> None:
  """Raises a RunError unless there is the configuration file, and it takes the words behind the colon."""
  path, _, words = given.partition(":")
  if not Path(path).is_file():
    raise errors.RunError(f"--config={path}: no such file; the configurations are in {presets.shown()}")
  if words and Path(path).resolve().parent == presets.folder().resolve():
    presets.check_words(Path(path).stem, words)


def _with_argv(values: flags.FlagValues, argv: list[str]) -> list[str]:
  """Parses flags. ml_collections takes the fields from `sys.argv`, whatever it is given."""
  before, sys.argv = sys.argv, argv
  try:
    found: list[str] = values(argv)
    return found
  finally:
    sys.argv = before


def _unknown(given: str | None, argv: list[str]) -> str:
  """The message about the first argument that sets no field; empty if there is none."""
  if given is None:
    return ""
  path, colon, words = given.partition(":")
  config = runpy.run_path(path)["get_config"](*([words] if colon else []))
  fields.complete(config)
  names = {field for field, _ in fields.leaves(config)}
  for arg in argv[1:]:
    name = arg.partition("=")[0].lstrip("-")
    own = name.removeprefix("config.")
    if not arg.startswith("-") or name == "config" or (own != name and own in names):
      continue
    if own in names:
      return f"unknown flag --{name}; fields are set with --config.{name}=VALUE"
    if own != name:
      return fields.unknown(config, own)
  return ""


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
    app.run(_run, flags_parser=lambda argv: read(argv, flags.FLAGS))
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
