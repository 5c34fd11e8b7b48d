import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d1jax.diffusion.likelihood import Scores
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.rl import methods
from d1jax.rl.losses import LossOptions
from d1jax.rl.methods import ESTIMATORS, LOSSES
from d1jax.rl.presets import METHODS
from d1jax.rl.update import update
from d1jax.state import Frozen, create
from d1jax.training import method
from tests import jobs, toy

LENGTH, STEPS = 6, 6
SAMPLER = SamplerSpec(completion_length=LENGTH, diffusion_steps=STEPS, block_length=3)
ROLLOUT = toy.rollout(batch=4, completion_length=LENGTH)
ROLLOUT = ROLLOUT._replace(
  reveal_step=jnp.broadcast_to(jnp.asarray([1, 0, 2, 3, 5, 4], jnp.int32), (4, LENGTH)),
  reveal_logp=-jnp.asarray(np.random.default_rng(0).uniform(0.1, 3, (4, LENGTH)), jnp.float32),
)
ADVANTAGES = jnp.asarray([1.0, -1.0, 0.4, -0.4])
OPTIMIZER = optax.sgd(0.1)


def chosen(name: str, **fields):
  """`config.grpo` of the tiny preset with a method, on the toy's lengths, and the sampler."""
  config = jobs.load("grpo", "tiny")
  config.grpo.update(num_iterations=2, accumulation=2)
  config.rollout.update(completion_length=LENGTH, diffusion_steps=STEPS, block_length=3, temperature=0.9)
  for section, values in METHODS[name].fields(config.rollout.to_dict()).items():
    config[section].update(values)
  config.grpo.update(fields)
  return config.grpo, SamplerSpec(**config.rollout)


@pytest.mark.few(2, reason="each case compiles programs of its own")
@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_takes_a_tiny_update(name):
  """At the first inner step each ratio is 1; no advantages, no gradient."""
  section, sampler = chosen(name)
  built = method.build(section, sampler)
  fixed = {"denoiser": toy.DENOISER, "estimator": built.estimator, "sampler": sampler, "optimizer": OPTIMIZER}
  program = jax.jit(functools.partial(update, **fixed, spec=built.spec))
  state = create(lambda _: toy.params(scale=0.7), OPTIMIZER, jax.random.key(8), jax.random.key(0))
  rewards = jnp.asarray([1.0, 0.0, 0.25, 0.5])
  new, metrics = program(state, Frozen({}, {}), ROLLOUT, built.advantages(rewards, 4))
  assert metrics.finite.all()
  assert int(new.step) == 2
  assert metrics.grad_norm[0] > 0
  assert np.isfinite(metrics.sampling_gap).all()
  if LOSSES[section.loss].ratio:
    assert (metrics.ratio_deviation[0], metrics.clip_fraction[0]) == (0, 0)
    assert metrics.ratio_deviation[1] > 0
  else:
    assert metrics.ratio_deviation is metrics.clip_fraction is metrics.ratio_below is None
  still, metrics = program(state, Frozen({}, {}), ROLLOUT, jnp.zeros(4))
  np.testing.assert_array_equal(metrics.grad_norm, 0)
  jax.tree.map(np.testing.assert_array_equal, still.trainable, state.trainable)


@pytest.mark.parametrize(
  ("name", "fields", "message"),
  [
    ("d1", {"estimator": "two_step"}, "unknown grpo.estimator 'two_step'; choose one of: one_step, "),
    ("d1", {"loss": "clip"}, "unknown grpo.loss 'clip'; choose one of: clipped_token, clipped_sequence, likelihood"),
    ("d1", {"advantage": "median"}, "unknown grpo.advantage 'median'; choose one of: mean, mean_std, leave_one_out"),
    ("d1", {"kl": "k4"}, "unknown grpo.kl 'k4'; choose one of: k1, k2, k3"),
    ("d1", {"kl_against": "base"}, "unknown grpo.kl_against 'base'; choose one of: reference, old"),
    ("d1", {"aggregation": "mean"}, "aggregation='mean' is unknown; known: token, sequence, fixed"),
    ("wd1", {"epsilon": 0.2}, "grpo.epsilon=0.2 clips a ratio, but grpo.loss=likelihood has none: set it to None"),
    ("justgrpo", {"epsilon_high": 0.2}, "grpo.epsilon_high=0.2 clips a ratio, but grpo.loss=likelihood has none"),
    ("d1", {"epsilon": None}, "grpo.epsilon=None: grpo.loss=clipped_token clips its ratio"),
    ("d1", {"epsilon": -0.2}, "grpo.epsilon=-0.2 must not be negative"),
    ("d1", {"epsilon_high": -0.1}, "grpo.epsilon_high=-0.1 must not be negative"),
    ("d1", {"beta": -0.1}, "grpo.beta=-0.1 must not be negative"),
    ("d1", {"upper_share": 0.5}, "grpo.upper_share=0.5 with grpo.loss=clipped_token: set it to None"),
    ("spg", {"upper_share": None}, "grpo.upper_share=None with grpo.loss=sandwich: give the share"),
    ("spg", {"upper_share": 1.5}, "grpo.upper_share=1.5 must be from 0 to 1"),
    (
      "spg",
      {"estimator": "elbo", "exponent": None},
      "sandwich needs an upper bound, which grpo.estimator=elbo has not",
    ),
    ("espo", {"loss": "clipped_token"}, "takes the ratio of each token, but grpo.estimator=elbo estimates a sequence"),
    ("espo", {"nodes": 3}, "grpo.nodes=3 is no option of grpo.estimator=elbo, which has samples, masking, antithetic"),
    ("espo", {"samples": None}, "grpo.samples=None, but grpo.estimator=elbo needs it: set it"),
    ("espo", {"samples": 0}, "grpo.samples=0 must be at least 1"),
    ("d1", {"segments": 3}, "grpo.segments=3 is no option of grpo.estimator=one_step, which has none of them"),
    ("stepmerge", {"segments": 4}, "grpo.segments=4 does not divide the 6 denoising steps of a rollout: use a divisor"),
    ("espo", {"samples": 3}, "grpo.estimator=elbo: samples=3 is odd, but antithetic masks come in pairs"),
    ("espo", {"masking": "none"}, "grpo.estimator=elbo: masking='none' is unknown; known: bernoulli, count"),
    ("spg", {"exponent": 0.0}, "grpo.estimator=sandwich: exponent=0.0 must be positive"),
    ("justgrpo", {"top_entropy": 1.5}, "grpo.estimator=left_to_right: top_entropy=1.5 is a share of the tokens"),
    ("d1", {"importance_cap": 2.0}, r"needs an estimator of the recorded states .* the data, not the ratio"),
    ("tracerl", {"importance_cap": 0.0}, "grpo.importance_cap=0.0 must be positive"),
    ("tracerl", {"importance_cap": 2.0, "loss": "clipped_sequence"}, "weighs tokens, but grpo.loss=clipped_sequence"),
    ("d1", {"num_generations": 1}, "grpo.num_generations=1: a group of one has no baseline"),
    ("d1", {"num_iterations": 0}, "num_iterations=0 and accumulation=2 must be at least 1"),
  ],
)
def test_combinations_that_make_no_sense_are_refused(name, fields, message):
  section, sampler = chosen(name, **fields)
  with pytest.raises(ValueError, match=message):
    method.build(section, sampler)


def test_a_new_estimator_is_a_function_and_a_line(monkeypatch):
  """As docs/methods.md shows it."""
  text = (jobs.ROOT / "docs" / "methods.md").read_text(encoding="utf-8").split("## Adding an estimator")[1]
  function, line = (part.split("```")[0] for part in text.split("```python")[1:3])
  names = {**vars(methods), "Scores": Scores}
  exec(function, names)
  monkeypatch.setitem(ESTIMATORS, "two_times", eval("{" + line + "}", names)["two_times"])
  section, sampler = chosen("d1", estimator="two_times")
  built = method.build(section, sampler)
  assert built.spec.passes.number == 3
  score = lambda estimator: jax.jit(
    lambda r: estimator(toy.DENOISER, toy.params(), r, sampler, jax.random.key(0)).logp
  )(ROLLOUT)
  parts = [score(method.build(*chosen(name)).estimator) for name in ("d1",)]
  parts.append(score(method.build(*chosen("stepmerge", segments=2)).estimator))
  np.testing.assert_allclose(score(built.estimator), sum(parts) / 2, rtol=1e-5)


def test_options_reach_the_estimator_that_has_them():
  bound = methods.bind("one_step", {"p_mask_prompt": 0.25, "samples": 7, "tile": None})
  assert isinstance(bound, functools.partial)
  assert bound.keywords == {"p_mask_prompt": 0.25}


def test_losses_are_told_what_the_configuration_says():
  section, sampler = chosen("espo", epsilon_high=0.1, beta=0.2)
  assert method.build(section, sampler).spec.options == LossOptions(0.2, 0.2, 0.1, "k2", "reference", None)


def test_an_epsilon_of_zero_is_taken():
  section, sampler = chosen("espo", epsilon=0.0)
  assert method.build(section, sampler).spec.options.epsilon == 0
