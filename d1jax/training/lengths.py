"""A curriculum over completion length: rollouts begin short, and grow when too many answers are cut (Kimi k1.5).

Each length has programs of its own, which are compiled before the first iteration. The present length is a function of
the rollouts alone, and is in the checkpoints: so a run that is resumed draws the same rollouts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from d1jax.parallel import multihost
from d1jax.training.host import Visit
from d1jax.training.programs import Programs

_NAME = "length_curriculum"


class Lengths:
  """The programs of each completion length, and which are used at present.

  Attributes:
    programs: those of the present length.
  """

  def __init__(self, each: Sequence[Programs], threshold: float):
    """Begins with the shortest.

    Args:
      each: the programs by ascending length.
      threshold: the share of unfinished answers of an iteration above which the next one has the next length.
    """
    self._each, self._threshold = each, threshold
    self.programs = each[0]

  @property
  def tokens(self) -> int:
    """The present completion length."""
    return self.programs.sampler.completion_length

  def compile(self) -> None:
    """Compiles the programs of all lengths."""
    for programs in self._each:
      programs.compile()

  def learn(self, visit: Visit) -> dict[str, float]:
    """Takes the answers of an iteration; all processes call this together.

    Args:
      visit: the graded rollout of the present length.

    Returns:
      The length of these answers, and the share of those without a stop id.
    """
    stops = np.asarray(self.programs.model.denoiser.stop_ids)
    completion = visit.rollout.completion[:, : self.tokens]
    cut = int(np.sum(~np.isin(completion, stops).any(axis=1)))
    found = multihost.gather((cut, len(completion)))
    share = sum(own for own, _ in found) / sum(rows for _, rows in found)
    figures = {f"{_NAME}/tokens": float(self.tokens), f"{_NAME}/unfinished": share}
    if share > self._threshold and self.programs is not self._each[-1]:
      self.programs = self._each[self._each.index(self.programs) + 1]
    return figures

  def state(self) -> dict[str, Any]:
    """The present length, for the metadata of a checkpoint."""
    return {_NAME: self.tokens}

  def restore(self, metadata: Mapping[str, Any]) -> None:
    """Takes what a checkpoint holds; one that has nothing begins with the shortest length."""
    own = {programs.sampler.completion_length: programs for programs in self._each}
    self.programs = own.get(metadata.get(_NAME, self._each[0].sampler.completion_length), self._each[0])
