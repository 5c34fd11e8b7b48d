import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.grpo import set_fields
from configs.methods import METHODS
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.rl.estimators import ESTIMATORS
from d1jax.rl.losses import ClippedSequence, ClippedToken
from d1jax.rl.method import Method
from d1jax.rl.update import update
from d1jax.run import parts
from d1jax.state import Frozen, create
from d1jax.training import configured
from tests import jobs, toy
from tests.diffusion import causal

LENGTH, STEPS = 6, 6
SAMPLER = SamplerSpec(completion_length=LENGTH, diffusion_steps=STEPS, block_length=3)
ROLLOUT = toy.rollout(batch=4, completion_length=LENGTH)
ROLLOUT = ROLLOUT._replace(
  reveal_step=jnp.broadcast_to(jnp.asarray([1, 0, 2, 3, 5, 4], jnp.int32), (4, LENGTH)),
  reveal_logp=-jnp.asarray(np.random.default_rng(0).uniform(0.1, 3, (4, LENGTH)), jnp.float32),
)
ADVANTAGES = jnp.asarray([1.0, -1.0, 0.4, -0.4])
OPTIMIZER = optax.sgd(0.1)


def chosen(name: str, block_causal: bool = False, **fields):
  """`config.grpo` of the tiny preset with a method, on the toy's lengths, and the sampler."""
  config = jobs.load("grpo", "tiny")
  config.grpo.update(num_iterations=2, accumulation=2)
  config.rollout.update(completion_length=LENGTH, diffusion_steps=STEPS, block_length=3, temperature=0.9)
  for section, values in METHODS[name].fields(config.rollout.to_dict(), block_causal=block_causal).items():
    set_fields(config[section], values)
  flags, others = parts.take_flags([f"--config.grpo.{field}={value}" for field, value in fields.items()])
  parts.choose(config.grpo, flags)
  config.grpo.update({field: value for field, value in fields.items() if f"--config.grpo.{field}={value}" in others})
  return config.grpo, SamplerSpec(**config.rollout)


@pytest.mark.few(2, reason="each case compiles programs of its own")
@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_takes_a_tiny_update(name):
  """At the first inner step each ratio is 1; no advantages, no gradient."""
  section, sampler = chosen(name)
  built = configured.method(section, sampler)
  fixed = {"method": built, "denoiser": toy.DENOISER, "sampler": sampler, "optimizer": OPTIMIZER}
  program = jax.jit(functools.partial(update, **fixed))
  state = create(lambda _: toy.params(scale=0.7), OPTIMIZER, jax.random.key(8), jax.random.key(0))
  rewards = jnp.asarray([1.0, 0.0, 0.25, 0.5])
  new, metrics = program(state, Frozen({}, {}), ROLLOUT, built.advantage(rewards, 4))
  assert metrics["finite"].all()
  assert int(new.step) == 2
  assert metrics["grad_norm"][0] > 0
  assert np.isfinite(metrics["sampling_gap"]).all()
  if "old" in built.loss.needs:
    assert (metrics["ratio_deviation"][0], metrics["clip_fraction"][0]) == (0, 0)
    assert metrics["ratio_deviation"][1] > 0
  else:
    assert not {"ratio_deviation", "clip_fraction", "ratio", "ratio/effective_sample_size"} & metrics.keys()
  still, metrics = program(state, Frozen({}, {}), ROLLOUT, jnp.zeros(4))
  np.testing.assert_array_equal(metrics["grad_norm"], 0)
  jax.tree.map(np.testing.assert_array_equal, still.trainable, state.trainable)


@pytest.mark.parametrize(
  ("name", "fields", "message"),
  [
    ("d1", {"estimator": "two_step"}, "unknown grpo.estimator 'two_step'; choose one of: one_step, "),
    ("d1", {"loss": "clip"}, "unknown grpo.loss 'clip'; choose one of: clipped_token, clipped_sequence, likelihood"),
    ("d1", {"advantage": "median"}, "unknown grpo.advantage 'median'; choose one of: mean, mean_std, leave_one_out"),
    ("d1", {"kl": "k4"}, "grpo.loss=clipped_token: kl='k4' is unknown; known: k1, k2, k3"),
    ("d1", {"aggregation": "mean"}, "grpo.aggregation='mean' is unknown; known: token, sequence, fixed"),
    ("wd1", {"epsilon": 0.2}, "grpo.loss.epsilon=0.2 is no option of grpo.loss=likelihood, which has beta, kl, kl_ag"),
    ("d1", {"epsilon": None}, "grpo.loss.epsilon=None must be a finite number$"),
    ("d1", {"epsilon": "wide"}, "grpo.loss.epsilon='wide' must be a finite number$"),
    ("d1", {"epsilon_high": "[1]"}, r"grpo.loss.epsilon_high=\[1\] must be a finite number or None$"),
    ("d1", {"beta": "1e999"}, "grpo.loss.beta=inf must be a finite number$"),
    ("d1", {"epsilon": -0.2}, "grpo.loss=clipped_token: epsilon=-0.2 must not be negative"),
    ("d1", {"upper_share": 0.5}, "grpo.loss.upper_share=0.5 is no option of grpo.loss=clipped_token"),
    (
      "d1",
      {"loss": "sandwich"},
      "grpo.loss=sandwich needs the option upper_share: give --config.grpo.loss.upper",
    ),
    ("spg", {"upper_share": 1.5}, "grpo.loss=sandwich: upper_share=1.5 must be from 0 to 1"),
    (
      "spg",
      {"estimator": "elbo"},
      "grpo.loss Sandwich needs an upper bound of log p, which elbo does not",
    ),
    (
      "espo",
      {"loss": "clipped_token"},
      "grpo.loss ClippedToken takes the log p of each token, but elbo estim",
    ),
    (
      "espo",
      {"nodes": 3},
      "grpo.estimator.nodes=3 is no option of grpo.estimator=elbo, which has samples",
    ),
    (
      "d1",
      {"estimator": "elbo"},
      "grpo.estimator=elbo needs the option samples: give --config.grpo.est",
    ),
    ("espo", {"samples": 0}, "grpo.estimator=elbo: samples=0 must be at least 1"),
    ("espo", {"samples": 2.5}, "grpo.estimator.samples=2.5 must be a whole number$"),
    ("d1", {"segments": 3}, "grpo.estimator.segments=3 is no option of grpo.estimator=one_step, which has none"),
    ("stepmerge", {"segments": 4}, "grpo.estimator=step_merged: segments=4 does not divide the 6 denoising steps"),
    ("espo", {"samples": 3}, "grpo.estimator=elbo: samples=3 is odd, but antithetic masks come in pairs"),
    ("espo", {"masking": "none"}, "grpo.estimator=elbo: masking='none' is unknown; known: bernoulli, count"),
    ("spg", {"exponent": 0.0}, "grpo.estimator=sandwich: exponent=0.0 must be positive"),
    ("justgrpo", {"top_entropy": 1.5}, "grpo.estimator=left_to_right: top_entropy=1.5 is a share of the tokens"),
    ("d1", {"importance_cap": 2.0}, r"needs an estimator of the recorded states.* no ratio to the sampler"),
    ("tracerl", {"importance_cap": 0.0}, "grpo.importance_cap=0.0 must be positive"),
    (
      "tracerl",
      {"importance_cap": 2.0, "loss": "clipped_sequence"},
      "weighs single tokens, but the loss ClippedSequence is",
    ),
    ("d1", {"num_generations": 1}, "grpo.num_generations=1: a group of one has no baseline"),
    ("d1", {"num_iterations": 0}, "grpo.num_iterations=0 and accumulation=2 must be at least 1"),
  ],
)
def test_combinations_that_make_no_sense_are_refused(name, fields, message):
  with pytest.raises(ValueError, match=message):
    configured.method(*chosen(name, **fields))


def test_options_reach_the_estimator_that_has_them():
  section, sampler = chosen("d1", p_mask_prompt=0.25)
  assert dict(configured.method(section, sampler).estimator.bound) == {"p_mask_prompt": 0.25}
  section, sampler = chosen("stepmerge", p_mask_prompt=0.25, segments=2)
  assert dict(configured.method(section, sampler).estimator.bound) == {"segments": 2}
  with pytest.raises(ValueError, match="samples is no option of one_step, which has: p_mask_prompt, tile"):
    ESTIMATORS["one_step"].bind(samples=7)


def test_losses_are_told_what_the_configuration_says():
  section, sampler = chosen("espo", epsilon_high=0.1, beta=0.2)
  expected = ClippedSequence(epsilon=0.2, epsilon_high=0.1, beta=0.2, kl="k2")
  assert configured.method(section, sampler).loss == expected
  section, sampler = chosen("espo", epsilon=0.0)
  assert configured.method(section, sampler).loss.epsilon == 0


def test_a_method_is_a_value():
  one, other = (Method(ESTIMATORS["one_step"].bind(p_mask_prompt=0.1), ClippedToken(epsilon=0.5)) for _ in range(2))
  assert one == other
  assert hash(one) == hash(other)
  assert not one.scores_reference
  assert Method(one.estimator, ClippedToken(epsilon=0.5, beta=0.1)).scores_reference


@pytest.mark.few(2, reason="each case compiles programs of its own")
@pytest.mark.parametrize("name", [name for name in METHODS if name != "spg"])
def test_every_method_but_one_takes_a_tiny_update_of_a_block_causal_network(name):
  """At the first inner step each ratio is 1, and the path has the log-probabilities that the sampler recorded."""
  section, sampler = chosen(name, block_causal=True)
  denoiser, rollout = causal.denoiser(3), causal.rollout(sampler, 3)
  built = configured.method(section, sampler, 3)
  fixed = {"method": built, "denoiser": denoiser, "sampler": sampler, "optimizer": OPTIMIZER}
  state = create(lambda _: causal.params(), OPTIMIZER, jax.random.key(8), jax.random.key(0))
  rewards = jnp.asarray([1.0, 0.0, 0.25, 0.5])
  program = jax.jit(functools.partial(update, **fixed))
  metrics = program(state, Frozen({}, {}), rollout, built.advantage(rewards, 4))[1]
  assert metrics["finite"].all()
  assert metrics["grad_norm"][0] > 0
  if "old" in built.loss.needs:
    assert (metrics["ratio_deviation"][0], metrics["clip_fraction"][0]) == (0, 0)
    assert metrics["ratio_deviation"][1] > 0
  if name == "tracerl":
    assert metrics["sampling_gap"][0] < 1e-5


def test_the_method_without_meaning_for_blocks_is_refused():
  section, sampler = chosen("spg", block_causal=True)
  with pytest.raises(ValueError, match=r"grpo.estimator=sandwich: .*use the estimator elbo, or step_merged"):
    configured.method(section, sampler, 3)
