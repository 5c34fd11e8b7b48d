"""The diffu-GRPO update: one compiled program from a graded rollout to the next state.

It draws the mu masks of the estimator, scores old and reference log-probabilities under them, and scans the mu inner
optimiser steps, each of which accumulates gradients over micro-batches. Nothing in it depends on Python state; which
estimator and which loss is decided before it is compiled.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from d1jax import keys
from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.likelihood import Estimator, Scores
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.microbatch import split_rows, sum_over_parts
from d1jax.rl.importance import effective_sample_size, truncated_importance, weight_sums
from d1jax.rl.losses import AGGREGATIONS, LossOptions, Terms, reference_gap, sampling_gap, token_weights
from d1jax.rl.methods import LOSSES, ONE_PASS, Passes
from d1jax.state import Frozen, Params, TrainState, apply_gradients, merge, reference


@dataclasses.dataclass(frozen=True)
class UpdateSpec:
  """What an update does; static under jit. Names are d1's where d1 has the option.

  Which estimator goes with which loss is checked by `d1jax.rl.methods.check`.

  Attributes:
    num_iterations: mu, optimiser steps an update.
    accumulation: micro-batches a step.
    options: what the loss is told.
    aggregation: `token`, `sequence` or `fixed`, see `token_weights`.
    recorded_states: whether the estimator draws nothing anew at an inner step, so that old and reference are scored
      once; otherwise it masks anew at each.
    importance_cap: weighs each token by min(this, p_train / p_sample), see `truncated_importance`, with p_train of the
      policy before the update and p_sample of the rollout's sampler; None: every token the same.
    loss: a key of `d1jax.rl.methods.LOSSES`.
    score_reference: scores the reference even where no KL term asks for it, so that the distance to it is known.
    passes: what one estimate costs; nothing is computed from it.
  """

  num_iterations: int
  accumulation: int
  options: LossOptions
  aggregation: str
  recorded_states: bool = False
  importance_cap: float | None = None
  loss: str = "clipped_token"
  score_reference: bool = False
  passes: Passes = ONE_PASS

  def __post_init__(self) -> None:
    if self.num_iterations < 1 or self.accumulation < 1:
      raise ValueError(f"num_iterations={self.num_iterations} and accumulation={self.accumulation} must be at least 1")
    if self.aggregation not in AGGREGATIONS:
      raise ValueError(f"aggregation={self.aggregation!r} is unknown; known: {', '.join(AGGREGATIONS)}")

  @property
  def scores_old(self) -> bool:
    """Whether the policy that made the rollout is scored: for a ratio, a KL to it, or importance weights."""
    needed = LOSSES[self.loss].ratio or self.options.pulls_to("old")
    return needed or self.importance_cap is not None

  @property
  def scores_reference(self) -> bool:
    """Whether the reference is scored."""
    return self.score_reference or self.options.pulls_to("reference")


class UpdateMetrics(NamedTuple):
  """One value an inner step, see `PolicyLoss`; None where there is none.

  A gap is a mean |log p - another log p|, nats a token; of whole sequences where the loss is of them.

  Attributes:
    finite: false where the step was refused.
    effective_sample_size: of the importance weights, as a share of the tokens.
    ratio_effective_sample_size: of the ratios to the old policy, as a share of what they are of, tokens or sequences.
    ratio_below: share of tokens whose log-ratio is at most each of `d1jax.rl.losses.RATIO_EDGES`.
    sampling_gap: to the log p under which the rollout drew.
    reference_gap: to the reference's.
  """

  loss: Float[Array, "mu"]
  kl: Float[Array, "mu"]
  clip_fraction: Float[Array, "mu"] | None
  ratio_deviation: Float[Array, "mu"] | None
  grad_norm: Float[Array, "mu"]
  finite: Bool[Array, "mu"]
  effective_sample_size: Float[Array, "mu"] | None = None
  ratio_effective_sample_size: Float[Array, "mu"] | None = None
  ratio_below: Float[Array, "mu edges"] | None = None
  sampling_gap: Float[Array, "mu"] | None = None
  reference_gap: Float[Array, "mu"] | None = None


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

  Inner step n draws the estimator's masks anew; old, reference and current log-probabilities share them. At the first
  inner step the policy is the one that made the rollout, so old is current with its gradient stopped and the ratio is
  exactly 1. Recorded states are the same at each inner step: old and reference are scored once.

  Returns:
    The new state, and the metrics of each inner step.
  """
  step_keys = inner_keys(state.key, state.step, spec.num_iterations)
  minimised, mask = LOSSES[spec.loss], rollout.completion_mask
  shares = token_weights(mask, spec.aggregation), token_weights(mask, "token")
  batch = split_rows((rollout, advantages, *shares), spec.accumulation)

  def scores(params: Params, rollout: Rollout, key: Key[Array, ""]) -> Scores:
    return estimator(denoiser, params, rollout, sampler, key)

  def scores_under(params: Params, step_keys: Key[Array, "n"]) -> Float[Array, "n parts b C"]:
    one = lambda key: jax.lax.map(lambda part: scores(params, part, key).logp, batch[0])
    if not spec.recorded_states:
      return jax.lax.map(one, step_keys)
    found = jax.lax.map(one, step_keys[:1])
    return jnp.broadcast_to(found, (step_keys.size, *found.shape[1:]))

  old = None
  if spec.scores_old:
    old = scores_under(merge(state.trainable, frozen), step_keys[1:])
    old = jnp.concatenate([jnp.zeros((1, *batch[0].completion.shape)), old])
  ref = scores_under(reference(frozen), step_keys) if spec.scores_reference else None

  def micro_loss(trainable: Params, part: Any, key: Key[Array, ""], first: Bool[Array, ""]) -> tuple[Any, Any]:
    (rollout, advantages, weights, share), old_logp, ref_logp = part
    found = scores(merge(trainable, frozen), rollout, key)
    if old_logp is not None:
      old_logp = jnp.where(first, jax.lax.stop_gradient(found.logp), old_logp)
    sums = None
    if spec.importance_cap is not None:
      mask = rollout.completion_mask & (found.weight > 0)
      importance = truncated_importance(old_logp, rollout.reveal_logp, mask, spec.importance_cap)
      weights, sums = weights * importance, weight_sums(importance, mask)
    terms = Terms(found, old_logp, ref_logp, advantages, weights, share)
    policy = minimised.function(terms, spec.options)
    sampling = sampling_gap(terms, rollout.reveal_logp, of_sequences=minimised.sequence)
    return policy.loss, (policy, sums, sampling, reference_gap(terms, of_sequences=minimised.sequence))

  def inner(state: TrainState, xs: Any) -> tuple[TrainState, UpdateMetrics]:
    index, key, old_logp, ref_logp = xs
    gradient = jax.grad(micro_loss, has_aux=True)

    grads, (policy, sums, sampling, apart) = sum_over_parts(
      lambda part: gradient(state.trainable, part, key, index == 0), (batch, old_logp, ref_logp)
    )
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(policy.loss) & jnp.isfinite(norm)
    metrics = UpdateMetrics(
      loss=policy.loss,
      kl=policy.kl,
      clip_fraction=policy.clip_fraction,
      ratio_deviation=policy.ratio_deviation,
      grad_norm=norm,
      finite=finite,
      effective_sample_size=None if sums is None else effective_sample_size(sums),
      ratio_effective_sample_size=None if policy.ratio_sums is None else effective_sample_size(policy.ratio_sums),
      ratio_below=policy.ratio_below,
      sampling_gap=sampling,
      reference_gap=apart,
    )
    return apply_gradients(state, grads, optimizer, finite), metrics

  return jax.lax.scan(inner, state, (jnp.arange(spec.num_iterations), step_keys, old, ref))
