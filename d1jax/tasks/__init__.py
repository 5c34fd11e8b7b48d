"""Tasks: families of problems with a verifiable answer, their prompts and their graders.

`build("sudoku", seed=0)` makes a task by its name. A new task is one new file and one line in the
table below. This folder imports nothing else of the package, and no array library but numpy.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from d1jax.tasks.base import DataError, Grade, Message, Record, Task
from d1jax.tasks.common import PROTOCOLS, SPLITS, STYLES, check_choice
from d1jax.tasks.countdown import Countdown
from d1jax.tasks.gsm8k import Gsm8k
from d1jax.tasks.hendrycks_math import HendrycksMath
from d1jax.tasks.sudoku import Sudoku

__all__ = [
  "PROTOCOLS",
  "SPLITS",
  "STYLES",
  "TASKS",
  "Countdown",
  "DataError",
  "Grade",
  "Gsm8k",
  "HendrycksMath",
  "Message",
  "Record",
  "Sudoku",
  "Task",
  "build",
]

TASKS: Mapping[str, type[Sudoku] | type[Countdown] | type[Gsm8k] | type[HendrycksMath]] = {
  "sudoku": Sudoku,
  "countdown": Countdown,
  "gsm8k": Gsm8k,
  "math": HendrycksMath,
}
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
    root: the data folder to read, or None to generate (sudoku and countdown only).
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
