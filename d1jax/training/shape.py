"""The shape of an iteration of diffu-GRPO: numbers that are known before anything is compiled."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
  """The shape of an iteration.

  Attributes:
    prompts: the groups of an update.
    num_generations: the completions of each prompt.
    buckets: the prompt lengths that are compiled.
    oversample: rollouts have this many times the groups of an update, and those with the most signal are kept.
    chunks: the parts of a rollout; one is graded while the next is computed.
    slots: the rows of a part that are computed at a time; None: all.
    off_policy_steps: the updates that weights miss when they draw a rollout; 0: each rollout has the newest weights.
    partial_age: for how many iterations a completion may go on (`d1jax.training.partial`); 0: each begins and ends in
      one.
  """

  prompts: int
  num_generations: int
  buckets: tuple[int, ...]
  oversample: int = 1
  chunks: int = 1
  slots: int | None = None
  off_policy_steps: int = 0
  partial_age: int = 0

  @property
  def groups(self) -> int:
    """The number of prompts in a rollout."""
    return self.oversample * self.prompts

  @property
  def rows(self) -> int:
    """The number of completions in a rollout."""
    return self.groups * self.num_generations

  @property
  def ahead(self) -> int:
    """By how many iterations prompts are drawn before the update that takes them."""
    return self.off_policy_steps + self.partial_age
