"""What a task's grade pays in training: weights of its components, and components of length and format beside them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from d1jax.tasks.base import Grade

OVERLONG, ANSWERED = "overlong", "answered"


@dataclasses.dataclass(frozen=True)
class Shaping:
  """How grades become rewards; evaluations do not see it.

  Attributes:
    weights: of components, by name; those that are not named weigh 1.
    overlong: the last tokens of a completion over which `overlong` falls from 0 to -1 (soft overlong punishment, DAPO,
      arXiv 2503.14476, eq. 13); 0: no such component.
    answered: what `answered` pays where an answer can be read from the text; 0: no such component.
  """

  weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
  overlong: int = 0
  answered: float = 0.0

  def __post_init__(self) -> None:
    for name, weight in self.weights.items():
      if not math.isfinite(weight):
        raise ValueError(f"reward_weights: the weight of {name} is {weight}; give a finite number")
    if self.overlong < 0 or not math.isfinite(self.answered):
      raise ValueError(f"overlong={self.overlong} and answered={self.answered}: give a number of tokens, and a reward")

  def check(self, known: Sequence[str], completion_length: int) -> None:
    """Raises a ValueError where a weight is of no component of the task, or no completion can be overlong."""
    names = [*known, *([OVERLONG] if self.overlong else []), *([ANSWERED] if self.answered else [])]
    for name in self.weights:
      if name not in names:
        raise ValueError(f"reward_weights names {name!r}, which is no component; known: {', '.join(names)}")
    for name in (OVERLONG, ANSWERED):
      if names.count(name) > 1:
        raise ValueError(f"{name}: the task has a component of this name: leave it at 0")
    if self.overlong > completion_length:
      raise ValueError(
        f"overlong={self.overlong} is more than the {completion_length} tokens of a completion: give fewer"
      )

  def __call__(self, grade: Grade, length: int, completion_length: int) -> Grade:
    """The grade as training pays it.

    Args:
      grade: of the task.
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
