"""A curriculum of prompts: those that are failed are asked more often (Kimi k1.5, arXiv 2501.12599).

A prompt is drawn in proportion to 1 - s, where s is its running success rate. A batch is a function of the seed, of its
number, and of the rates, which a run's checkpoints hold: so a run that is resumed draws the same prompts. If batches
are drawn ahead of their updates, the rates have moved since: then the checkpoints hold these batches too.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from d1jax.data.pipeline import PromptBatch, prompt_batch
from d1jax.rl.prompts import Prompts
from d1jax.tasks import Mixture

LEAST = 0.05
"""The least weight of a prompt: one that is always solved is asked again from time to time."""

FORGETS = 0.5
"""The share of the latest group in a rate: after two more groups, an old success counts a quarter."""

_STREAM = 0x6375
"""Part of the seed of the draws, so that no other use of the run's seed draws the same numbers."""


class Curriculum:
  """Draws prompts by their success rates; of a mix, each task keeps its share.

  Attributes:
    rates: the success rate of each prompt; 0 for a prompt that was not asked yet, which so comes first.
    asked: which prompts were asked.
  """

  def __init__(self, prompts: Prompts, *, groups: int, num_generations: int, seed: int, ahead: int = 0):
    """Begins with no prompt asked.

    Args:
      prompts: of the training split.
      groups: the prompts of a batch.
      num_generations: the completions of each prompt, which are neighbours in a batch.
      seed: of the draws.
      ahead: how many batches are drawn before the oldest of them is trained on.
    """
    self._prompts, self._groups, self._num_generations, self._seed = prompts, groups, num_generations, seed
    self.rates, self.asked = np.zeros(len(prompts.records)), np.zeros(len(prompts.records), bool)
    parts = prompts.task.parts(prompts.records) if isinstance(prompts.task, Mixture) else []
    self._parts = parts or [(list(range(len(prompts.records))), 1.0)]
    self._ahead, self._drawn = ahead, dict[int, list[int]]()

  def probabilities(self) -> Float[np.ndarray, "records"]:
    """The probability of each prompt to be drawn next."""
    weights, found = np.maximum(1 - self.rates, LEAST), np.zeros(len(self.rates))
    for places, share in self._parts:
      found[places] = share * weights[places] / weights[places].sum()
    return found / found.sum()

  def batch(self, number: int) -> PromptBatch:
    """The batch of this number under the present rates; no prompt is in it twice, if there are enough.

    The last `ahead` batches are given again as they were drawn.
    """
    if number not in self._drawn:
      draw = np.random.default_rng([_STREAM, self._seed, number])
      several = self._groups > len(self.rates)
      places = draw.choice(len(self.rates), self._groups, replace=several, p=self.probabilities())
      self._drawn[number] = places.tolist()
    chosen = self._drawn[number]
    self._drawn = {n: each for n, each in self._drawn.items() if n > number - self._ahead}
    prompts, first = self._prompts, number * self._groups * self._num_generations
    return prompt_batch(prompts.ids, chosen, first, self._num_generations, prompts.buckets, prompts.tokenizer.pad_id)

  def learn(self, record: Int[np.ndarray, "B"], solved: Float[np.ndarray, "B"]) -> dict[str, float]:
    """Moves the rates of the prompts of a batch.

    `record` is the prompt of each completion, and `solved` is from 0 to 1.

    Returns:
      The share of the prompts that were asked so far, and the mean of their rates.
    """
    own = record.reshape(-1, self._num_generations)[:, 0]
    for place, share in zip(own, solved.reshape(len(own), -1).mean(axis=1), strict=True):
      kept = 1 - FORGETS if self.asked[place] else 0.0
      self.rates[place] = kept * self.rates[place] + (1 - kept) * share
      self.asked[place] = True
    return {
      "curriculum/asked": float(self.asked.mean()),
      "curriculum/success": float(self.rates[self.asked].mean()),
    }

  def state(self) -> dict[str, Any]:
    """The rates of prompts that were asked, and the last `ahead` batches, for the metadata of a checkpoint."""
    rates = {str(place): float(self.rates[place]) for place in np.flatnonzero(self.asked)}
    return {"curriculum": {"rates": rates, "drawn": {str(number): places for number, places in self._drawn.items()}}}

  def restore(self, metadata: Mapping[str, Any]) -> None:
    """Takes what a checkpoint holds; one that has nothing begins anew."""
    self.rates[:], self.asked[:] = 0.0, False
    found = metadata.get("curriculum")
    found = found if isinstance(found, Mapping) else {}
    for place, rate in found.get("rates", {}).items():
      self.rates[int(place)], self.asked[int(place)] = float(rate), True
    self._drawn = {int(number): list(places) for number, places in found.get("drawn", {}).items()}
