import math

import numpy as np
import pytest

from d1jax.evaluation import evaluator
from d1jax.tasks import Grade, TaskError
from tests.rl.test_grading import Giving, Letters


def test_a_bad_grade_is_told_to_all_processes_and_raised_on_all(monkeypatch):
  records = [{"row": 0, "grade": Grade({"a": math.nan}, {})}]
  ids, told, others = np.asarray([[1, 4]]), [], ["mine.py: it is not finite"]
  monkeypatch.setattr(evaluator.multihost, "gather", lambda said: told.append(said) or [said, *others])

  def completed(prefill):
    return evaluator.grade_completions(Giving(), Letters(), records, [prefill], ids, np.ones_like(ids, bool), "strict")

  with pytest.raises(TaskError, match=r"^mine\.py: it is not finite$"):  # of another process: all is well on this one
    completed("good ")
  others.clear()
  texts, grades = completed("good ")
  assert (texts, grades[0].reward) == (["good ad"], 3.5)
  with pytest.raises(TaskError, match=r"^the task echo: grade.text='bad', .* value nan, expected a finite number"):
    completed("b")
  assert [bool(said) for said in told] == [False, False, True]
