"""A process that compares expressions with `math-verify`, and is replaced when it hangs or dies.

The process is a Python interpreter that imports nothing of this package (`verifier_process`). It starts with the first
question, in whatever process that is asked; neither `math-verify` nor sympy is imported there.
"""

import json
from pathlib import Path

from d1jax.helper import EndedError, Helper

PROGRAM = Path(__file__).with_name("verifier_process.py")
"""What the process runs."""

MOST_QUESTIONS = 10_000
"""After this many questions a new process starts, so that the caches of sympy do not grow for days."""


class Verifier:
  """Asks one question at a time, from any thread; a process that was forked off starts its own."""

  def __init__(self, program: Path = PROGRAM):
    """Keeps what to run; nothing starts yet.

    `program` is a Python file that answers as `verifier_process` does.
    """
    self._helper = Helper(program)
    self._told, self._asked = 0, 0

  def ask(self, gold: str, answer: str) -> bool:
    """Tell whether two expressions are equal; if the process dies or hangs, the answer is no.

    Raises:
      RuntimeError: the process cannot start.
    """
    with self._helper.lock:
      if self._asked >= MOST_QUESTIONS:
        self._helper.close()
      try:
        started = self._helper.start()
      except EndedError as error:
        raise RuntimeError(
          f'math-verify {error}; `pip install "d1jax[math]"` or, in a clone of the repository, `pip install -r'
          " requirements.txt` installs it, `python -c 'import math_verify'` shows what it lacks"
        ) from None
      if self._told != started:
        self._told, self._asked = started, 0
      self._asked += 1
      try:
        return self._helper.ask(json.dumps([gold, answer]).encode()) == b"1"
      except EndedError:
        return False

  def close(self) -> None:
    """Ends the process, if there is one."""
    self._helper.close()


shared = Verifier()
"""The one that graders ask."""
