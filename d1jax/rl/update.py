"""The diffu-GRPO update: one compiled program from a graded rollout to the next state.

It draws the mu masks of the estimator, scores old and reference log-probabilities with these masks, and scans over the
mu inner optimiser steps. Each step accumulates gradients over micro-batches. Nothing in it depends on Python state; the
estimator and the loss are chosen before it is compiled.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from d1jax import keys
from d1jax.diffusion.denoiser import Denoiser
from d1jax.diffusion.likelihood import Scores
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.microbatch import split_rows, sum_over_parts
from d1jax.rl.behaviour import behaviour_weights
from d1jax.rl.importance import effective_sample_size, truncated_importance, weight_sums
from d1jax.rl.losses import Figures, Loss, Ratios, Terms, reference_gap, sampling_gap, token_weights
from d1jax.rl.method import Method
from d1jax.state import Frozen, Params, TrainState, apply_gradients, merge, reference

Metrics = dict[str, Array]
"""Figures by name, each with one value an inner step: `Float[Array, "mu"]`, or `Float[Array, "mu edges"]` of the ratios
that are at most each of `d1jax.rl.losses.RATIO_EDGES`."""

SCORE = "d1jax.score"
"""The scope of the old and the reference policy's log-probabilities."""


def inner_keys(key: Key[Array, ""], step: Int[Array, ""], num_iterations: int) -> Key[Array, "mu"]:
  """The keys of the mu prompt masks of the update that starts at optimiser step `step`."""
  update_key = keys.purpose_key(key, keys.Purpose.PROMPT_MASK, step)
  return jax.vmap(lambda n: jax.random.fold_in(update_key, n))(jnp.arange(num_iterations))


def _of_loss(loss: Loss, figures: Figures, others: Metrics) -> Metrics:
  """The figures of a loss as metrics; none has the name of another."""
  metrics: Metrics = {}
  for name, figure in figures.items():
    if name in others:
      raise ValueError(
        f"the figure {name} of the loss {type(loss).__name__} has the name of a figure of the update: rename it"
      )
    if isinstance(figure, Ratios):
      metrics[f"{name}/effective_sample_size"] = effective_sample_size(figure.sums)
    metrics[name] = figure.below if isinstance(figure, Ratios) else figure
  return metrics


def update(
  state: TrainState,
  frozen: Frozen,
  rollout: Rollout,
  advantages: Float[Array, "B"],
  behaviour: Float[Array, "B C"] | None = None,
  number: Int[Array, ""] | None = None,
  *,
  method: Method,
  denoiser: Denoiser,
  sampler: SamplerSpec,
  optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
  """Mu optimiser steps on one rollout (arXiv 2504.12216, algorithm 1).

  Inner step n draws new masks for the estimator; old, reference and current log-probabilities share them. At the first
  inner step the policy is the one before the update: old is current with its gradient stopped, and the ratio is exactly
  1. Recorded states are the same at each inner step, so that old and reference are scored once.

  If an older policy may have drawn the rollout, `behaviour` is its log p, where `method.scores_behaviour`, and `number`
  is that of the iteration. It keys the masks in place of the step, which nobody knew when the behaviour was scored.

  Returns:
    The new state, and the figures of each inner step: `loss`; `grad_norm`; `finite`, false if the step was skipped;
    those of the loss; `sampling_gap` and, if a reference is scored, `reference_gap`: the mean |log p - another log p|,
    where the other is that of the sampler or of the reference, in nats a token (for a loss of sequences, of whole
    sequences and divided by their tokens); with importance weights, `importance/effective_sample_size`, a share of the
    tokens; and if an older policy may have drawn the rollout, `behaviour_gap`, the mean distance of its log p from that
    of the policy before the update. `Ratios` of the loss become their effective sample size and, under their own name,
    the shares below each edge.
  """
  step = state.step if number is None else number * method.num_iterations
  step_keys = inner_keys(state.key, step, method.num_iterations)
  loss, mask = method.loss, rollout.completion_mask
  shares = token_weights(mask, method.aggregation), token_weights(mask, "token")
  batch = split_rows((rollout, advantages, *shares), method.accumulation)
  drawn = split_rows(behaviour, method.accumulation)

  def scores(params: Params, rollout: Rollout, key: Key[Array, ""]) -> Scores:
    return method.estimator(denoiser, params, rollout, sampler, key)

  @jax.named_scope(SCORE)
  def scores_under(params: Params, step_keys: Key[Array, "n"]) -> Float[Array, "n parts b C"]:
    one = lambda key: jax.lax.map(lambda part: scores(params, part, key).logp, batch[0])
    if method.estimator.redraws:
      return jax.lax.map(one, step_keys)
    once = jax.lax.map(one, step_keys[:1])
    return jnp.broadcast_to(once, (step_keys.size, *once.shape[1:]))

  # With mu = 3 the old policy is scored under the masks of inner steps 1 and 2 only. At step 0 the current weights are
  # the old ones, and `micro_loss` takes their own log-probabilities, which it computes anyway; zeros fill the place.
  old = None
  if method.scores_old:
    old = scores_under(merge(state.trainable, frozen), step_keys[1:])
    old = jnp.concatenate([jnp.zeros((1, *batch[0].completion.shape)), old])
  ref = scores_under(reference(frozen), step_keys) if method.scores_reference else None
  proximal = None
  if method.scores_proximal:
    with jax.named_scope(SCORE):
      start = merge(state.trainable, frozen)
      proximal = jax.lax.map(lambda part: scores(start, part, step_keys[0]), batch[0])

  def micro_loss(trainable: Params, part: Any, key: Key[Array, ""], first: Bool[Array, ""]) -> tuple[Any, Any]:
    (rollout, advantages, weights, share), (behaviour, before), old_logp, ref_logp = part
    current = scores(merge(trainable, frozen), rollout, key)
    if old_logp is not None:
      old_logp = jnp.where(first, jax.lax.stop_gradient(current.logp), old_logp)
    sums, gap = None, None
    if method.behaviour_cap is not None:
      if before is None:  # the estimator scores where tokens were drawn, or this is the only inner step
        before = current._replace(logp=jax.lax.stop_gradient(current.logp) if old_logp is None else old_logp)
      importance, counted, distance = behaviour_weights(method, before, rollout, behaviour)
      weights, sums, gap = weights * importance, weight_sums(importance, counted), jnp.sum(share * distance)
    if method.importance_cap is not None:
      mask = rollout.completion_mask & (current.weight > 0)
      importance = truncated_importance(old_logp, rollout.reveal_logp, mask, method.importance_cap)
      weights, sums = weights * importance, weight_sums(importance, mask)
    terms = Terms(current, old_logp, ref_logp, advantages, weights, share)
    minimised, figures = loss(terms)
    sampling = sampling_gap(terms, rollout.reveal_logp, of_sequences=loss.per_sequence)
    apart = reference_gap(terms, of_sequences=loss.per_sequence)
    return minimised, (minimised, figures, sums, sampling, apart, gap)

  def inner(state: TrainState, xs: Any) -> tuple[TrainState, Metrics]:
    index, key, old_logp, ref_logp = xs
    gradient = jax.grad(micro_loss, has_aux=True)

    grads, (minimised, figures, sums, sampling, apart, gap) = sum_over_parts(
      lambda part: gradient(state.trainable, part, key, index == 0), (batch, (drawn, proximal), old_logp, ref_logp)
    )
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(minimised) & jnp.isfinite(norm)
    metrics = {"loss": minimised, "grad_norm": norm, "finite": finite, "sampling_gap": sampling}
    metrics |= {name: each for name, each in (("reference_gap", apart), ("behaviour_gap", gap)) if each is not None}
    if sums is not None:
      metrics["importance/effective_sample_size"] = effective_sample_size(sums)
    return apply_gradients(state, grads, optimizer, finite), metrics | _of_loss(loss, figures, metrics)

  return jax.lax.scan(inner, state, (jnp.arange(method.num_iterations), step_keys, old, ref))
