"""A method of reinforcement learning as a value: an estimator of log p, a loss, and an advantage."""

import dataclasses

from d1jax.rl.advantage import Advantage, mean
from d1jax.rl.estimators import ESTIMATORS, Estimator
from d1jax.rl.losses import AGGREGATIONS, Loss


@dataclasses.dataclass(frozen=True)
class Method:
  """The method of an update; static under jit. Options that d1 has too have d1's names.

  Attributes:
    estimator: the estimator of log p, with its options.
    loss: the number to minimise, with its options.
    advantage: the advantage of each completion, from the rewards of its group.
    num_iterations: mu, optimiser steps an update.
    accumulation: micro-batches a step.
    aggregation: `token`, `sequence` or `fixed`, see `token_weights`.
    importance_cap: weighs each token by min(this, p_train / p_sample), see `truncated_importance`, with p_train of the
      policy before the update and p_sample of the rollout's sampler; None: every token the same.
    score_reference: scores the reference even if the loss does not need it, so that a run logs the distance to it.
    behaviour_cap: for rollouts of an older policy: weighs each token, or each sequence, by min(this, p_v / p_u), with
      p_v of the policy before the update and p_u of the one that drew it (`d1jax.rl.behaviour`); None: they are one.
  """

  estimator: Estimator
  loss: Loss
  advantage: Advantage = mean
  num_iterations: int = 1
  accumulation: int = 1
  aggregation: str = "token"
  importance_cap: float | None = None
  score_reference: bool = False
  behaviour_cap: float | None = None

  def __post_init__(self) -> None:
    """Raises a ValueError that begins with the field's name if the parts do not go together."""
    if self.num_iterations < 1 or self.accumulation < 1:
      raise ValueError(f"num_iterations={self.num_iterations} and accumulation={self.accumulation} must be at least 1")
    if self.aggregation not in AGGREGATIONS:
      raise ValueError(f"aggregation={self.aggregation!r} is unknown; known: {', '.join(AGGREGATIONS)}")
    loss, estimator, cap = type(self.loss).__name__, self.estimator, self.importance_cap
    if "upper" in self.loss.needs and not estimator.upper:
      having = ", ".join(name for name, each in ESTIMATORS.items() if each.upper)
      raise ValueError(f"loss {loss} needs an upper bound of log p, which {estimator.name} does not give; use {having}")
    if estimator.per_sequence and not self.loss.per_sequence:
      raise ValueError(
        f"loss {loss} takes the log p of each token, but {estimator.name} estimates only that of whole sequences: use a"
        " loss of sequences, such as clipped_sequence or likelihood"
      )
    if cap is not None and not cap > 0:
      raise ValueError(f"importance_cap={cap} must be positive; None weighs every token the same")
    if cap is not None and not estimator.recorded:
      raise ValueError(
        f"importance_cap={cap} needs an estimator of the recorded states, such as step_merged: with {estimator.name}"
        " there is no ratio to the sampler; set importance_cap to None"
      )
    if cap is not None and not self.loss.weighs_tokens:
      raise ValueError(
        f"importance_cap={cap} weighs single tokens, but the loss {loss} is of sequences: set importance_cap to None"
      )
    if self.behaviour_cap is not None:
      self._check_behaviour(self.behaviour_cap)

  def _check_behaviour(self, cap: float) -> None:
    """Raises a ValueError if rollouts of an older policy cannot be corrected for."""
    loss, estimator = type(self.loss).__name__, self.estimator.name
    if not cap > 0:
      raise ValueError(f"behaviour_cap={cap} must be positive: it is the largest weight of a token")
    if not self.loss.corrects:
      raise ValueError(
        f"loss {loss} has no ratio to a policy, so that it cannot be corrected for rollouts of an older one: set"
        " off_policy_steps to 0, or use clipped_token, clipped_sequence or likelihood"
      )
    if self.estimator.upper:
      raise ValueError(
        f"estimator {estimator} gives bounds of log p, whose ratio is none of policies, so that rollouts of an older"
        " one cannot be corrected for: set off_policy_steps to 0, or use another estimator, such as one_step or elbo"
      )
    if self.importance_cap is not None:
      raise ValueError(
        f"importance_cap={self.importance_cap} would weigh a second time what behaviour_cap={cap} weighs for rollouts"
        " of an older policy: set importance_cap to None"
      )

  @property
  def scores_old(self) -> bool:
    """Whether the policy before the update is scored: for a ratio, a KL to it, or importance weights."""
    weighs = self.importance_cap is not None or (self.behaviour_cap is not None and self.estimator.replays)
    return "old" in self.loss.needs or weighs

  @property
  def weighs_sequences(self) -> bool:
    """Whether `behaviour_cap` weighs whole sequences, because the loss or the estimator is of these alone."""
    return self.estimator.per_sequence or not self.loss.weighs_tokens

  @property
  def scores_behaviour(self) -> bool:
    """Whether the policy that drew a rollout is scored when it is drawn; otherwise the sampler recorded its log p."""
    return self.behaviour_cap is not None and not self.estimator.replays

  @property
  def scores_proximal(self) -> bool:
    """Whether an update scores its start once more, with the masks under which the behaviour was scored."""
    return self.scores_behaviour and self.num_iterations > 1

  @property
  def scores_reference(self) -> bool:
    """Whether the reference is scored."""
    return self.score_reference or "reference" in self.loss.needs
