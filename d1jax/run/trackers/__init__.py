"""Sends the metrics of a run to other tools besides `metrics.jsonl`: TensorBoard, Weights & Biases, trackio, your own.

A tracker is one file that defines `build(run) -> Tracker`. The field `trackers` names a file of this folder without
`.py`, or a user's file by its path. Only process 0 has trackers. Readers of a run never load one.
"""

import importlib
import importlib.util
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from d1jax.errors import RunError, line_of
from d1jax.run.workdir import Folder

log = logging.getLogger(__name__)


class Tracker(Protocol):
  """Receives the metrics of one stage."""

  def log(self, step: int, values: Mapping[str, float]) -> None:
    """Receives the metrics of an iteration; `step` counts from 1 and always increases."""

  def close(self) -> None:
    """Closes files and connections, because the stage or this attempt has ended."""


class Run(NamedTuple):
  """The facts about a run that a tracker receives when it is built.

  Attributes:
    workdir: the run's folder.
    name: the run's name.
    identity: a text that is unique to this run, and the same in all its attempts.
    stage: `sft` or `grpo`.
    start: the iterations of the stage that earlier attempts completed; later ones are logged again.
    config: the resolved configuration.
  """

  workdir: Folder
  name: str
  identity: str
  stage: str
  start: int
  config: Mapping[str, Any]


def entries(trackers: str) -> list[str]:
  """The entries of the field `trackers`, a list separated by commas."""
  return [name.strip() for name in trackers.split(",") if name.strip()]


def _load(name: str) -> ModuleType:
  """The module of one entry.

  Raises:
    RunError: the file does not exist or does not define `build`, or a package that it needs is not installed.
  """
  own = name.endswith(".py")
  known = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")
  if own and not Path(name).is_file():
    raise RunError(f"trackers: {name} is no file")
  if not own and name not in known:
    raise RunError(f"trackers: unknown tracker {name!r}; known: {', '.join(known)}, or a file of your own, FILE.py")
  try:
    if not own:
      return importlib.import_module(f"{__name__}.{name}")
    spec = importlib.util.spec_from_file_location(f"d1jax_tracker_{Path(name).stem}", name)
    if spec is None or spec.loader is None:
      raise RunError(f"trackers: {name} is no Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look up their module there
    spec.loader.exec_module(module)
  except RunError:
    raise
  except ModuleNotFoundError as error:
    package = (error.name or name).partition(".")[0]
    raise RunError(f"trackers: {name} needs the package {package}: pip install {package}") from error
  except Exception as error:
    raise RunError(f"trackers: {name} cannot be loaded ({type(error).__name__}: {line_of(error)})") from error
  if not callable(getattr(module, "build", None)):
    raise RunError(f"trackers: {name} defines no function build(run)")
  return module


def check(trackers: str) -> None:
  """Raises a RunError if an entry of the field `trackers` cannot be loaded; call it on process 0."""
  for name in entries(trackers):
    _load(name)


class Trackers:
  """All trackers of a stage as one. If a tracker fails, a warning names it, and the run continues without it."""

  def __init__(self, names: Sequence[str], run: Run):
    """Builds the trackers.

    Raises:
      RunError: a tracker cannot be built, for example because the user is not logged in.
    """
    self._trackers: dict[str, Tracker] = {}
    for name in names:
      try:
        self._trackers[name] = _load(name).build(run)
      except Exception as error:
        self.close()
        if isinstance(error, RunError):
          raise
        raise RunError(f"trackers: {name} cannot begin ({type(error).__name__}: {line_of(error)})") from error

  def log(self, step: int, values: Mapping[str, Any]) -> None:
    """Passes the numbers among `values` to each tracker."""
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
    self._each("log", step, numbers)

  def close(self) -> None:
    """Closes all trackers."""
    self._each("close")
    self._trackers = {}

  def _each(self, method: str, *arguments: Any) -> None:
    for name, tracker in list(self._trackers.items()):
      try:
        getattr(tracker, method)(*arguments)
      except Exception as error:
        del self._trackers[name]
        log.warning("the tracker %s failed and is left out (%s: %s)", name, type(error).__name__, line_of(error))
