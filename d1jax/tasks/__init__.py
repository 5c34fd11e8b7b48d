"""Tasks: families of problems with a verifiable answer, their prompts and their graders.

`build("sudoku", seed=0)` makes a task by its name. A new task is one new file and one line in the
table below. This folder imports nothing else of the package, and no array library but numpy.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from d1jax.tasks.base import DataError, Grade, Message, Record, Task
from d1jax.tasks.common import SPLITS, STYLES, check_choice
from d1jax.tasks.countdown import Countdown
from d1jax.tasks.sudoku import Sudoku

__all__ = [
  "SPLITS",
  "STYLES",
  "TASKS",
  "Countdown",
  "DataError",
  "Grade",
  "Message",
  "Record",
  "Sudoku",
  "Task",
  "build",
]

TASKS: Mapping[str, type[Sudoku] | type[Countdown]] = {"sudoku": Sudoku, "countdown": Countdown}
"""The known tasks by name."""


def build(
  name: str,
  *,
  seed: int = 0,
  root: str | None = None,
  sizes: Mapping[str, int] | None = None,
  **options: Any,
) -> Task:
  """Build a task from the table.

  Args:
    name: a key of `TASKS`.
    seed: seeds whatever the task generates.
    root: the data folder to read, or None to generate.
    sizes: records per split; splits not named, or None, have the task's default.
    options: the task's other fields, such as `clues` of sudoku.

  Raises:
    ValueError: an unknown name or option (the message lists the known ones), or a bad value.
  """
  check_choice("task", name, list(TASKS))
  task = TASKS[name]
  known = [field.name for field in dataclasses.fields(task)]
  for option in options:
    check_choice(f"option of {name}", option, known)
  return task(seed=seed, root=root, sizes=sizes or {}, **options)
