import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.enumeration import LENGTH, Truth, draw_params
from d1jax.diffusion.corruption import EPSILON
from d1jax.diffusion.elbo import coupled, elbo, quadrature
from d1jax.diffusion.rollout import Rollout, SamplerSpec
from tests import toy
from tests.diffusion.invariance import PARAMS, check_rows_stand_alone, gradient_bytes, recorded

SPEC = SamplerSpec(LENGTH, LENGTH, LENGTH)
TRUTH = Truth(draw_params(0), SPEC)
EACH = 10000
"""Rows of each completion in a Monte Carlo mean."""


def many(truth: Truth, completions: np.ndarray, each: int) -> Rollout:
  """Each completion `each` times, every row under its own id."""
  rows = jnp.asarray(np.repeat(completions, each, axis=0))
  ids, every = jnp.arange(rows.shape[0], dtype=jnp.int32), jnp.ones(rows.shape, bool)
  prompt = jnp.broadcast_to(jnp.asarray(truth.prompt, jnp.int32), (rows.shape[0], len(truth.prompt)))
  zeros = jnp.zeros(rows.shape)
  return Rollout(ids, ids, prompt, jnp.ones(prompt.shape, bool), rows, every, zeros.astype(jnp.int32), zeros)


def means(estimator, truth: Truth, completions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The mean estimate of each completion's log p, and its standard error."""
  score = jax.jit(lambda r: estimator(truth.denoiser, truth.params, r, truth.spec, jax.random.key(1)))
  scores = score(many(truth, completions, EACH))
  sums = np.asarray(jnp.sum(scores.weight * scores.logp, axis=1), np.float64).reshape(-1, EACH)
  return sums.mean(axis=1), sums.std(axis=1) / np.sqrt(EACH)


@functools.cache
def hidden_sums() -> np.ndarray:
  """sum_{k hidden} log p(o_k | shown), summed over all subsets that hide n tokens: [n, completion]."""
  found = np.zeros((LENGTH + 1, len(TRUTH.completions)))
  for shown, logp in TRUTH.by_subset(TRUTH.params).items():
    found[LENGTH - sum(shown)] += np.asarray(logp, np.float64)[:, ~np.asarray(shown)].sum(axis=1)
  return found


def at_time(t: float) -> np.ndarray:
  """The same, expected, where each token is hidden with probability t."""
  chances = [t**n * (1 - t) ** (LENGTH - n) for n in range(LENGTH + 1)]
  return np.einsum("n,no->o", chances, hidden_sums())


def integral(of, low: float, high: float) -> np.ndarray:
  """The mean of `of` over times between the two."""
  nodes, weights = np.polynomial.legendre.leggauss(20)
  times = low + (high - low) * (nodes + 1) / 2
  return sum(w / 2 * of(t) for t, w in zip(times, weights, strict=True))


def bound(low: float, high: float) -> np.ndarray:
  return integral(lambda t: at_time(t) / t, low, high)


def test_the_enumerated_bound_is_the_integral_over_times_and_below_log_p():
  lower = TRUTH.lower_bound(TRUTH.params)
  np.testing.assert_allclose(bound(0, 1), lower, rtol=1e-5)
  gap = TRUTH.random_order(TRUTH.params) - lower
  assert gap.min() >= 0
  assert gap.mean() > 0.1, "tokens should depend on one another"
  assert jnp.sum(jnp.exp(TRUTH.random_order(TRUTH.params))) == pytest.approx(1, abs=1e-5)


ESTIMATORS = {
  "bernoulli": (functools.partial(elbo, samples=3), lambda: bound(EPSILON, 1)),
  "bernoulli, pairs": (functools.partial(elbo, samples=2, antithetic=True), lambda: bound(EPSILON, 1 - EPSILON)),
  "count": (functools.partial(elbo, samples=2, masking="count"), lambda: bound(0, 1)),
  "count, pairs": (functools.partial(elbo, samples=4, masking="count", antithetic=True), lambda: bound(0, 1)),
  "two nodes": (functools.partial(quadrature, nodes=2), lambda: bound(0, 1)),
  "one node": (functools.partial(quadrature, nodes=1), lambda: 2 * at_time(0.5)),
  "coupled": (functools.partial(coupled, samples=2), lambda: (4 * bound(0.2, 0.8) + at_time(1.0)) / 3),
}


@pytest.mark.few(1, reason="each case compiles programs of its own")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_mean_over_many_masks_is_what_the_mathematics_says(name):
  estimator, expected = ESTIMATORS[name]
  some = np.arange(0, 81, 9)
  mean, error = means(estimator, TRUTH, TRUTH.completions[some])
  assert (error < 0.02 * np.abs(mean)).all()
  np.testing.assert_array_less(np.abs(mean - expected()[some]), 4.5 * error)
  if name != "one node":  # too coarse for a polynomial of degree 3: no bound
    truth = np.asarray(TRUTH.random_order(TRUTH.params))[some]
    np.testing.assert_array_less(mean - 4.5 * error, truth)


def flat_weights(estimator) -> np.ndarray:
  """Each token's weight in its sequence's sum, found with a network that gives all tokens the same probability."""
  params = {**PARAMS, "head": jnp.zeros_like(PARAMS["head"])}
  rollout = toy.rollout(8)._replace(completion_mask=jnp.ones((8, 6), bool))
  scores = jax.jit(lambda r: estimator(toy.DENOISER, params, r, toy.SPEC, jax.random.key(2)))(rollout)
  return np.asarray(scores.weight * scores.logp, np.float64) / -np.log(toy.VOCAB - len(toy.FORBIDDEN))


def test_coupled_scores_each_token_once_a_pair():
  weights = 2 * flat_weights(functools.partial(coupled, samples=1)) - 1  # less the pass that hides everything
  for row in weights:
    first, second = row.min(), row.max()
    np.testing.assert_allclose(np.minimum(np.abs(row - first), np.abs(row - second)), 0, atol=1e-5)
    if second - first > 1e-5:  # m and 1 - m: nothing was scored twice or never
      assert 1 / first + 1 / second == pytest.approx(1, abs=1e-5)
    assert first > 1.25 - 1e-5
    assert second < 5 + 1e-5


@pytest.mark.parametrize("masking", ["bernoulli", "count"])
def test_antithetic_pairs_score_each_token_once(masking):
  weights = 2 * flat_weights(functools.partial(elbo, samples=2, antithetic=True, masking=masking))
  assert (weights > 0).all()
  for row, values in zip(weights, (np.unique(np.round(row, 4)) for row in weights), strict=True):
    assert len(values) <= 2, row
    if masking == "count":  # (n + 1) / l and (n + 1) / (n - l)
      tokens = [round(7 / value) for value in values]
      assert sum(tokens) == (6 if len(tokens) == 2 else tokens[0])


FAST = [
  functools.partial(coupled, samples=2, p_mask_prompt=0.3),
  functools.partial(elbo, samples=2, masking="count", antithetic=True, p_mask_prompt=0.3, tile=5),
  functools.partial(quadrature, nodes=3, p_mask_prompt=0.3),
]


@pytest.mark.slow(reason="compiles programs of its own")
@pytest.mark.parametrize("estimator", FAST, ids=["coupled", "elbo", "quadrature"])
def test_rows_stand_alone(estimator):
  check_rows_stand_alone(estimator)


def test_a_tile_of_the_vocabulary_changes_nothing():
  score = lambda tile: elbo(toy.DENOISER, PARAMS, recorded(), toy.SPEC, jax.random.key(5), samples=1, tile=tile)
  whole, tiled = (jax.jit(score, static_argnums=0)(tile) for tile in (None, 5))
  np.testing.assert_allclose(whole.logp, tiled.logp, rtol=1e-5, atol=1e-5)


@pytest.mark.slow(reason="compiles large programs")
def test_memory_does_not_grow_with_samples():
  few, many_samples = (gradient_bytes(functools.partial(elbo, samples=n)) for n in (2, 16))
  assert many_samples <= 1.03 * few
  few, many_samples = (gradient_bytes(functools.partial(coupled, samples=n)) for n in (1, 8))
  assert many_samples <= 1.03 * few


@pytest.mark.parametrize(
  ("estimator", "message"),
  [
    (functools.partial(elbo, samples=0), "samples=0 must be at least 1"),
    (functools.partial(coupled, samples=0), "samples=0 must be at least 1"),
    (functools.partial(quadrature, nodes=0), "nodes=0 must be at least 1"),
    (functools.partial(elbo, samples=3, antithetic=True), "samples=3 is odd, .* use 4"),
    (functools.partial(elbo, samples=2, masking="half"), "masking='half' is unknown; known: bernoulli, count"),
  ],
)
def test_options_that_make_no_sense_are_refused(estimator, message):
  with pytest.raises(ValueError, match=message):
    estimator(toy.DENOISER, PARAMS, toy.rollout(), toy.SPEC, jax.random.key(0))
