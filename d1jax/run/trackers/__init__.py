"""Where the figures of a run go beside `metrics.jsonl`: TensorBoard, Weights & Biases, trackio, a file of your own.

A tracker is one file that defines `build(run) -> Tracker`: a file of this folder, which `trackers` names without `.py`,
or a file of the user, which it names by its path. Process 0 alone has trackers. Readers of a run never load one.
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
  """Takes the figures of one stage."""

  def log(self, step: int, values: Mapping[str, float]) -> None:
    """Takes the figures of an iteration; `step` counts from 1, and is larger each time."""

  def close(self) -> None:
    """Lets go of files and connections; the stage has ended, or this attempt has."""


class Run(NamedTuple):
  """What a tracker is told when it is built.

  Attributes:
    workdir: the run's folder.
    name: of the run.
    identity: a text that no other run has, and every attempt of this run.
    stage: `sft` or `grpo`.
    start: iterations of the stage that were done before this attempt; what comes after them is logged again.
    config: the resolved configuration.
  """

  workdir: Folder
  name: str
  identity: str
  stage: str
  start: int
  config: Mapping[str, Any]


def named(trackers: str) -> list[str]:
  """The entries of the field `trackers`, which commas separate."""
  return [name.strip() for name in trackers.split(",") if name.strip()]


def _load(name: str) -> ModuleType:
  """The module of one entry.

  Raises:
    RunError: there is no such file, it does not define `build`, or a package that it needs is not installed.
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
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
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
  """Raises a RunError where an entry of the field `trackers` cannot be loaded; to be called on process 0."""
  for name in named(trackers):
    _load(name)


class Trackers:
  """All trackers of a stage as one. One that fails is named in a warning and left out; the run goes on."""

  def __init__(self, names: Sequence[str], run: Run):
    """Builds them.

    Raises:
      RunError: one cannot be built, for example since nobody is logged in.
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
    """Hands the numbers among `values` to each."""
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
    self._each("log", step, numbers)

  def close(self) -> None:
    """Closes each."""
    self._each("close")
    self._trackers = {}

  def _each(self, method: str, *arguments: Any) -> None:
    for name, tracker in list(self._trackers.items()):
      try:
        getattr(tracker, method)(*arguments)
      except Exception as error:
        del self._trackers[name]
        log.warning("the tracker %s failed and is left out (%s: %s)", name, type(error).__name__, line_of(error))
