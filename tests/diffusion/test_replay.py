import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.diffusion.replay import replay
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from d1jax.diffusion.sampler import sample
from tests import toy
from tests.diffusion.naive import generate
from tests.jaxprs import shapes

KEY = jax.random.key(3)
PARAMS = toy.params()
IDS = jnp.asarray([40, 7, 19, 3], jnp.int32)
PROMPT, VALID = toy.prompts([5, 1, 3, 4], 5)
SPEC = SamplerSpec(completion_length=12, diffusion_steps=6, block_length=4)


def rolled(spec: SamplerSpec, denoiser=toy.DENOISER) -> Rollout:
  run = jax.jit(functools.partial(sample, denoiser, spec=spec))
  return run(PARAMS, PROMPT, VALID, IDS, IDS, KEY)


def replayed(rollout: Rollout, spec: SamplerSpec, denoiser=toy.DENOISER) -> np.ndarray:
  return np.asarray(jax.jit(functools.partial(replay, denoiser, spec=spec))(PARAMS, rollout))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
  "options",
  [{"cfg_scale": 1.5}, {"schedule": "threshold", "threshold": 0.3}, {"remasking": "random"}],
  ids=str,
)
def test_what_exact_rollouts_recorded(options, shift):
  denoiser = dataclasses.replace(toy.DENOISER, shift=shift)
  spec = dataclasses.replace(SPEC, **options)
  rollout = rolled(spec, denoiser)
  assert (np.asarray(rollout.reveal_logp) < 0).all()
  np.testing.assert_allclose(replayed(rollout, spec, denoiser), rollout.reveal_logp, rtol=1e-5, atol=1e-5)


def test_what_was_never_revealed_scores_zero():
  often = dataclasses.replace(toy.DENOISER, stop_ids=(2, 3, 4, 5, 6))
  spec = dataclasses.replace(SPEC, early_exit=True)
  rollout = rolled(spec, often)
  never = np.asarray(rollout.reveal_logp) == 0
  assert never.any()
  assert not never[np.asarray(rollout.completion_mask)].any()
  found = replayed(rollout, spec, often)
  np.testing.assert_allclose(found, rollout.reveal_logp, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(found[never], 0.0)


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_cached_rollouts_are_scored_by_exact_passes(cfg_scale):
  spec = dataclasses.replace(SPEC, cache="dual", cfg_scale=cfg_scale)
  rollout = jax.device_get(rolled(spec))
  found = replayed(rollout, spec)
  for row, identity in enumerate(IDS):
    path = generate(np.asarray(PROMPT[row]), np.asarray(VALID[row]), int(identity), spec, KEY, PARAMS)
    np.testing.assert_array_equal(rollout.completion[row], path.canvas[5:])
    np.testing.assert_allclose(found[row], path.exact_logp, rtol=1e-5, atol=1e-5)
  assert np.abs(found - rollout.reveal_logp).max() > 1e-2, "the cache should be stale somewhere"


def test_at_temperature_zero_the_untempered_distribution_scores():
  spec = dataclasses.replace(SPEC, temperature=0.0)
  rollout = jax.device_get(rolled(spec))
  np.testing.assert_array_equal(rollout.reveal_logp, 0.0)
  found = replayed(rollout, spec)
  for row, identity in enumerate(IDS):
    path = generate(np.asarray(PROMPT[row]), np.asarray(VALID[row]), int(identity), spec, KEY, PARAMS)
    np.testing.assert_allclose(found[row], path.exact_logp, rtol=1e-5, atol=1e-5)


@pytest.mark.slow(reason="compiles programs of its own")
def test_gradients_are_those_of_the_passes_one_by_one():
  rollout = jax.device_get(rolled(SPEC))
  valid = jnp.concatenate([VALID, jnp.ones((4, 12), bool)], axis=1)

  def one_by_one(params):
    total = 0.0
    for step in range(6):
      tokens = np.where(rollout.reveal_step < step, rollout.completion, toy.MASK)
      hidden = toy.encode(params, jnp.concatenate([PROMPT, jnp.asarray(tokens)], axis=1), valid)[:, 5:]
      logp = jax.nn.log_softmax(toy.DENOISER.logits(params, hidden) / SPEC.temperature)
      logp = jnp.take_along_axis(logp, jnp.asarray(rollout.completion)[..., None], axis=-1)[..., 0]
      total += jnp.sum(logp[jnp.asarray(rollout.reveal_step == step)])
    return total

  on_device = jax.tree.map(jnp.asarray, rollout)
  found = jax.jit(jax.grad(lambda p: jnp.sum(replay(toy.DENOISER, p, on_device, SPEC))))(PARAMS)
  expected = jax.grad(one_by_one)(PARAMS)
  for name, gradient in expected.items():
    assert np.abs(gradient).max() > 0.1
    np.testing.assert_allclose(found[name], gradient, rtol=1e-4, atol=1e-4)


def test_the_backward_pass_keeps_neither_logits_nor_weights_of_each_step():
  rollout = toy.rollout(completion_length=12)
  score = lambda p: jnp.sum(replay(toy.DENOISER, p, rollout, SPEC))
  found = shapes(jax.grad(score), PARAMS)
  assert {shape for shape in found if len(shape) >= 3 and shape[-1] == toy.VOCAB} == {(4, 4, toy.VOCAB)}
  assert not {(6, *weight.shape) for weight in PARAMS.values()} & found


def test_steps_that_no_row_took_cost_nothing():
  passes = []

  def counted(params, tokens, valid):
    jax.debug.callback(lambda: passes.append(1))
    return toy.encode(params, tokens, valid)

  spec = dataclasses.replace(SPEC, schedule="threshold", threshold=1e-6, max_reveal=4)
  rollout = rolled(spec)
  replayed(rollout, spec, dataclasses.replace(toy.DENOISER, encode=counted))
  jax.effects_barrier()
  assert len(passes) == 3 == spec.forward_passes(np.asarray(rollout.reveal_step))
