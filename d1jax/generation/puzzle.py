"""A question of a task in place of a prompt: it is written as the model was trained to read it, and the answer graded.

`--config.task=sudoku --config.prompt=0300413012003420`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

from d1jax import tasks
from d1jax.tasks import sudoku_grids
from d1jax.tasks.base import Record, Task


@dataclasses.dataclass(frozen=True)
class Question:
  """A question that a person has typed.

  Attributes:
    task: its task.
    record: what the task grades answers by.
    prompt: the user's message.
    prefill: the start of the answer.
  """

  task: Task
  record: Record
  prompt: str
  prefill: str

  @classmethod
  def of(cls, name: str, record: Record, style: str) -> "Question":
    """A question in the prompt style that a model was trained with."""
    task = tasks.build(name)
    messages, prefill = task.prompt(record, style)
    return cls(task, record, messages[-1]["content"], prefill)

  def verdict(self, answer: str) -> str:
    """Whether an answer is right, and what is wrong with it."""
    grade = self.task.grade(answer, self.record)
    if grade.metrics["solved"][0]:
      return "right"
    if not grade.metrics["well_formed"][0]:
      return f"wrong: it is no answer of the task {self.task.name}"
    if "cell_accuracy" in grade.metrics:
      right, empty = grade.metrics["cell_accuracy"]
      return f"wrong: {right} of the {empty} empty cells are right"
    return "wrong"


def read(name: str, text: str) -> Record:
  """The record of the question that a person has typed.

  Args:
    name: the task, one of `READERS`.
    text: a Sudoku as 16 digits, 0 for an empty cell; numbers and a target of Countdown, `3 25 7 = 68`.

  Raises:
    ValueError: the task or the text cannot be used; the message shows how to write one.
  """
  if name not in READERS:
    raise ValueError(f"task={name!r} is unknown; known: {', '.join(READERS)}; without it, a prompt is sent as it is")
  return READERS[name](text)


def _sudoku(text: str) -> Record:
  puzzle = re.sub(r"[\s|+-]", "", text).replace(".", "0").replace("_", "0")
  if not re.fullmatch(r"[0-4]{16}", puzzle):
    raise ValueError(f"prompt={text!r} is no Sudoku: write 16 digits from 0 to 4, 0 for empty, like 0300413012003420")
  keeps = lambda grid: all(clue in ("0", digit) for clue, digit in zip(puzzle, grid, strict=True))
  solutions = [grid for grid in sudoku_grids.GRIDS if keeps(grid)]
  if len(solutions) != 1:
    raise ValueError(f"prompt={text!r} is a Sudoku with {len(solutions) or 'no'} solutions: give clues that leave one")
  return {"puzzle": puzzle, "solution": solutions[0]}


def _countdown(text: str) -> Record:
  found = re.fullmatch(r"\s*(\d{1,9}(?:[\s,]+\d{1,9})+)\s*=\s*(\d{1,9})\s*", text)
  if found is None:
    raise ValueError(f"prompt={text!r} is no Countdown: write numbers and a target, like '3 25 7 = 68'")
  return {"nums": [int(number) for number in re.findall(r"\d+", found[1])], "target": int(found[2])}


READERS: Mapping[str, Callable[[str], Record]] = {"sudoku": _sudoku, "countdown": _countdown}
"""The tasks whose questions a person can type, and what reads them."""
