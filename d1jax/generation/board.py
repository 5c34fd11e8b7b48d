"""A Sudoku in an answer: where its digits stand, which are clues, which are wrong."""

import dataclasses
import re
from collections.abc import Sequence

from d1jax.tasks.base import Record

SIDE, BOX, CELLS = 4, 2, 16
CLUE, RIGHT, WRONG, HIDDEN = "clue", "right", "wrong", "hidden"
"""The kinds of cells."""


@dataclasses.dataclass(frozen=True)
class Board:
  """The grid that an answer fills in.

  Attributes:
    puzzle: 16 digits in reading order; 0 for an empty cell.
    solution: 16 digits.
    digits: those of the answer.
    tokens: for each cell the index of its token among the texts of the canvas.
  """

  puzzle: str
  solution: str
  digits: str
  tokens: tuple[int, ...]

  @property
  def wrong(self) -> int:
    """The number of cells with another digit than the solution's."""
    return sum(a != b for a, b in zip(self.digits, self.solution, strict=True))

  def kind(self, cell: int, *, shown: bool) -> str:
    """What a cell is; `shown` says whether its token is unmasked. A clue that the answer changed is wrong."""
    if shown and self.digits[cell] != self.solution[cell]:
      return WRONG
    if self.puzzle[cell] != "0":
      return CLUE
    return RIGHT if shown else HIDDEN

  def text(self, cell: int, *, shown: bool) -> str:
    """The digit that a cell shows; empty if it is hidden."""
    return self.digits[cell] if shown else self.puzzle[cell].replace("0", "")

  def __str__(self) -> str:
    """The whole grid, with a star behind each wrong digit."""
    cells = [digit + ("*" if digit != right else " ") for digit, right in zip(self.digits, self.solution, strict=True)]
    return "\n".join(rows(cells, 2))


def rows(cells: Sequence[str], width: int = 1) -> list[str]:
  """The lines of a grid; boxes are separated. The texts of cells may have colours, and are `width` wide."""
  bar = "+".join(["-" * (BOX * (width + 1) + 1)] * (SIDE // BOX))
  lines = []
  for first in range(0, CELLS, SIDE):
    boxes = [cells[left : left + BOX] for left in range(first, first + SIDE, BOX)]
    lines += [bar] if first and first % (BOX * SIDE) == 0 else []
    lines.append("|".join(" " + " ".join(box) + " " for box in boxes).rstrip())
  return lines


MOST_TERSE = 32
"""Longer answers are not the digits of a grid alone."""


def begun(texts: Sequence[str], hidden: Sequence[bool], record: Record) -> Board | None:
  """The board of an answer that is not finished, if it is terse: its first 16 tokens are the cells.

  `texts` are those of all tokens, and `hidden` says which of them are masked.
  """
  cells = [*zip(texts, hidden, strict=True)][:CELLS]
  if not CELLS <= len(texts) <= MOST_TERSE or any(not (away or re.fullmatch("[0-9]", text)) for text, away in cells):
    return None
  digits = "".join("0" if away else text for text, away in cells)
  return Board(record["puzzle"], record["solution"], digits, tuple(range(CELLS)))


def of(texts: Sequence[str], record: Record) -> Board | None:
  """The board of an answer to a Sudoku: the last 16 digits in a row; None if the answer has none.

  `texts` are those of the answer's tokens, and `record` is one of the task `sudoku`.
  """
  places = [(char, token) for token, text in enumerate(texts) for char in text]
  found = re.findall(r"(?<!\d)\d{16}(?!\d)", "".join(char for char, _ in places))
  if not found:
    return None
  first = "".join(char for char, _ in places).rindex(found[-1])
  tokens = tuple(token for _, token in places[first : first + CELLS])
  return Board(record["puzzle"], record["solution"], found[-1], tokens)
