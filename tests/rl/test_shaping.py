import math

import numpy as np
import pytest

from d1jax.rl.shaping import UNSHAPED, Shaping, length_rewards
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
    ({"length": -1.0}, "length_reward=-1.0"),
    ({"length": 1.0, "length_warmup": -1}, "length_warmup=-1"),
    ({"weights": {"right": math.inf}}, "reward_weights: the weight of right is inf"),
  ],
)
def test_shaping_that_means_nothing_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Shaping(**fields).check(["right", "format"], 8)


def test_a_component_of_the_same_name_is_refused():
  with pytest.raises(ValueError, match="answered: the task has a component with this name already"):
    Shaping(answered=0.1).check(["answered"], 8)


def test_short_answers_pay_within_their_group():
  """lambda = 0.5 - (len - min) / (max - min), by hand: 0.5, 0.25, -0.5, 0; then a group of equal lengths."""
  lengths, right = np.asarray([2, 3, 6, 4, 5, 5, 5, 5]), np.asarray([True, False, True, True, True, False, True, False])
  assert length_rewards(lengths, right, 4).tolist() == [0.5, 0.0, -0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
  assert length_rewards(lengths, ~right, 4).tolist() == [0.0, 0.25, -0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
  assert length_rewards(np.asarray([10, 110]), np.zeros(2, bool), 2).tolist() == [0.0, -0.5]


def test_the_reward_of_short_answers_comes_after_its_warm_up():
  shaping = Shaping(length=0.5, length_warmup=3)
  assert [shaping.length_weight(iteration) for iteration in range(5)] == [0.0, 0.0, 0.0, 0.5, 0.5]
  assert shaping(GRADE, 3, 8) is GRADE, "it is a matter of the group"
  with pytest.raises(ValueError, match="leave length_reward at 0"):
    shaping.check(["length"], 8)
