import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.enumeration import LENGTH, Truth, draw_params
from d1jax.diffusion.likelihood import one_step
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.diffusion.sampler import sample
from d1jax.diffusion.trajectory import left_to_right, sampled_steps, step_merged
from d1jax.rl.importance import effective_sample_size, truncated_importance, weight_sums
from tests import toy
from tests.diffusion.invariance import check_rows_stand_alone, gradient_bytes, recorded

PARAMS = toy.params()
EXACT = SamplerSpec(completion_length=8, diffusion_steps=4, block_length=4, temperature=0.8, cfg_scale=0.5)
STALE = dataclasses.replace(EXACT, diffusion_steps=8, cache="dual")


def drawn(spec, batch=6):
  prompt, valid = toy.prompts([1 + i % 5 for i in range(batch)], 5)
  ids = jnp.arange(batch, dtype=jnp.int32)
  run = jax.jit(lambda *a: sample(toy.DENOISER, PARAMS, *a, spec=spec))
  return run(prompt, valid, ids, ids // 2, jax.random.key(3))


def scored(rollout, spec, key=0):
  return jax.jit(lambda r: step_merged(toy.DENOISER, PARAMS, r, spec, jax.random.key(key)))(rollout)


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


@pytest.mark.slow(reason="compiles programs of its own")
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


@pytest.mark.slow(reason="compiles programs of its own")
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


@functools.cache
def truth() -> Truth:
  return Truth(draw_params(0), SamplerSpec(LENGTH, LENGTH, LENGTH, temperature=0.8))


@functools.cache
def paths():
  """Every path of the sampler, as one rollout, and the chance of each."""
  return truth().paths()


def score_paths(estimator, rollout=None, spec=None):
  rollout, spec = rollout or paths()[0], spec or truth().spec
  score = jax.jit(lambda r: estimator(truth().denoiser, truth().params, r, spec, jax.random.key(2)))
  return jax.device_get(score(rollout))


@pytest.mark.slow(reason="compiles programs of its own")
def test_enumerated_paths_are_those_of_the_sampler():
  """Frequencies of completions and of orders, against the chances that enumeration gives them."""
  assert paths()[1].sum() == pytest.approx(1, abs=1e-5)
  rows = 20000
  ids = jnp.arange(rows, dtype=jnp.int32)
  prompt = jnp.broadcast_to(jnp.asarray(truth().prompt, jnp.int32), (rows, 2))
  run = jax.jit(functools.partial(sample, truth().denoiser, spec=truth().spec))
  drawn = jax.device_get(run(truth().params, prompt, jnp.ones((rows, 2), bool), ids, ids, jax.random.key(7)))
  place = lambda r: truth().index(r.completion) * 256 + np.asarray(r.reveal_step) @ 4 ** np.arange(4)
  index = {int(number): i for i, number in enumerate(place(paths()[0]))}
  counts = np.bincount([index[int(number)] for number in place(drawn)], minlength=len(paths()[1]))
  spread = np.sqrt(rows * paths()[1] * (1 - paths()[1])) + 0.5
  assert (np.abs(counts - rows * paths()[1]) < 5 * spread).all()
  chances = np.zeros(len(truth().completions))
  np.add.at(chances, truth().index(np.asarray(paths()[0].completion)), paths()[1])
  np.testing.assert_allclose(np.exp(truth().sampler(truth().params)), chances, atol=1e-6)


def test_as_many_segments_as_steps_is_the_sum_at_the_states_of_reveal():
  expected = truth().along(truth().params, np.asarray(paths()[0].completion), np.asarray(paths()[0].reveal_step))
  np.testing.assert_allclose(score_paths(step_merged).logp, expected, rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(
    score_paths(functools.partial(step_merged, segments=4)).logp, score_paths(step_merged).logp
  )


def test_one_segment_is_one_step_with_the_whole_prompt():
  spec = dataclasses.replace(truth().spec, temperature=1.0)
  merged = score_paths(functools.partial(step_merged, segments=1), spec=spec)
  np.testing.assert_allclose(
    merged.logp, score_paths(functools.partial(one_step, p_mask_prompt=0.0)).logp, rtol=1e-6, atol=1e-6
  )


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize("segments", [1, 2, 3])
def test_a_segment_is_scored_where_it_starts_wherever_blocks_end(segments):
  """Two blocks of three steps: runs of six, of three, and of two steps, the second of which is in both blocks."""
  spec = SamplerSpec(6, 6, 3, temperature=0.8, cfg_scale=0.5)
  rollout = recorded()
  estimator = functools.partial(step_merged, segments=segments)
  found = jax.jit(lambda r: estimator(toy.DENOISER, PARAMS, r, spec, jax.random.key(0)))(rollout)
  expected = naive(rollout._replace(reveal_step=rollout.reveal_step // (6 // segments)), spec)
  np.testing.assert_allclose(found.logp, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize("samples", [1, 3, 9])
def test_sampled_steps_are_unbiased_for_all_of_them(samples):
  spec, each = dataclasses.replace(truth().spec, diffusion_steps=4, block_length=2), 3000
  some = np.repeat(np.asarray([5, 300, 411]), each)
  rollout = jax.tree.map(lambda x: x[some], paths()[0])
  steps = np.asarray(rollout.reveal_step) % 2 + 2 * (np.arange(4) // 2)  # blocks of two; some share a step
  rollout = rollout._replace(
    reveal_step=jnp.asarray(steps, jnp.int32), sample_id=jnp.arange(some.size, dtype=jnp.int32)
  )
  scores = score_paths(functools.partial(sampled_steps, samples=samples), rollout, spec)
  whole = truth().along(truth().params, np.asarray(rollout.completion), steps)
  np.testing.assert_allclose(scores.logp[scores.weight > 0], whole[scores.weight > 0], rtol=1e-5, atol=1e-5)
  assert (scores.logp[scores.weight == 0] == 0).all()
  sums = np.sum(scores.weight * scores.logp, axis=1, dtype=np.float64).reshape(3, each)
  error = sums.std(axis=1) / np.sqrt(each)
  expected = np.asarray(whole).sum(axis=1)[::each]
  assert (np.abs(sums.mean(axis=1) - expected) < 4.5 * error + 1e-4).all()
  taken = np.asarray([len(np.unique(row)) for row in steps])
  np.testing.assert_allclose(np.max(scores.weight, axis=1), taken / np.minimum(samples, taken), rtol=1e-6)


def test_left_to_right_is_the_path_of_blocks_of_one_token():
  spec = dataclasses.replace(truth().spec, block_length=1)
  steps = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), paths()[0].completion.shape)
  path = truth().along(truth().params, np.asarray(paths()[0].completion), np.asarray(steps))
  found = score_paths(left_to_right)
  np.testing.assert_allclose(found.logp, path, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(found.weight, 1.0)
  merged = score_paths(step_merged, paths()[0]._replace(reveal_step=steps), spec)
  np.testing.assert_allclose(found.logp, merged.logp, rtol=1e-6, atol=1e-6)


def test_a_share_of_the_tokens_is_that_of_the_least_recorded_probability():
  rollout = recorded()
  found = jax.jit(lambda r: left_to_right(toy.DENOISER, PARAMS, r, EXACT, jax.random.key(0), top_entropy=0.5))(rollout)
  whole = jax.jit(lambda r: left_to_right(toy.DENOISER, PARAMS, r, EXACT, jax.random.key(0)))(rollout)
  for row in range(8):
    mask = np.asarray(rollout.completion_mask[row])
    least = np.argsort(np.where(mask, rollout.reveal_logp[row], np.inf))[: int(np.ceil(mask.sum() / 2))]
    np.testing.assert_array_equal(np.flatnonzero(found.weight[row]), np.sort(least))
    np.testing.assert_allclose(found.logp[row, least], whole.logp[row, least], rtol=1e-5)


PATH_ESTIMATORS = {
  "step_merged": (functools.partial(step_merged, segments=6), {"draws": False, "shows_the_rest": True}),
  "sampled_steps": (functools.partial(sampled_steps, samples=2), {"shows_the_rest": True}),
  "left_to_right": (functools.partial(left_to_right, top_entropy=0.4), {"draws": False}),
}


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize("name", PATH_ESTIMATORS)
def test_rows_stand_alone(name):
  estimator, options = PATH_ESTIMATORS[name]
  check_rows_stand_alone(estimator, **options)


@pytest.mark.slow(reason="compiles five large programs")
def test_memory_does_not_grow_with_passes():
  few, many = (gradient_bytes(functools.partial(sampled_steps, samples=n)) for n in (2, 6))
  assert many <= 1.03 * few


@pytest.mark.parametrize(
  ("estimator", "change", "message"),
  [
    (step_merged, {"reveal_step": None}, "reveal_step=None: this estimator scores the states"),
    (functools.partial(sampled_steps, samples=1), {"reveal_step": None}, "reveal_step=None: this estimator scores"),
    (functools.partial(step_merged, segments=4), {}, "segments=4 does not divide the 6 denoising steps"),
    (functools.partial(step_merged, segments=0), {}, "segments=0 does not divide the 6 denoising steps"),
    (functools.partial(sampled_steps, samples=0), {}, "samples=0 must be at least 1"),
    (functools.partial(left_to_right, top_entropy=0.0), {}, "top_entropy=0.0 is a share of the tokens"),
  ],
)
def test_what_makes_no_sense_is_refused(estimator, change, message):
  rollout = recorded()._replace(**change)
  with pytest.raises(ValueError, match=message):
    estimator(toy.DENOISER, PARAMS, rollout, SamplerSpec(6, 6, 3), jax.random.key(0))


def test_the_share_needs_probabilities_of_draws():
  with pytest.raises(ValueError, match="depends on reveal_logp, which is 0 at temperature 0"):
    left_to_right(
      toy.DENOISER, PARAMS, recorded(), SamplerSpec(6, 6, 3, temperature=0.0), jax.random.key(0), top_entropy=0.5
    )
