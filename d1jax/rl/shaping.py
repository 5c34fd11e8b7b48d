"""From the grade of a task to its reward in training: weights of components, and two more components."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from d1jax.tasks.base import Grade

OVERLONG, ANSWERED = "overlong", "answered"


@dataclasses.dataclass(frozen=True)
class Shaping:
  """How grades become rewards; evaluations do not use it.

  Attributes:
    weights: the weights of components by name; a component that is not named has weight 1.
    overlong: the component `overlong` falls linearly from 0 to -1 over this number of last tokens of the longest
      possible completion (soft overlong punishment, DAPO, arXiv 2503.14476, eq. 13); 0: no such component.
    answered: the reward `answered` of a text from which an answer can be read; 0: no such component.
  """

  weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
  overlong: int = 0
  answered: float = 0.0

  def __post_init__(self) -> None:
    for name, weight in self.weights.items():
      if not math.isfinite(weight):
        raise ValueError(f"reward_weights: the weight of {name} is {weight}; give a finite number")
    if self.overlong < 0 or not math.isfinite(self.answered):
      raise ValueError(
        f"overlong={self.overlong} must be a number of tokens, at least 0, and answered={self.answered} a finite number"
      )

  def check(self, known: Sequence[str], completion_length: int) -> None:
    """Raises a ValueError if the task has no component that a weight names, or if no completion can be overlong."""
    names = [*known, *([OVERLONG] if self.overlong else []), *([ANSWERED] if self.answered else [])]
    for name in self.weights:
      if name not in names:
        raise ValueError(f"reward_weights names {name!r}, which is no component; known: {', '.join(names)}")
    for name in (OVERLONG, ANSWERED):
      if names.count(name) > 1:
        raise ValueError(f"{name}: the task has a component with this name already: leave {name} at 0")
    if self.overlong > completion_length:
      raise ValueError(
        f"overlong={self.overlong} is more than the {completion_length} tokens of a completion: give fewer"
      )

  def __call__(self, grade: Grade, length: int, completion_length: int) -> Grade:
    """The grade with the components and weights of training.

    Args:
      grade: the grade of the task.
      length: tokens up to and including the stop id.
      completion_length: C, the most there can be.
    """
    if self == UNSHAPED:
      return grade
    components = dict(grade.components)
    if self.overlong:
      components[OVERLONG] = min(completion_length - self.overlong - length, 0) / self.overlong
    if self.answered:
      components[ANSWERED] = self.answered * (grade.answer is not None)
    weighed = {name: self.weights.get(name, 1.0) * value for name, value in components.items()}
    return dataclasses.replace(grade, components=weighed)


UNSHAPED = Shaping()
