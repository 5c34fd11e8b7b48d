import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.enumeration import LENGTH, Truth, draw_params
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.diffusion.sandwich import sandwich
from tests import toy
from tests.diffusion.invariance import PARAMS, check_rows_stand_alone, gradient_bytes
from tests.diffusion.test_elbo import many, means

BLOCK = 2
TRUTH = Truth(draw_params(0), SamplerSpec(LENGTH, LENGTH, BLOCK))


def exact_upper(exponent: float) -> np.ndarray:
  """sum_k (1 / b) log E p_k^b over the block-wise orders."""
  by_subset = {shown: np.asarray(logp, np.float64) for shown, logp in TRUTH.by_subset(TRUTH.params).items()}
  total = np.zeros(len(TRUTH.completions))
  orders = TRUTH.orders(BLOCK)
  for i in range(LENGTH):
    powers = [np.exp(exponent * by_subset[tuple(j in o[: o.index(i)] for j in range(LENGTH))][:, i]) for o in orders]
    total += np.log(np.mean(powers, axis=0)) / exponent
  return total


def test_lower_is_the_bound_under_block_wise_order():
  some = np.arange(0, 81, 9)
  mean, error = means(functools.partial(sandwich, samples=3, exponent=1.5), TRUTH, TRUTH.completions[some])
  np.testing.assert_array_less(np.abs(mean - TRUTH.lower_bound(TRUTH.params, BLOCK)[some]), 4.5 * error)
  np.testing.assert_array_less(mean - 4.5 * error, TRUTH.random_order(TRUTH.params, BLOCK)[some])


@pytest.mark.parametrize("exponent", [1.5, 4.0])
def test_upper_is_what_the_mathematics_says_and_above_log_p_at_large_exponents(exponent):
  some = np.arange(0, 81, 9)
  rollout = many(TRUTH, TRUTH.completions[some], 8)
  score = jax.jit(functools.partial(sandwich, TRUTH.denoiser, spec=TRUTH.spec, samples=1000, exponent=exponent))
  scores = score(TRUTH.params, rollout, key=jax.random.key(4))
  assert (np.asarray(scores.upper) >= np.asarray(scores.logp) - 1e-5).all()
  each = np.asarray(jnp.sum(scores.upper, axis=1), np.float64).reshape(-1, 8)
  interval = 5 * each.std(axis=1, ddof=1) / np.sqrt(8) + 1e-3
  np.testing.assert_array_less(np.abs(each.mean(axis=1) - exact_upper(exponent)[some]), interval)
  truth = np.asarray(TRUTH.random_order(TRUTH.params, BLOCK))
  if exponent >= LENGTH:
    np.testing.assert_array_less(truth - 1e-5, exact_upper(exponent))
    np.testing.assert_array_less(truth[some] - interval, each.mean(axis=1))


def test_only_the_chosen_block_is_scored_and_upper_is_never_below_lower():
  rollout = toy.rollout(8)
  spec = SamplerSpec(6, 6, 2)
  score = functools.partial(sandwich, toy.DENOISER, PARAMS, spec=spec, key=jax.random.key(3), samples=1, exponent=1.5)
  scores = jax.jit(score)(rollout)
  weight, ends = np.asarray(scores.weight), np.asarray(rollout.completion_mask).sum(axis=1)
  assert (weight > 0).any()
  for row, end in zip(weight, ends, strict=True):
    blocks = {i // 2 for i in np.flatnonzero(row)}
    assert len(blocks) <= 1
    assert len(set(row[row > 0])) <= 1
    assert row.max() == 0 or row.max() > -(-end // 2) - 1e-5
  np.testing.assert_allclose(scores.upper, scores.logp, rtol=1e-4, atol=1e-5)  # one sample: no spread


def test_gradients_are_finite_where_a_token_has_no_probability():
  far = {**PARAMS, "head": 300 * PARAMS["head"]}
  total = lambda p: jnp.sum(
    sandwich(toy.DENOISER, p, toy.rollout(), toy.SPEC, jax.random.key(0), samples=2, exponent=2.0).upper
  )
  value, gradient = jax.jit(jax.value_and_grad(total))(far)
  assert jnp.isfinite(value)
  assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))


def test_rows_stand_alone():
  check_rows_stand_alone(functools.partial(sandwich, samples=4, exponent=1.5, p_mask_prompt=0.3))


def test_memory_does_not_grow_with_samples():
  few, many_samples = (gradient_bytes(functools.partial(sandwich, samples=n, exponent=1.5)) for n in (2, 16))
  assert many_samples <= 1.03 * few


@pytest.mark.parametrize(
  ("options", "message"),
  [({"samples": 0, "exponent": 1.0}, "samples=0 must be"), ({"samples": 1, "exponent": 0.0}, "exponent=0.0 must be")],
)
def test_options_that_make_no_sense_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    sandwich(toy.DENOISER, PARAMS, toy.rollout(), toy.SPEC, jax.random.key(0), **options)
