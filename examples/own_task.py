"""A task of one's own: Sudoku whose reward also pays for kept clues. `python -m examples.own_task` trains on it.

The same file works on the command line: `--config.task.module=examples/own_task.py`.
"""

from collections.abc import Mapping
from typing import Any

import d1jax
from d1jax.tasks import Grade, Sudoku


class KeepsClues(Sudoku):
  """Sudoku with one more component of the reward."""

  name = "keeps_clues"

  def grade(self, text: str, record: Mapping[str, Any], protocol: str = "strict") -> Grade:
    """Adds 0.5 if every clue stands in the answer."""
    grade = super().grade(text, record, protocol)
    digits = grade.answer or ""
    kept = len(digits) == 16 and all(a in ("0", b) for a, b in zip(record["puzzle"], digits, strict=True))
    return Grade({**grade.components, "clues": 0.5 * kept}, grade.metrics, grade.answer)


build = KeepsClues


def main(**changes: Any) -> float:
  """Trains for a minute, and returns the share of held-out puzzles that are solved."""
  overrides = {"task.module": __file__, "workdir": "runs/own_task"} | changes
  return float(d1jax.train("grpo:smoke", overrides)["after"]["solved"])


if __name__ == "__main__":
  main()
