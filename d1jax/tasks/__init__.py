"""Tasks: families of problems with a verifiable answer, their prompts and their graders.

`build("sudoku", seed=0)` makes a task by its name, `build_mix({"sudoku": 1, "countdown": 2})` several in one. A new
task is one new file and one line in the table below, or a file of your own (`custom`). This folder imports nothing else
of the package but its errors, and no array library but numpy.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from d1jax.tasks import custom
from d1jax.tasks.base import DataError, Grade, Message, Record, Task, TaskError
from d1jax.tasks.common import PROTOCOLS, SPLITS, STYLES, check_choice, split_hash
from d1jax.tasks.countdown import Countdown
from d1jax.tasks.custom import Custom
from d1jax.tasks.gsm8k import Gsm8k
from d1jax.tasks.hendrycks_math import HendrycksMath
from d1jax.tasks.mixture import Mixture
from d1jax.tasks.sudoku import Sudoku
from d1jax.tasks.word_problems import WordProblems

__all__ = [
  "PROTOCOLS",
  "SPLITS",
  "STYLES",
  "TASKS",
  "Countdown",
  "Custom",
  "DataError",
  "Grade",
  "Gsm8k",
  "HendrycksMath",
  "Message",
  "Mixture",
  "Record",
  "Sudoku",
  "Task",
  "TaskError",
  "WordProblems",
  "build",
  "build_mix",
  "split_hash",
]

TASKS: Mapping[str, type[Sudoku] | type[Countdown] | type[Gsm8k] | type[HendrycksMath]] = {
  "sudoku": Sudoku,
  "countdown": Countdown,
  "gsm8k": Gsm8k,
  "math": HendrycksMath,
  "word_problems": WordProblems,
}
"""The known tasks by name."""


def build(
  name: str,
  *,
  seed: int = 0,
  root: str | None = None,
  sizes: Mapping[str, int] | None = None,
  module: str | None = None,
  **options: Any,
) -> Task:
  """Build a task from the table, or that of a user's file.

  Args:
    name: a key of `TASKS`; ignored with `module`, since that task has its own name.
    seed: seeds whatever the task generates.
    root: the data folder to read, or None to generate (not for gsm8k and math).
    sizes: records per split; splits not named, or None, have the task's default.
    module: the path of a Python file that defines `build(*, seed, root, sizes, **options)`; see `custom`.
    options: the task's other fields, such as `clues` of sudoku.

  Raises:
    ValueError: an unknown name or option (the message lists the known ones), or a bad value.
    TaskError: `module` does not build a task.
  """
  if module is not None:
    return custom.build(module, seed=seed, root=root, sizes=sizes, options=options)
  check_choice("task", name, list(TASKS))
  task = TASKS[name]
  known = [field.name for field in dataclasses.fields(task)]
  for option in options:
    check_choice(f"option of {name}", option, known)
  return task(seed=seed, root=root, sizes=sizes or {}, **options)


def build_mix(
  weights: Mapping[str, float],
  *,
  seed: int = 0,
  root: str | None = None,
  sizes: Mapping[str, int] | None = None,
  options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Mixture:
  """Build several tasks from the table as one.

  Args:
    weights: by name, positive: how often training draws from each.
    seed: the seed of every task.
    root: the data folder of every task.
    sizes: records per split, of every task.
    options: other fields by the name of their task, such as `{"sudoku": {"clues": (8, 10)}}`.

  Raises:
    ValueError: as of `build`, options of a task that is not in the mix, or a weight that is not positive.
  """
  options = options or {}
  for name in options:
    check_choice("task in the options of a mix", name, list(weights))
  tasks = {name: build(name, seed=seed, root=root, sizes=sizes, **options.get(name, {})) for name in weights}
  return Mixture(tasks, weights)
