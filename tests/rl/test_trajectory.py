import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.diffusion.rollout import SamplerSpec
from d1jax.diffusion.sampler import sample
from d1jax.rl.importance import effective_sample_size, truncated_importance, weight_sums
from d1jax.rl.trajectory import trajectory
from tests import toy

PARAMS = toy.params()
EXACT = SamplerSpec(completion_length=8, diffusion_steps=4, block_length=4, temperature=0.8, cfg_scale=0.5)
STALE = dataclasses.replace(EXACT, diffusion_steps=8, cache="dual")


def drawn(spec, batch=6):
  prompt, valid = toy.prompts([1 + i % 5 for i in range(batch)], 5)
  ids = jnp.arange(batch, dtype=jnp.int32)
  run = jax.jit(lambda *a: sample(toy.DENOISER, PARAMS, *a, spec=spec))
  return run(prompt, valid, ids, ids // 2, jax.random.key(3))


def scored(rollout, spec, key=0):
  return jax.jit(lambda r: trajectory(toy.DENOISER, PARAMS, r, spec, jax.random.key(key)))(rollout)


def naive(rollout, spec) -> np.ndarray:
  """Log p of each token at the state of its reveal, in float64, one state at a time."""
  found = np.zeros(rollout.completion.shape)
  prompt, completion, steps = (np.asarray(x) for x in (rollout.prompt, rollout.completion, rollout.reveal_step))
  valid = np.concatenate([rollout.prompt_valid, np.ones_like(completion, bool)], axis=1)
  logits = lambda tokens: toy.allowed(toy.encode(PARAMS, jnp.asarray(tokens), jnp.asarray(valid)) @ PARAMS["head"])
  for step in np.unique(steps):
    known = np.where(steps < step, completion, toy.MASK)
    guided, blind = (logits(np.concatenate([p, known], axis=1)) for p in (prompt, np.full_like(prompt, toy.MASK)))
    with np.errstate(invalid="ignore"):
      mixed = np.where(np.isneginf(guided), guided, blind + (spec.cfg_scale + 1) * (guided - blind))
    logp = toy.log_softmax(mixed / spec.temperature)[:, prompt.shape[1] :]
    chosen = np.take_along_axis(logp, completion[..., None], axis=-1)[..., 0]
    found = np.where(steps == step, chosen, found)
  return found


@pytest.mark.parametrize("spec", [EXACT, STALE], ids=["exact", "stale"])
def test_tokens_score_what_the_network_says_of_their_state(spec):
  rollout = drawn(spec)
  scores = scored(rollout, spec)
  expected = naive(rollout, spec)
  mask = np.asarray(rollout.completion_mask)
  np.testing.assert_allclose(np.asarray(scores.logp)[mask], expected[mask], atol=1e-4)
  np.testing.assert_array_equal(scores.weight, mask.astype(np.float32))
  assert scores.upper is None
  np.testing.assert_array_equal(scores.logp, scored(rollout, spec, key=9).logp)


def test_rollouts_in_exact_mode_weigh_one():
  rollout = drawn(EXACT)
  weights = truncated_importance(scored(rollout, EXACT).logp, rollout.reveal_logp, rollout.completion_mask, 2.0)
  np.testing.assert_allclose(weights, rollout.completion_mask, atol=1e-5)
  assert float(effective_sample_size(weight_sums(weights, rollout.completion_mask))) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("cap", [1.02, 1.2])
def test_rollouts_of_a_stale_cache_weigh_what_the_network_thinks_of_them(cap):
  rollout = drawn(STALE, batch=16)
  mask = np.asarray(rollout.completion_mask)
  weights = truncated_importance(scored(rollout, STALE).logp, rollout.reveal_logp, rollout.completion_mask, cap)
  expected = np.minimum(np.exp(naive(rollout, STALE) - np.asarray(rollout.reveal_logp, np.float64)), cap)
  np.testing.assert_allclose(np.asarray(weights)[mask], expected[mask], rtol=1e-3)
  assert (expected[mask] == cap).any(), "the cap should cut some"
  share = effective_sample_size(weight_sums(weights, rollout.completion_mask))
  assert float(share) == pytest.approx(expected[mask].sum() ** 2 / (expected[mask] ** 2).sum() / mask.sum(), rel=1e-4)
  assert share < 0.999
