"""Weights of rollouts that an older policy drew: by hand, and in an update that must not care where they come from."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.diffusion.elbo import elbo
from d1jax.diffusion.likelihood import Scores
from d1jax.diffusion.trajectory import sampled_steps, step_merged
from d1jax.rl import behaviour
from d1jax.rl.estimators import ESTIMATORS, Estimator
from d1jax.rl.losses import ClippedSequence, ClippedToken, Sandwich
from d1jax.rl.method import Method
from tests import toy
from tests.rl.test_update import FREE, assert_close, enumerated, weighted_update

RNG = np.random.default_rng(5)
BEFORE, DRAWN = (jnp.asarray(-RNG.exponential(size=(4, 6)), jnp.float32) for _ in range(2))
ROLLOUT = toy.rollout(batch=4)._replace(reveal_logp=DRAWN)
MASK = np.asarray(ROLLOUT.completion_mask)
STEPS = Estimator(sampled_steps, recorded=True).bind(samples=2)


def test_a_token_weighs_the_ratio_up_to_the_cap():
  """With an estimator that scores some of the tokens only these count; it reads what the sampler recorded."""
  scored = jnp.asarray(RNG.random((4, 6)) < 0.6, jnp.float32) * 3
  found, counted, distance = behaviour.behaviour_weights(
    Method(STEPS, FREE, behaviour_cap=1.5), Scores(BEFORE, scored), ROLLOUT, None
  )
  counts = MASK & (np.asarray(scored) > 0)
  np.testing.assert_array_equal(counted, counts)
  ratio = np.where(counts, np.exp(BEFORE - DRAWN), 0)
  assert (ratio > 1.5).any()
  np.testing.assert_allclose(found, np.minimum(ratio, 1.5), rtol=1e-6)
  np.testing.assert_allclose(distance, np.where(counts, np.abs(BEFORE - DRAWN), 0), rtol=1e-6)


@pytest.mark.parametrize("estimator", [Estimator(elbo, per_sequence=True), STEPS], ids=["scored", "recorded"])
def test_a_sequence_weighs_what_its_loss_takes_as_a_ratio(estimator):
  method = Method(estimator, ClippedSequence(epsilon=0.2), behaviour_cap=10.0)
  weight = jnp.asarray(RNG.random((4, 6)) * MASK, jnp.float32)
  n = MASK.sum(axis=1, keepdims=True)
  mean = lambda logp: (np.asarray(logp) * np.asarray(weight)).sum(axis=1, keepdims=True) / n
  given = None if estimator is STEPS else jnp.asarray(np.broadcast_to(mean(DRAWN), MASK.shape))
  found, counted, _ = behaviour.behaviour_weights(method, Scores(BEFORE, weight), ROLLOUT, given)
  np.testing.assert_allclose(found, np.where(MASK, np.exp(mean(BEFORE) - mean(DRAWN)), 0), rtol=1e-5)
  np.testing.assert_array_equal(counted, MASK)


def test_what_is_scored_again():
  """The paths that were sampled are recorded; all other log-probabilities are scored when a rollout is drawn."""
  for name, estimator in ESTIMATORS.items():
    assert estimator.replays == (name in ("step_merged", "sampled_steps"))
  assert not ESTIMATORS["step_merged"].bind(segments=2).replays
  assert not Method(STEPS, FREE).scores_behaviour
  scored = Method(ESTIMATORS["one_step"], FREE, num_iterations=2, behaviour_cap=2.0)
  assert scored.scores_behaviour
  assert scored.scores_proximal


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"loss": Sandwich(upper_share=0.5), "estimator": ESTIMATORS["sandwich"]}, "^loss Sandwich has no ratio"),
    ({"estimator": ESTIMATORS["sandwich"], "loss": ClippedSequence(epsilon=0.1)}, "^estimator sandwich gives bounds"),
    ({"estimator": STEPS, "importance_cap": 2.0}, "^importance_cap=2.0 would weigh a second time .* to None$"),
    ({"behaviour_cap": 0.0}, "^behaviour_cap=0.0 must be positive"),
  ],
)
def test_what_cannot_be_corrected_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Method(**({"estimator": ESTIMATORS["one_step"], "loss": FREE, "behaviour_cap": 5.0} | fields))


@pytest.mark.slow(reason="compiles programs of its own")
@pytest.mark.parametrize("inner", [1, 3])
def test_an_update_weighs_alike_what_was_recorded_and_what_was_scored(inner):
  """The gradient with `importance_cap` is proven by enumeration in test_update.py; this one must be the same."""

  def again(denoiser, params, rollout, spec, key):
    return step_merged(denoiser, params, rollout, spec, key)

  rewards = jnp.asarray(RNG.normal(size=11), jnp.float32)
  rollout, advantages = enumerated(jnp.asarray(np.log(RNG.dirichlet(np.ones(11))), jnp.float32), rewards)
  proven = Method(ESTIMATORS["step_merged"], ClippedToken(epsilon=0.2), num_iterations=inner, importance_cap=1.3)
  expected = weighted_update(proven, rollout, advantages)
  recorded = dataclasses.replace(proven, importance_cap=None, behaviour_cap=1.3)
  for estimator in (Estimator(again), *([recorded.estimator] if inner > 1 else [])):
    method = dataclasses.replace(recorded, estimator=estimator)
    given = {"behaviour": rollout.reveal_logp} if method.scores_behaviour else {}
    _, step, metrics = weighted_update(method, rollout, advantages, number=jnp.int32(4), **given)
    assert_close(step, expected[1], 1e-6)
    name = "importance/effective_sample_size"
    np.testing.assert_allclose(metrics[name], expected[2][name], rtol=1e-5)
    assert (metrics["behaviour_gap"] > 0.1).all()
