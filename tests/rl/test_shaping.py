import math

import pytest

from d1jax.rl.shaping import UNSHAPED, Shaping
from d1jax.tasks.base import Grade

GRADE = Grade({"right": 1.0, "format": 0.5}, {"solved": (1, 1)}, "42")


def test_without_shaping_a_grade_is_itself():
  assert UNSHAPED(GRADE, 3, 8) is GRADE


def test_components_are_weighed_and_metrics_stay():
  shaped = Shaping({"format": 0.2})(GRADE, 3, 8)
  assert shaped.components == {"right": 1.0, "format": 0.1}
  assert (shaped.metrics, shaped.answer) == (GRADE.metrics, "42")
  assert shaped.reward == 1.1


@pytest.mark.parametrize(("length", "expected"), [(1, 0.0), (4, 0.0), (5, -0.25), (7, -0.75), (8, -1.0)])
def test_length_is_punished_over_the_last_tokens(length, expected):
  shaped = Shaping({"overlong": 2.0}, overlong=4)(GRADE, length, 8)
  assert shaped.components == {**GRADE.components, "overlong": 2 * expected}


@pytest.mark.parametrize(("answer", "expected"), [("42", 0.25), (None, 0.0)])
def test_an_answer_that_can_be_read_pays(answer, expected):
  shaped = Shaping(answered=0.25)(Grade({"right": 0.0}, {}, answer), 8, 8)
  assert shaped.components == {"right": 0.0, "answered": expected}


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"weights": {"rihgt": 1.0}}, "names 'rihgt', which is no component; known: right, format"),
    ({"weights": {"overlong": 1.0}}, "names 'overlong'"),
    ({"overlong": 9}, "overlong=9 is more than the 8 tokens of a completion"),
    ({"overlong": -1}, "overlong=-1"),
    ({"answered": math.nan}, "answered=nan"),
    ({"weights": {"right": math.inf}}, "reward_weights: the weight of right is inf"),
  ],
)
def test_shaping_that_means_nothing_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Shaping(**fields).check(["right", "format"], 8)


def test_a_component_of_the_same_name_is_refused():
  with pytest.raises(ValueError, match="answered: the task has a component with this name already"):
    Shaping(answered=0.1).check(["answered"], 8)
