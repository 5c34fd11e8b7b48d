"""The diffu-GRPO update: one compiled program from a graded rollout to the next state.

It draws the mu prompt masks, scores old and reference log-probabilities under them, and scans the mu inner optimiser
steps, each of which accumulates gradients over micro-batches. Nothing in it depends on Python state.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from d1jax import keys
from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.likelihood import Estimator
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.microbatch import split_rows, sum_over_parts
from d1jax.rl.importance import effective_sample_size, truncated_importance, weight_sums
from d1jax.rl.losses import AGGREGATIONS, clipped_surrogate, token_weights
from d1jax.state import Frozen, Params, TrainState, apply_gradients, merge, reference


@dataclasses.dataclass(frozen=True)
class UpdateSpec:
  """What an update does; static under jit. Names are d1's where d1 has the option.

  Attributes:
    num_iterations: mu, optimiser steps an update.
    accumulation: micro-batches a step.
    epsilon: half width of the clip.
    beta: weight of the KL term; at 0 no reference is scored.
    aggregation: `token` or `sequence`, see `token_weights`.
    recorded_states: whether the estimator scores the states that the rollout recorded, the same at every inner step;
      otherwise it masks anew at each.
    importance_cap: weighs each token by min(this, p_train / p_sample), see `truncated_importance`, with p_train of the
      policy before the update and p_sample of the rollout's sampler; None: every token the same.
  """

  num_iterations: int
  accumulation: int
  epsilon: float
  beta: float
  aggregation: str
  recorded_states: bool = False
  importance_cap: float | None = None

  def __post_init__(self) -> None:
    if self.num_iterations < 1 or self.accumulation < 1:
      raise ValueError(f"num_iterations={self.num_iterations} and accumulation={self.accumulation} must be at least 1")
    if not self.epsilon > 0 or self.beta < 0:
      raise ValueError(f"epsilon={self.epsilon} must be positive and beta={self.beta} not negative")
    if self.aggregation not in AGGREGATIONS:
      raise ValueError(f"aggregation={self.aggregation!r} is unknown; known: {', '.join(AGGREGATIONS)}")
    if self.importance_cap is not None and not self.importance_cap > 0:
      raise ValueError(f"importance_cap={self.importance_cap} must be positive; None weighs every token the same")
    if self.importance_cap is not None and not self.recorded_states:
      raise ValueError(
        f"importance_cap={self.importance_cap} needs an estimator of the recorded states (grpo.estimator=trajectory):"
        " for a one-step estimator a cache shifts the data, not the ratio, and its drift is what a run logs"
      )


class UpdateMetrics(NamedTuple):
  """One value an inner step; `finite` is false where the step was refused, `effective_sample_size` is of the importance
  weights, as a share of the tokens, and None where there are none.
  """

  loss: Float[Array, "mu"]
  kl: Float[Array, "mu"]
  clip_fraction: Float[Array, "mu"]
  ratio_deviation: Float[Array, "mu"]
  grad_norm: Float[Array, "mu"]
  finite: Bool[Array, "mu"]
  effective_sample_size: Float[Array, "mu"] | None = None


def inner_keys(key: Key[Array, ""], step: Int[Array, ""], num_iterations: int) -> Key[Array, "mu"]:
  """The keys of the mu prompt masks of the update that starts at optimiser step `step`."""
  update_key = keys.purpose_key(key, keys.Purpose.PROMPT_MASK, step)
  return jax.vmap(lambda n: jax.random.fold_in(update_key, n))(jnp.arange(num_iterations))


def update(
  state: TrainState,
  frozen: Frozen,
  rollout: Rollout,
  advantages: Float[Array, "B"],
  *,
  denoiser: Denoiser,
  estimator: Estimator,
  sampler: SamplerSpec,
  optimizer: optax.GradientTransformation,
  spec: UpdateSpec,
) -> tuple[TrainState, UpdateMetrics]:
  """Mu optimiser steps on one rollout (arXiv 2504.12216, algorithm 1).

  Inner step n masks the prompts anew; old, reference and current log-probabilities share that mask. At the first inner
  step the policy is the one that made the rollout, so old is current with its gradient stopped and the ratio is exactly
  1. Recorded states are the same at each inner step: old and reference are scored once.

  Returns:
    The new state, and the metrics of each inner step.
  """
  step_keys = inner_keys(state.key, state.step, spec.num_iterations)
  batch = split_rows(
    (rollout, advantages, token_weights(rollout.completion_mask, spec.aggregation)),
    spec.accumulation,
  )

  def scores(params: Params, rollout: Rollout, key: Key[Array, ""]) -> Float[Array, "B C"]:
    return estimator(denoiser, params, rollout, sampler, key).logp

  def scores_under(params: Params, step_keys: Key[Array, "n"]) -> Float[Array, "n parts b C"]:
    one = lambda key: jax.lax.map(lambda part: scores(params, part, key), batch[0])
    if not spec.recorded_states:
      return jax.lax.map(one, step_keys)
    found = jax.lax.map(one, step_keys[:1])
    return jnp.broadcast_to(found, (step_keys.size, *found.shape[1:]))

  old = scores_under(merge(state.trainable, frozen), step_keys[1:])
  old = jnp.concatenate([jnp.zeros((1, *batch[0].completion.shape)), old])
  ref = scores_under(reference(frozen), step_keys) if spec.beta else None

  def micro_loss(trainable: Params, part: Any, key: Key[Array, ""], first: Bool[Array, ""]) -> tuple[Any, Any]:
    (rollout, advantages, weights), old_logp, ref_logp = part
    logp = scores(merge(trainable, frozen), rollout, key)
    old_logp = jnp.where(first, jax.lax.stop_gradient(logp), old_logp)
    sums = None
    if spec.importance_cap is not None:
      mask = rollout.completion_mask
      importance = truncated_importance(old_logp, rollout.reveal_logp, mask, spec.importance_cap)
      weights, sums = weights * importance, weight_sums(importance, mask)
    terms = clipped_surrogate(logp, old_logp, ref_logp, advantages, weights, epsilon=spec.epsilon, beta=spec.beta)
    return terms.loss, (terms, sums)

  def inner(state: TrainState, xs: Any) -> tuple[TrainState, UpdateMetrics]:
    index, key, old_logp, ref_logp = xs
    gradient = jax.grad(micro_loss, has_aux=True)

    grads, (terms, sums) = sum_over_parts(
      lambda part: gradient(state.trainable, part, key, index == 0), (batch, old_logp, ref_logp)
    )
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(terms.loss) & jnp.isfinite(norm)
    effective = None if sums is None else effective_sample_size(sums)
    metrics = UpdateMetrics(**terms._asdict(), grad_norm=norm, finite=finite, effective_sample_size=effective)
    return apply_gradients(state, grads, optimizer, finite), metrics

  return jax.lax.scan(inner, state, (jnp.arange(spec.num_iterations), step_keys, old, ref))
