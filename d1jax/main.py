"""`python -m d1jax.main --config=configs/grpo.py`: reads the configuration and hands over to the mode that it names."""

import contextlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from d1jax import errors
from d1jax.parallel import multihost

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, with preset words behind a colon.")


def _mode(config: ConfigDict) -> Callable[[ConfigDict], Any]:
  """The function that runs a mode; imported late, so that a mistyped flag is answered at once."""
  if config.mode in ("grpo", "sft"):
    from d1jax.training import recipe

    return recipe.run
  if config.mode == "eval":
    from d1jax.evaluation import command

    return command.run
  if config.mode == "export":
    from d1jax import export

    return export.run
  if config.mode == "generate":
    from d1jax.generation import command as generation

    return generation.run
  if config.mode == "aot":
    from d1jax.aot import command as aot

    return aot.run
  raise errors.RunError(f"config.mode is {config.mode!r}; known: grpo, sft, eval, export, generate, aot")


def _meet(config: ConfigDict) -> None:
  """Finds the other processes of the run."""
  if "distributed" in config:
    multihost.initialize(config.workdir if "workdir" in config else config.mode, **config.distributed)
  else:
    multihost.check_alone(config.mode)


def _run(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise errors.RunError(f"unexpected argument {argv[1]!r}; fields are set with --config.FIELD=VALUE")
  if _CONFIG.value is None:
    raise errors.RunError("no configuration; try --config=configs/grpo.py")
  # What fails in a thread that writes surfaces where it is waited for.
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  threading.excepthook = lambda failure: logging.debug("in %s: %s", failure.thread, failure.exc_value)
  logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
  config = _CONFIG.value
  _meet(config)
  multihost.split_cpu(config.cpu_devices)
  with contextlib.ExitStack() as stack, errors.explained(config.mode, "smaller batches"):
    if not multihost.is_main():  # all would say the same
      nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
      stack.enter_context(contextlib.redirect_stdout(nowhere))
      logging.getLogger().setLevel(logging.ERROR)
    _mode(config)(config)
    multihost.barrier("end")


def _parse(argv: list[str]) -> list[str]:
  """Parses the flags; whatever is wrong with them is one line."""
  for path in (arg.partition("=")[2].partition(":")[0] for arg in argv if arg.startswith("--config=")):
    if not Path(path).is_file():
      raise errors.RunError(f"--config={path}: no such file; the configurations are in configs/")
  try:
    return flags.FLAGS(argv)
  except (AttributeError, KeyError) as error:
    reason = " ".join(str(error.args[0]).replace("\\n", " ").replace("\\'", "'").strip("\"'").split())
    raise errors.RunError(f"unknown field '{reason}") from error
  except (flags.Error, TypeError, ValueError) as error:
    # A configuration's own exception arrives with its traceback; the last line says what is wrong.
    reason = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
    raise errors.RunError(f"wrong flag: {reason.removeprefix('ValueError: ')}") from error


def main() -> None:
  """Runs the command line; a failure is one line on standard error and an exit code (see `d1jax.errors`)."""
  try:
    app.run(_run, flags_parser=_parse)
  except errors.RunError as error:
    lost = errors.is_lost(error) and not multihost.alone()
    if lost:
      multihost.say_last(str(error))
    else:
      print(f"d1jax: {error}", file=sys.stderr, flush=True)
    multihost.leave(error.exit_code, together=not lost)
    if isinstance(error, errors.StorageError):
      # Writers would try once more at exit, on a disk that takes nothing, and bury the line above.
      os._exit(error.exit_code)
    sys.exit(error.exit_code)
  except (Exception, KeyboardInterrupt):
    if not multihost.alone():
      traceback.print_exc()
      multihost.leave(1, together=False)
    raise


if __name__ == "__main__":
  main()
