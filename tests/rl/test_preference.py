"""The preference score and its loss against closed forms, a naive loop, enumeration, and themselves on other meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import preference as benchmark
from benchmarks.enumeration import LENGTH, Truth, draw_params
from d1jax import keys
from d1jax.data.pairs import PairBatch
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.parallel.mesh import RULES, make_mesh, sharding
from d1jax.rl.preference import Preference, as_rollout, bounds, preference_score
from d1jax.state import Frozen, create
from d1jax.training.dpo import dpo_step
from tests import toy
from tests.diffusion import causal

KEY = jax.random.key(7)
TRUTH = Truth(draw_params(0), SamplerSpec(LENGTH, LENGTH, LENGTH))


def pairs(count: int = 4, width: int = 6) -> PairBatch:
  """Ragged prompts and answers of the toy."""
  rng = np.random.default_rng(2)
  prompt, valid = toy.prompts([1 + (2 * i) % 5 for i in range(count)], 5)
  answers = jnp.asarray(rng.integers(3, toy.MASK, (count, 2, width)), jnp.int32)
  length = jnp.asarray(rng.integers(1, width + 1, (count, 2)), jnp.int32)
  return PairBatch(10 + jnp.arange(count, dtype=jnp.int32), prompt, valid, answers, length)


def naive(params, batch: PairBatch, samples: int) -> np.ndarray:
  """`bounds` in float64, one answer and one mask at a time, from the uniforms that its draws give."""
  ids = (2 * batch.sample_id[:, None] + jnp.arange(2)[None]).reshape(-1)
  places = [divmod(i, 2) for i in range(len(ids))]
  masked, tokens, length = [], np.full((samples, len(ids), 6), toy.MASK), np.asarray(batch.length)
  answers = np.asarray(batch.answers)
  for index in range(samples):
    own = keys.sample_keys(jax.random.fold_in(KEY, index), ids)
    time, order = (np.asarray(keys.uniforms(keys.fold(own, stream), 6)) for stream in (0, 1))
    for i, place in enumerate(places):
      masked.append(np.argsort(order[i, : length[place]], kind="stable")[: 1 + int(time[i, 0] * length[place])])
      tokens[index, i, : length[place]] = answers[place][: length[place]]
      tokens[index, i, masked[-1]] = toy.MASK
  repeat = lambda x: jnp.tile(jnp.repeat(x, 2, axis=0), (samples, 1))
  canvas = jnp.concatenate([repeat(batch.prompt), jnp.asarray(tokens.reshape(-1, 6), jnp.int32)], axis=1)
  valid = jnp.concatenate([repeat(batch.prompt_valid), jnp.ones((len(canvas), 6), bool)], axis=1)
  hidden = np.asarray(toy.encode(params, canvas, valid), np.float64)[:, 5:]
  found = np.zeros(length.shape)
  for row, hides in enumerate(masked):
    place = places[row % len(ids)]
    logp = toy.log_softmax(toy.allowed(hidden[row] @ np.asarray(params["head"], np.float64)))
    found[place] += length[place] / len(hides) * logp[hides, answers[place][hides]].sum() / samples
  return found


@functools.cache
def step(samples: int, accumulation: int = 1, **options):
  """A compiled step of the toy."""
  loss = Preference(**options)
  return jax.jit(
    functools.partial(
      dpo_step,
      denoiser=toy.DENOISER,
      optimizer=optax.sgd(1.0),
      loss=loss,
      samples=samples,
      accumulation=accumulation,
    )
  )


def state(params):
  return create(lambda key: params, optax.sgd(1.0), KEY, KEY)


def test_the_bounds_are_those_of_a_naive_loop():
  batch, params = pairs(), toy.params()
  found = jax.jit(functools.partial(bounds, toy.DENOISER, samples=3))(params, batch, KEY)
  np.testing.assert_allclose(found, naive(params, batch, 3), rtol=2e-5)
  longer = batch._replace(answers=jnp.pad(batch.answers, ((0, 0), (0, 0), (0, 2)), constant_values=5))
  np.testing.assert_array_equal(as_rollout(toy.DENOISER, longer).completion_mask.sum(axis=1), batch.length.reshape(-1))


@pytest.mark.parametrize(("beta", "sft_weight"), [(0.2, 0.0), (1.5, 0.5)])
def test_the_loss_is_its_closed_form(beta, sft_weight):
  rng = np.random.default_rng(0)
  policy, reference = rng.normal(size=(2, 5, 2)).astype(np.float32) * 3
  length, weight = rng.integers(1, 9, (5, 2)), np.full(5, 0.2, np.float32)
  loss, figures = Preference(beta, sft_weight)(*map(jnp.asarray, (policy, reference, length, weight)))
  expected, right = 0.0, 0.0
  for (w, r), (w_ref, r_ref), (n, _) in zip(policy, reference, length, strict=True):
    score = (w - w_ref) - (r - r_ref)
    expected += (np.log1p(np.exp(-beta * score)) - sft_weight * w / n) / 5
    right += (score > 0) / 5
  assert float(loss) == pytest.approx(expected, rel=1e-5)
  assert float(figures["accuracy"]) == pytest.approx(right)
  assert float(figures["margin"]) == pytest.approx(
    beta * float(figures["chosen_gain"] - figures["rejected_gain"]), abs=1e-5
  )


def test_the_start_has_the_score_0_and_the_loss_log_2():
  params = toy.params()
  _, figures = step(1)(state(params), Frozen({}, params), pairs(8))
  assert figures["loss"] == np.float32(np.log(2))
  assert [float(figures[name]) for name in ("accuracy", "margin", "chosen_gain", "rejected_gain")] == [0.5, 0, 0, 0]


@pytest.mark.slow(reason="compiles three updates")
def test_a_step_follows_the_gradient_whatever_the_micro_batches():
  """Against finite differences of the naive loss along the step itself; sgd with the rate 1 is minus the gradient."""
  params, reference, batch = toy.params(), toy.params(1), pairs()
  options = {"beta": 0.3, "sft_weight": 0.1}
  new, figures = step(2, **options)(state(params), Frozen({}, reference), batch)
  parts, again = step(2, 2, **options)(state(params), Frozen({}, reference), batch)
  key = keys.purpose_key(KEY, keys.Purpose.PREFERENCE, 0)
  weight = jnp.full(4, 0.25)

  def loss(params):
    score = lambda params: bounds(toy.DENOISER, params, batch, key, samples=2)
    return Preference(**options)(score(params), score(reference), batch.length, weight)[0]

  value = jax.jit(loss)
  move = jax.tree.map(lambda a, b: a - b, params, new.trainable)
  squared = sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(move))
  h = 1e-2 / np.sqrt(squared)
  ahead, behind = (value(jax.tree.map(lambda p, m, s=s: p + s * h * m, params, move)) for s in (1, -1))
  assert float(ahead - behind) / (2 * h) == pytest.approx(squared, rel=2e-3)
  assert float(figures["grad_norm"]) == pytest.approx(np.sqrt(squared), rel=1e-5)
  assert float(figures["loss"]) == pytest.approx(float(value(params)), rel=1e-5)
  for a, b in zip(jax.tree.leaves((parts.trainable, again)), jax.tree.leaves((new.trainable, figures)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_step_is_the_same_on_several_devices():
  params, batch, frozen = toy.params(), pairs(8), Frozen({}, toy.params(1))
  one = step(1)(state(params), frozen, batch)
  mesh = make_mesh({"data": 4, "fsdp": 2, "tensor": 1}, jax.devices())
  other = step(1)(
    jax.device_put(state(params), sharding(mesh, RULES)),
    jax.device_put(frozen, sharding(mesh, RULES)),
    jax.device_put(batch, sharding(mesh, RULES, "batch")),
  )
  leaves = lambda found: jax.tree.leaves((found[0].trainable, found[1]))
  for a, b in zip(leaves(one), leaves(other), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def toys():
  """A policy near its reference, and what each mask makes of the bounds of both."""
  policy = benchmark.moved(TRUTH.params, 0, 0.1)
  return policy, [benchmark.estimates(TRUTH, params) for params in (policy, TRUTH.params)]


def test_shared_masks_and_a_time_a_mask_lower_the_variance_of_the_score():
  """Enumerated over all masks of all pairs, as the benchmark prints it."""
  _, values = toys()
  found = {arm: benchmark.exact(*values, arm, 4).mean() for arm in benchmark.ARMS}
  assert found["shared"] < 0.1 * found["apart"] < 0.1 * found["one time"]
  assert benchmark.exact(*values, "shared", 8).mean() == pytest.approx(found["shared"] / 2)


@pytest.mark.slow(reason="draws many masks")
def test_the_score_has_the_mean_and_the_variance_that_are_enumerated():
  policy, values = toys()
  true = benchmark.true_scores(TRUTH, policy)
  for arm, scores in benchmark.measured(TRUTH, policy, 2, keys=200).items():
    exact = benchmark.exact(*values, arm, 2)
    assert scores.var(axis=0).mean() == pytest.approx(exact.mean(), rel=0.1)
    assert np.abs((scores.mean(axis=0) - true) / np.sqrt(exact / 200)).max() < 5, "unbiased"


@pytest.mark.slow(reason="compiles networks of its own")
@pytest.mark.parametrize("block", [None, 1, 4])
def test_a_score_of_blocks_is_the_mean_over_their_masks(block):
  """With blocks of one token every mask gives the exact log p; elsewhere many masks agree with many others."""
  denoiser, params = causal.denoiser(block), causal.params()
  rng = np.random.default_rng(1)
  prompt, valid = toy.prompts([3, 5], 5)
  answers, length = rng.integers(4, 17, (2, 2, 6)), np.asarray([[6, 3], [4, 5]])
  batch = PairBatch(*map(jnp.asarray, (np.arange(2, dtype=np.int32), prompt, valid, answers.astype(np.int32), length)))
  score = jax.jit(functools.partial(bounds, denoiser, samples=64))
  first, second = (np.asarray(score(params, batch, jax.random.key(i))) for i in range(2))
  assert (first < 0).all()
  np.testing.assert_allclose(first, second, rtol=0.5 if block != 1 else 0.3)
  np.testing.assert_array_equal(preference_score(jnp.asarray(first), jnp.asarray(first)), 0)
  behind = np.where(np.arange(6) < length[..., None], answers, 9)
  np.testing.assert_allclose(
    score(params, batch._replace(answers=jnp.asarray(behind, jnp.int32)), KEY), score(params, batch, KEY), rtol=1e-6
  )


@pytest.mark.parametrize("options", [{"beta": 0}, {"beta": float("nan")}, {"sft_weight": -1.0}])
def test_options_without_a_meaning_are_refused(options):
  with pytest.raises(ValueError, match=f"{next(iter(options))}=.* must"):
    Preference(**options)
