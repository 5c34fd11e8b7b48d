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
  """

  estimator: Estimator
  loss: Loss
  advantage: Advantage = mean
  num_iterations: int = 1
  accumulation: int = 1
  aggregation: str = "token"
  importance_cap: float | None = None
  score_reference: bool = False

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

  @property
  def scores_old(self) -> bool:
    """Whether the policy that made the rollout is scored: for a ratio, a KL to it, or importance weights."""
    return "old" in self.loss.needs or self.importance_cap is not None

  @property
  def scores_reference(self) -> bool:
    """Whether the reference is scored."""
    return self.score_reference or "reference" in self.loss.needs
