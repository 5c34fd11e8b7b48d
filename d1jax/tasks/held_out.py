"""Test questions that no other split may hold, even if there is no test file.

They are the questions to which d1 published answers: a list that is part of the package, written by
`python -m tests.tasks.make_held_out`.
"""

import functools
import hashlib
from pathlib import Path

FILE = Path(__file__).with_name("held_out.txt")
"""One question a line: the task and `fingerprint(normalize(question))`, for Countdown the fingerprint of the numbers in
ascending order with a blank between them, for Sudoku the puzzle itself."""


def normalize(question: str) -> str:
  """Return a question without regard to case and blanks; questions that are then equal are one question."""
  return " ".join(question.split()).casefold()


def fingerprint(key: str) -> str:
  """Return 16 hexadecimal digits, the first 8 bytes of the sha256."""
  return hashlib.sha256(key.encode()).hexdigest()[:16]


@functools.cache
def listed(task: str) -> frozenset[str]:
  """Return what the list holds of a task; nothing of a task that it does not know."""
  pairs = (line.split() for line in FILE.read_text(encoding="ascii").splitlines())
  return frozenset(entry for name, entry in pairs if name == task)


def is_listed(question: str) -> bool:
  """Tell whether a question in words, of whatever source, is one of the list."""
  return fingerprint(normalize(question)) in listed("gsm8k") | listed("math")
