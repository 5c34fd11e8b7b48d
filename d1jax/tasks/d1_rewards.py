"""d1's RL rewards to the letter: its `diffu-grpo/reward_func.py` at commit 837888f, quirks included.

A new implementation from the rules. Nothing is executed, every function takes any string, and time is linear in its
length.
"""

import re
from collections.abc import Sequence

from d1jax.tasks import arithmetic, common, latex

_STRICT_FORMAT = re.compile(r"<reasoning>\n.*\n</reasoning>\n<answer>\n.*\n</answer>\n\n?")
_TURN = re.compile(r"</reasoning>\s*<answer>")
_EQUATION = re.compile(r"[\d+\-*/().\s]+")
_BRACE = re.compile(r"[{}]")
_BOXED, _BOXED_BLANK = r"\boxed{", r"\boxed "
# d1 looks for "\boxed" in a literal that is not raw: a backspace and "oxed".
_MISSPELT = "\boxed"
_NEAR = 1e-5


def gsm8k(text: str, gold: str) -> dict[str, float]:
  """Return d1's five GSM8K rewards by name; `gold` is the text after `####`, its commas kept."""
  answer = text.split("<answer>")[-1].split("</answer>")[0].strip()
  return {
    "xmlcount": xmlcount(text),
    "soft_format": 0.5 if _has_soft_format(text) else 0.0,
    "strict_format": 0.5 if _STRICT_FORMAT.fullmatch(text) else 0.0,
    "int": 0.5 if answer.isdigit() else 0.0,
    "correctness": 2.0 if answer == gold else 0.0,
  }


def xmlcount(text: str) -> float:
  """Pay 0.125 for each of four tags with its line breaks; take 0.001 a character behind the last one, in places twice.

  If no line break follows `</answer>`, the first of the two penalties counts the whole text.
  """
  score = 0.0
  if text.count("<reasoning>\n") == 1:
    score += 0.125
  if text.count("\n</reasoning>\n") == 1:
    score += 0.125
  if text.count("\n<answer>\n") == 1:
    score += 0.125
    score -= len(text.split("\n</answer>\n")[-1]) * 0.001
  if text.count("\n</answer>") == 1:
    score += 0.125
    score -= (len(text.split("\n</answer>")[-1]) - 1) * 0.001
  return score


def _has_soft_format(text: str) -> bool:
  r"""Match `<reasoning>.*?</reasoning>\s*<answer>.*?</answer>` at the start, the dots within a line, in linear time."""
  if not text.startswith("<reasoning>"):
    return False
  first_line = text.partition("\n")[0]
  turns = [turn.end() for turn in _TURN.finditer(text) if turn.start() < len(first_line)]
  # The first turn leaves the most of the first line to the closing tag; only the last one can lead to another line.
  return any("</answer>" in text[turn:].partition("\n")[0] for turn in {*turns[:1], *turns[-1:]})


def hendrycks_math(text: str, solution: str) -> dict[str, float]:
  """Return d1's two MATH rewards by name; the gold is what the solution boxes last."""
  gold = unbox(solution)
  answer = unbox(text)
  before, *blocks = text.split("<answer>")
  block = blocks[0].split("</answer>")[0] if blocks else before
  return {
    "correctness": 2.0 if gold is not None and is_equivalent(text if answer is None else answer, gold) else 0.0,
    "format": 0.5 * ((1.0 if blocks else 0.0) + (1.0 if _MISSPELT in block else 0.5)),
  }


def unbox(text: str) -> str | None:
  r"""Return the inside of the last box, the whole text without one, None when it is never closed.

  A `\boxed ` with a blank goes before all others and reaches to the next `$`; an `\fbox` keeps its name.
  """
  if _BOXED_BLANK in text:
    return text.rpartition(_BOXED_BLANK)[2].partition("$")[0]
  start = text.rfind(r"\boxed")
  if start < 0:
    start = text.rfind(r"\fbox")
  if start < 0:
    return _strip_box(text)
  depth = 0
  for brace in _BRACE.finditer(text, start):
    depth += 1 if brace[0] == "{" else -1
    if depth == 0 and brace[0] == "}":
      return _strip_box(text[start : brace.end()])
  return None


def _strip_box(text: str) -> str:
  return text[len(_BOXED) : -1] if text.startswith(_BOXED) and text.endswith("}") else text


def is_equivalent(answer: str, gold: str) -> bool:
  """Tell whether two answers are the same normalised (`latex.normalize`), or else to the letter."""
  try:
    return latex.normalize(answer) == latex.normalize(gold)
  except ValueError:
    return answer == gold


def countdown(text: str, nums: Sequence[int], target: int) -> float:
  """Return d1's Countdown reward: 1.0 for the target, 0.1 for any other answer block, 0.0 without one.

  All numbers must be used once, joined by decimal points if need be; the value is what Python makes of the text
  (`arithmetic.evaluate_as_python`), within 1e-5. Where that is refused as too large, so that d1 might hang: 0.1.
  """
  block = common.last_block(text)
  if block is None:
    return 0.0
  equation = block.strip()
  if len(equation) > arithmetic.MOST_PYTHON_CHARACTERS or not _EQUATION.fullmatch(equation):
    return 0.1
  if sorted(map(int, re.findall(r"\d+", equation))) != sorted(nums):
    return 0.1
  value = arithmetic.evaluate_as_python(equation)
  try:
    return 1.0 if value is not None and abs(value - target) < _NEAR else 0.1
  except OverflowError:
    return 0.1


def sudoku(text: str, puzzle: str, solution: str) -> float:
  """Return d1's Sudoku reward: the share of the empty cells that the last answer block fills as the solution does.

  The digits of the block are padded with 0 or cut to 16; clues may change, another valid grid earns less.
  """
  digits = "".join(filter(str.isdigit, common.last_block(text) or ""))
  filled = digits[: len(puzzle)].ljust(len(puzzle), "0")
  empty = [cell for cell, clue in enumerate(puzzle) if clue == "0"]
  return sum(filled[cell] == solution[cell] for cell in empty) / len(empty) if empty and digits else 0.0
