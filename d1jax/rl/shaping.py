"""From the grade of a task to its reward in training: weights of components, and three more components."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from d1jax.tasks.base import Grade

OVERLONG, ANSWERED, LENGTH = "overlong", "answered", "length"


@dataclasses.dataclass(frozen=True)
class Shaping:
  """How grades become rewards; evaluations do not use it.

  Attributes:
    weights: the weights of components by name; a component that is not named has weight 1.
    overlong: the component `overlong` falls linearly from 0 to -1 over this number of last tokens of the longest
      possible completion (soft overlong punishment, DAPO, arXiv 2503.14476, eq. 13); 0: no such component.
    answered: the reward `answered` of a text from which an answer can be read; 0: no such component.
    length: the weight of the component `length` (`length_rewards`); 0: no such component.
    length_warmup: the first iterations, which do without it.
  """

  weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
  overlong: int = 0
  answered: float = 0.0
  length: float = 0.0
  length_warmup: int = 0

  def __post_init__(self) -> None:
    for name, weight in self.weights.items():
      if not math.isfinite(weight):
        raise ValueError(f"reward_weights: the weight of {name} is {weight}; give a finite number")
    if self.overlong < 0 or not math.isfinite(self.answered):
      raise ValueError(
        f"overlong={self.overlong} must be a number of tokens, at least 0, and answered={self.answered} a finite number"
      )
    if not 0 <= self.length < math.inf or self.length_warmup < 0:
      raise ValueError(
        f"length_reward={self.length} must be a weight, at least 0, and length_warmup={self.length_warmup} a number of"
        " iterations, at least 0"
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
    if self.length and LENGTH in known:
      raise ValueError("length_reward: the task has a component `length` already: leave length_reward at 0")
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
    if not (self.weights or self.overlong or self.answered):
      return grade
    components = dict(grade.components)
    if self.overlong:
      components[OVERLONG] = min(completion_length - self.overlong - length, 0) / self.overlong
    if self.answered:
      components[ANSWERED] = self.answered * (grade.answer is not None)
    weighed = {name: self.weights.get(name, 1.0) * value for name, value in components.items()}
    return dataclasses.replace(grade, components=weighed)

  def length_weight(self, iteration: int) -> float:
    """The weight of the component `length` in an iteration, counted from 0."""
    return self.length if iteration >= self.length_warmup else 0.0


def length_rewards(
  lengths: Int[np.ndarray, "B"], right: Bool[np.ndarray, "B"], num_generations: int
) -> Float[np.ndarray, "B"]:
  """Kimi k1.5's reward of short answers (arXiv 2501.12599, section 2.3.3): lambda = 0.5 - (len - min) / (max - min)
  within a group; right answers get lambda, wrong ones min(0, lambda).

  So the shortest answer of a group gets 0.5 if it is right and 0 if it is wrong, and the longest gets -0.5. A group
  whose answers are equally long gets 0.

  Args:
    lengths: tokens of each completion.
    right: whether it is solved.
    num_generations: the completions of a group, which are neighbours.
  """
  groups = lengths.reshape(-1, num_generations).astype(np.float32)
  least, spread = groups.min(axis=1, keepdims=True), np.ptp(groups, axis=1, keepdims=True)
  shares = (0.5 - (groups - least) / np.maximum(spread, 1)) * (spread > 0)
  return np.where(right, shares.reshape(-1), np.minimum(shares.reshape(-1), 0)).astype(np.float32)


UNSHAPED = Shaping()
