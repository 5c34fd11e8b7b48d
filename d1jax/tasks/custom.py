"""Tasks of a user's own: one small file that defines `build(*, seed, root, sizes, **options) -> Task`.

A frozen dataclass with those fields is enough (`build = MyTask`); `tests/tasks/parity_task.py` is a worked example. The
file is run as ordinary Python with the rights of the run: point only at files that you trust.
"""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from d1jax.tasks.base import DataError, Task

_PREFIX = "d1jax_custom_task_"

_MEMBERS = sorted({*Task.__annotations__, *(name for name in vars(Task) if not name.startswith("_"))})


def build(
  path: str,
  *,
  seed: int = 0,
  root: str | None = None,
  sizes: Mapping[str, int] | None = None,
  options: Mapping[str, Any] | None = None,
) -> Task:
  """Build the task of a user's file.

  Args:
    path: the file, from the working directory.
    seed: handed on.
    root: handed on.
    sizes: handed on.
    options: handed on, as keywords.

  Raises:
    DataError: the file cannot be found or run, or does not build a `Task`; the message names it and says why.
  """
  module = load(path)
  maker = getattr(module, "build", None)
  if not callable(maker):
    raise DataError(f"{path}: defines no build(*, seed, root, sizes); add it, such as `build = MyTask`")
  try:
    task = maker(seed=seed, root=root, sizes=dict(sizes or {}), **(options or {}))
  except Exception as error:
    raise DataError(f"{_place(path, error)}: build(seed, root, sizes, options) failed: {_said(error)}") from error
  if not isinstance(task, Task):
    missing = ", ".join(name for name in _MEMBERS if not hasattr(task, name))
    raise DataError(f"{path}: build() made a {type(task).__name__} without {missing}; a task has {', '.join(_MEMBERS)}")
  return task


def load(path: str) -> ModuleType:
  """Import a user's file once, under a name that follows from its path, so that what it defines can be pickled.

  Raises:
    DataError: it cannot be found, or running it fails.
  """
  file = Path(path).resolve()
  name = f"{_PREFIX}{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
  if name in sys.modules:
    return sys.modules[name]
  spec = importlib.util.spec_from_file_location(name, file)
  if not file.is_file() or spec is None or spec.loader is None:
    raise DataError(f"{path}: no such Python file under {Path.cwd()}; name the .py file that defines build")
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    del sys.modules[name]
    raise DataError(f"{_place(path, error)}: {_said(error)}; run it with Python alone to see more") from error
  return module


def used(pickled: bytes) -> list[str]:
  """The paths of the files that a pickled object names, which another process must `load` before it unpickles it."""
  return [
    str(module.__file__)
    for name, module in sys.modules.items()
    if name.startswith(_PREFIX) and name.encode() in pickled
  ]


def _place(path: str, error: Exception) -> str:
  """The file, and its line that failed, where it is known."""
  lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(Path(path).resolve())]
  line = error.lineno if isinstance(error, SyntaxError) and not lines else next(reversed(lines), None)
  return path if line is None else f"{path} line {line}"


def _said(error: Exception) -> str:
  text = error.msg if isinstance(error, SyntaxError) else str(error)
  return " ".join(f"{type(error).__name__}: {text}".split())
