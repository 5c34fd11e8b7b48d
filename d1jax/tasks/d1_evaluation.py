r"""How d1's evaluation reads and judges answers: its `eval/parse_and_get_acc.py` at commit 837888f, quirks included.

Written anew from the rules, and equal to the original wherever that returns, with one exception (`countdown`). Where
it hangs, or ends with an exception, an answer is wrong. Nothing is executed, every function takes any string, and time
is linear in its length.

Texts are what d1's files hold under `generations`: with special tokens such as `<|eot_id|>` and what stands behind
them, without the `<reasoning>` that d1 puts before every completion.
"""

import decimal
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from d1jax.tasks import common, d1_rewards, questions, rationals
from d1jax.tasks.base import DataError, Record

_OPEN, _CLOSE = "<answer>", "</answer>"
_BOX = re.compile(r"\\boxed\{(.*?)\}")
_NUMBER = re.compile(r"-?\d+\.?\d*")
_GOLD = re.compile(r"\s*\$?([\d,]+(?:\.\d+)?)")
_SIGNS = ((r"\div", "/"), (r"\times", "*"), (r"\cdot", "*"))
_LEFT_SIDE = "0123456789+-*/() "
_EQUALS = re.compile(r"(?<=[0-9+\-*/() ])=[0-9. ]")
_REPEATED_BLANK = re.compile(r"(\s)\1+")
_FENCE = re.compile(r"```([\d\s]+)```")
_END = re.compile(r"<\|eot_id\|>|<\|endoftext\|>")
_END_OR_CLOSE = re.compile(rf"{_END.pattern}|{_CLOSE}")
_GRIDS = (re.compile(rf"(\d{{16}})\s*{_CLOSE}"), re.compile(r"\b(\d{16})\b"))
_PUZZLE = re.compile(r"(?:\A|Sudoku puzzle: )([0-4]{16})")
_SOLUTION = re.compile(r"[1-4]{16}")


def _first_block(text: str) -> str | None:
  """Return the inside of the first answer block, its ends stripped; of nested opening tags the outermost counts."""
  _, tag, rest = text.partition(_OPEN)
  block, close, _ = rest.partition(_CLOSE)
  return block.strip() if tag and close else None


def read_gsm8k(text: str) -> float | None:
  r"""Return the number of the first box in which there is one, else of the first answer block, else None.

  A box is `\boxed{`, its content ends at the next `}` of the same line. The number is what Python's `float` makes of
  the content (also of `1_000`, `nan` or Arabic digits), else the first number in a box, the last in a block; commas
  end a number.
  """
  for line in text.split("\n"):
    # Behind the line's last brace there is no box; without the cut, time would be quadratic.
    for box in _BOX.findall(line[: line.rfind("}") + 1]):
      number = _number(box.strip(), 0)
      if number is not None:
        return number
  block = _first_block(text)
  return None if block is None else _number(block, -1)


def _number(text: str, place: int) -> float | None:
  try:
    return float(text)
  except ValueError:
    numbers = _NUMBER.findall(text)
    return float(numbers[place]) if numbers else None


def gsm8k(text: str, gold: float | None) -> bool:
  """Tell whether `read_gsm8k` gives exactly the gold number; without one every answer is wrong."""
  return gold is not None and read_gsm8k(text) == gold


def gsm8k_gold(answer: str | None) -> float | None:
  """Return the gold number that d1 reads behind `####`; None for a negative one (it knows no minus sign) and for None.

  What follows the number, such as a unit or a denominator, is not seen.
  """
  match = _GOLD.match(answer or "")
  digits = match[1].replace(",", "") if match else ""
  return float(digits) if digits else None


def read_math(text: str) -> str | None:
  """Return the last box (`d1_rewards.unbox`), the whole text without one.

  Where that is empty or never closed: the first answer block, or, without that, "" and None.
  """
  answer = d1_rewards.unbox(text)
  block = None if answer else _first_block(text)
  return answer if block is None else block


def hendrycks_math(text: str, gold: str | None) -> bool:
  """Tell whether `read_math` gives the gold answer, both normalised (`latex.normalize`) or else to the letter.

  Without a gold answer every answer is wrong.
  """
  answer = read_math(text)
  return answer is not None and gold is not None and d1_rewards.is_equivalent(answer, gold)


def read_countdown(text: str) -> str:
  r"""Return the last box (`d1_rewards.unbox`), or the whole text without one; for an open box, the first answer block.

  `\div`, `\times` and `\cdot` become signs; of the first equation in it only the left side is kept.
  """
  expression = d1_rewards.unbox(text)
  if expression is None:
    block = _first_block(text)
    expression = text if block is None else block
  for old, new in _SIGNS:
    expression = expression.replace(old, new)
  equals = _EQUALS.search(expression)
  if equals is None:
    return expression
  left = expression[: equals.start()]
  return left[len(left.rstrip(_LEFT_SIDE)) :].strip()


def countdown(text: str, nums: Sequence[int], target: int) -> bool:
  """Tell whether `read_countdown` gives an expression that d1's reward takes for right (`d1_rewards.countdown`).

  The exception: an expression of more than 1000 characters, repeated blanks aside, or with integers beyond 131,072
  bits is wrong, though d1 may compute it.
  """
  expression = _REPEATED_BLANK.sub(r"\1", read_countdown(text))
  block = f"{_OPEN}{expression}{_CLOSE}"
  return "<" not in expression and d1_rewards.countdown(block, nums, target) == 1.0


def read_sudoku(text: str) -> str:
  """Return the first text of these that is not blank, its blanks taken out; any characters, any length.

  In the first answer block, or behind its tag if it is never closed: the first code fence that holds digits and blanks
  alone. What stands between that tag and the first of `<|eot_id|>`, `<|endoftext|>`, `</answer>`. What stands between
  the first `</answer>` and the next of those two tokens, or the end. 16 digits before `</answer>`. 16 digits that are a
  word.
  """
  return next(filter(None, ("".join(candidate.split()) for candidate in _sudoku_candidates(text))), "")


def _sudoku_candidates(text: str) -> Iterator[str]:
  _, tag, rest = text.partition(_OPEN)
  if tag:
    fence = _FENCE.search(rest)
    if fence:
      yield fence[1]
    end = _END_OR_CLOSE.search(rest)
    if end:
      yield rest[: end.start()]
  yield _END.split(text.partition(_CLOSE)[2], maxsplit=1)[0]
  for pattern in _GRIDS:
    grid = pattern.search(text)
    if grid:
      yield grid[1]


def sudoku(text: str, puzzle: str, solution: str) -> tuple[int, int]:
  """Count the empty cells that `read_sudoku` fills as the solution does, and the empty cells.

  A short answer leaves the last cells empty, a long one is cut; clues may change. d1's accuracy is the sum of the
  first counts over the sum of the second.

  Args:
    text: the completion.
    puzzle: 16 digits, 0 for an empty cell.
    solution: 16 digits 1 to 4.
  """
  filled = read_sudoku(text).ljust(16, "0")
  empty = [cell for cell, clue in enumerate(puzzle) if clue == "0"]
  return sum(filled[cell] == solution[cell] for cell in empty), len(empty)


def record(name: str, row: Mapping[str, Any]) -> Record:
  """Turn a row of d1's JSON files into the record of a task.

  The record is what the file tells: GSM8K's has no solution, and no answer where d1 has none; MATH's solution is the
  boxed answer; Countdown's has no expression.

  Args:
    name: `gsm8k`, `math`, `countdown` or `sudoku`.
    row: has `question`, `generations` (the completion) and `ground_truth`: a number or None, an answer,
      `[[30, 100, 93], 23]`, 16 digits.

  Raises:
    DataError: a field is missing or not what it should be; the message names it.
    ValueError: d1 has no such task.
  """
  common.check_choice("task of d1", name, list(_RECORDS))
  for field in ("question", "generations", "ground_truth"):
    if field not in row:
      raise DataError(f"the field {field} is missing; expected question, generations and ground_truth, as d1 writes")
  questions.check_texts("d1's row", row, ("question",))
  if not isinstance(row["generations"], str):
    raise DataError(f"generations is {row['generations']!r:.40}, expected the completion as a text")
  return _RECORDS[name](row["question"], row["ground_truth"])


def _gsm8k_record(question: str, gold: Any) -> Record:
  answer = gold
  if type(gold) in (int, float):
    answer = f"{decimal.Decimal(repr(gold)):f}".removesuffix(".0")
  if answer is not None and (answer is gold or rationals.parse(answer) is None):
    raise DataError(f"ground_truth is {gold!r:.40}, expected a number such as 18.0, or null where there is none")
  return {"question": question, "solution": "", "answer": answer}


def _math_record(question: str, gold: Any) -> Record:
  if not isinstance(gold, str) or not gold.strip():
    raise DataError(f"ground_truth is {gold!r:.40}, expected the answer as a text")
  return {"problem": question, "solution": f"\\boxed{{{gold}}}", "answer": gold}


def _countdown_record(question: str, gold: Any) -> Record:
  match gold:
    case [[*nums], target] if nums and all(type(number) is int for number in (*nums, target)):
      return {"nums": nums, "target": target}
  raise DataError(f"ground_truth is {gold!r:.40}, expected numbers and target, such as [[30, 100, 93], 23]")


def _sudoku_record(question: str, gold: Any) -> Record:
  puzzle = _PUZZLE.search(question)
  if puzzle is None:
    raise DataError(f"question is {question!r:.60}, expected 16 digits 0 to 4 in front or behind 'Sudoku puzzle: '")
  if not isinstance(gold, str) or not _SOLUTION.fullmatch(gold):
    raise DataError(f"ground_truth is {gold!r:.40}, expected 16 digits 1 to 4")
  return {"puzzle": puzzle[1], "solution": gold}


_RECORDS: Mapping[str, Callable[[str, Any], Record]] = {
  "gsm8k": _gsm8k_record,
  "math": _math_record,
  "countdown": _countdown_record,
  "sudoku": _sudoku_record,
}
