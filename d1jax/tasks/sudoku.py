"""4x4 Sudoku: puzzles with exactly one solution, graded by the rules, split by solution grid."""

import dataclasses
import itertools
import operator
import re
from collections.abc import Mapping, Sequence

from d1jax.tasks import common, d1_evaluation, d1_rewards, latex, notation, sudoku_grids, sudoku_puzzles, tables
from d1jax.tasks.base import Grade, Message, Record

MOST_CHARACTERS = 1000
"""Longer answers hold no grid."""

DEFAULT_SIZES = {"demonstrations": 4000, "train": 20000, "validation": 400, "test": 880}

SUDOKU_SYSTEM_PROMPT = """
Please solve the following 4x4 Sudoku puzzle. The puzzle is provided as a 16-character string \
reading left-to-right, top-to-bottom, where '0' represents empty cells.

Rules:
- Fill empty cells with digits 1-4
- Each row must contain digits 1-4 exactly once
- Each column must contain digits 1-4 exactly once
- Each 2x2 box must contain digits 1-4 exactly once

Important: Your solution must be a COMPLETE 16-character string with only the digits 1-4, \
representing your final solved grid.

Respond in this exact format:
<reasoning>
Your step-by-step solving process
</reasoning>
<answer>
[16-character solution string with no spaces or separators]
</answer>
"""
"""d1's instruction, to the letter."""

_CELL_NAMES = "abcdefghijklmnop"
_UNIT_CELLS = (
  *(range(4 * row, 4 * row + 4) for row in range(4)),
  *(range(column, 16, 4) for column in range(4)),
  *((box, box + 1, box + 4, box + 5) for box in (0, 2, 8, 10)),
)
_UNITS = tuple(operator.itemgetter(*cells) for cells in _UNIT_CELLS)
_COMPLETE = frozenset(itertools.permutations("1234"))
_DIGITS = frozenset("0123456789")
_RULES = re.compile(r"^[ |+:]*[-=]{2}[-=+|: ]*$", re.MULTILINE)
_SEPARATORS = re.compile(
  r"[\s|,;&()\[\]{}\"']|\\\\|\\hline(?![a-z])|\\(?:begin|end)\{(?:array|[bpvB]?matrix)\}(?:\{[clr|\s]*\})?"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sudoku:
  """The 4x4 Sudoku task; records are `{"puzzle": 16 digits, 0 = empty, "solution": 16 digits}`.

  Every puzzle has one solution, but for those of a test file. The 88 held-out grids are solutions
  in `test` only, 40 others in `validation` only; the remaining 160 are shared by `demonstrations`
  and `train`, which have no puzzle in common. d1's published test puzzles (`held_out`) are in none
  of these three. Splits depend on nothing but seed, clues and their own size, and a larger size
  keeps the records of a smaller one.

  Attributes:
    seed: the seed of generated puzzles.
    root: a data folder with `sudoku/train.csv`, or None to generate, as does "hub", where there are
      no puzzles. Rows are sorted into the splits by solution; `test` is generated when the file has
      no row with a held-out solution. Where `sudoku/test.csv` exists, such as d1's, it is the split
      `test`, whatever its solutions: a puzzle of it is in no other split, and may have several
      solutions, each of which solves it (`cell_accuracy` knows the one that is stored).
    sizes: records per split, defaults for those not named. A file may have fewer (all are taken)
      but not none.
    clues: the range (first, last) from which the number of clues of a generated puzzle is drawn
      uniformly; then all puzzles with that many are equally likely (in the splits other than
      `train`: all those on the grid whose turn it is, so that grids occur equally often).
  """

  seed: int = 0
  root: str | None = None
  sizes: Mapping[str, int] = dataclasses.field(default_factory=DEFAULT_SIZES.copy, hash=False)
  clues: tuple[int, int] = (6, 10)

  name = "sudoku"
  splits = common.SPLITS

  def __post_init__(self) -> None:
    common.check_integer("sudoku seed", self.seed, 0)
    common.check_root("sudoku", self.root)
    object.__setattr__(self, "sizes", common.check_sizes("sudoku", self.sizes, DEFAULT_SIZES))
    object.__setattr__(self, "clues", common.check_range("sudoku clues", self.clues, 4, 15))

  def records(self, split: str) -> Sequence[Record]:
    """Return the records of one split; an unknown one raises ValueError, too few DataError."""
    common.check_choice("split", split, self.splits)
    count = self.sizes[split]
    codes: Sequence[int] = ()
    root = None if self.root == tables.HUB else self.root
    if root is not None:
      codes = sudoku_puzzles.read(root, split)
    if root is None or (split == "test" and not codes):
      codes = sudoku_puzzles.draw(split, self.seed, count, self.clues)
    else:
      codes = common.take_rows(sudoku_puzzles.FILE, split, codes, count)
    pairs = map(sudoku_grids.decode, codes)
    return tuple({"puzzle": puzzle, "solution": solution} for puzzle, solution in pairs)

  def prompt(self, record: Record, style: str) -> tuple[list[Message], str]:
    """Return one user turn and a prefill, `<reasoning>` in the style `d1_eval` and else none.

    `d1` and `d1_eval` are d1's text to the letter, the same for both. `terse` is the 16 clues and
    then the names of the 16 cells, `1003...abcdefghijklmnop`; the 16 digits of the answer follow.
    So each cell's clue, name and answer stand at fixed distances, and a model with relative
    positions can tell which cell it is looking at.
    """
    common.check_choice("style", style, common.STYLES)
    puzzle = record["puzzle"]
    content = puzzle + _CELL_NAMES
    if style != "terse":
      content = f"{SUDOKU_SYSTEM_PROMPT}\n\nSolve the following Sudoku puzzle: {puzzle}\n"
    return [{"role": "user", "content": content}], common.PREFILL if style == "d1_eval" else ""

  def demonstration(self, record: Record, style: str) -> str:
    """Write the solution: tagged after a line of reasoning, or 16 digits (`terse`); `d1_eval` follows the prefill."""
    return _format(
      "The clues leave one grid in which every row, column and 2x2 box holds 1 to 4 once.",
      record["solution"],
      style,
    )

  def baseline(self, record: Record, style: str) -> str:
    """Write the clues, and the digit 1 in every empty cell."""
    filled = record["puzzle"].replace("0", "1")
    return _format("I keep the clues and write 1 in every empty cell.", filled, style)

  def cluster(self, record: Record) -> str:
    """Name the solution grid."""
    return record["solution"]

  def grade(self, text: str, record: Record, protocol: str = "strict") -> Grade:
    r"""Grade the last answer block, or the whole text, or the last `\boxed{}` in it, by the rules of Sudoku.

    Bars, commas, brackets, rules and the like between the digits are left out, and so are the wrappers of `notation`.

    Components of `strict`: `constraints`, the share of the 12 rows, columns and boxes that hold 1
    to 4 once and change no clue; `solved`, 1.0 when all do. Component of `d1`: `sudoku`, the share
    of empty cells filled as in the solution. Metrics, the same under both: `solved`;
    `cell_accuracy`, empty cells filled as in the solution over empty cells; `well_formed`, 16
    digits 1 to 4. Under `d1` also `d1_accuracy`, cells again (`d1_evaluation.sudoku`).
    """
    common.check_choice("protocol", protocol, common.PROTOCOLS)
    grade = _strict(text, record)
    if protocol == "d1":
      paid = d1_rewards.sudoku(text, record["puzzle"], record["solution"])
      cells = d1_evaluation.sudoku(text, record["puzzle"], record["solution"])
      grade = dataclasses.replace(grade, components={"sudoku": paid}, metrics={**grade.metrics, "d1_accuracy": cells})
    return grade


def _strict(text: str, record: Record) -> Grade:
  answer = _digits(common.final_answer(text))
  puzzle, solution = record["puzzle"], record["solution"]
  empty = puzzle.count("0")
  if len(answer) != 16 or not _DIGITS.issuperset(answer):
    return _grade(0, 0, empty, 0, None)
  right = 0
  cells = []
  for given, wanted, digit in zip(puzzle, solution, answer, strict=True):
    if given == "0":
      right += digit == wanted
      cells.append(digit)
    else:
      cells.append(digit if digit == given else "0")
  satisfied = sum([unit(cells) in _COMPLETE for unit in _UNITS])
  well_formed = not answer.strip("1234")
  return _grade(satisfied, right, empty, int(well_formed), answer)


def _digits(answer: str) -> str:
  """Return the answer without blanks and, if that is not a grid, without the signs around a grid."""
  digits = "".join(answer.split())
  if _DIGITS.issuperset(digits):
    return digits
  box = latex.boxed_or_whole(answer)
  if len(box) > MOST_CHARACTERS:
    return digits
  return _SEPARATORS.sub("", notation.unwrapped(notation.plain(_RULES.sub("", box))))


def _grade(satisfied: int, right: int, empty: int, well_formed: int, answer: str | None) -> Grade:
  solved = int(satisfied == len(_UNITS))
  return Grade(
    {"constraints": satisfied / len(_UNITS), "solved": float(solved)},
    {
      "solved": (solved, 1),
      "cell_accuracy": (right, empty),
      "well_formed": (well_formed, 1),
    },
    answer,
  )


def _format(reasoning: str, answer: str, style: str) -> str:
  common.check_choice("style", style, common.STYLES)
  return answer if style == "terse" else common.tagged(reasoning, answer, style)
