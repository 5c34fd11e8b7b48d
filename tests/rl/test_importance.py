import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.rl.importance import effective_sample_size, truncated_importance, weight_sums

RNG = np.random.default_rng(4)
TRAIN, SAMPLE = (jnp.asarray(RNG.normal(-2, 1, (5, 7)), jnp.float32) for _ in range(2))
MASK = jnp.asarray(np.arange(7)[None] < np.asarray([[7], [3], [1], [5], [6]]))


@pytest.mark.parametrize("cap", [0.5, 2.0, 100.0])
def test_weights_are_the_naive_formula(cap):
  weights = truncated_importance(TRAIN, SAMPLE, MASK, cap)
  total = squares = count = 0.0
  for b in range(5):
    for i in range(7):
      expected = min(cap, math.exp(float(TRAIN[b, i]) - float(SAMPLE[b, i]))) if MASK[b, i] else 0.0
      assert float(weights[b, i]) == pytest.approx(expected, rel=1e-5)
      total, squares, count = total + expected, squares + expected**2, count + bool(MASK[b, i])
  share = effective_sample_size(weight_sums(weights, MASK))
  assert float(share) == pytest.approx(total**2 / squares / count, rel=1e-5)
  assert 1 / count <= share <= 1


def test_the_same_distribution_weighs_one():
  weights = truncated_importance(TRAIN, TRAIN, MASK, 1.0)
  np.testing.assert_array_equal(weights, MASK.astype(jnp.float32))
  assert float(effective_sample_size(weight_sums(weights, MASK))) == 1


def test_weights_are_constants():
  total = lambda train, sample: jnp.sum(truncated_importance(train, sample, MASK, 2.0))
  for gradient in jax.grad(total, argnums=(0, 1))(TRAIN, SAMPLE):
    np.testing.assert_array_equal(gradient, 0)


def test_what_is_masked_out_may_be_anything():
  for rubbish in (jnp.nan, jnp.inf, -jnp.inf):
    spoilt = [jnp.where(MASK, x, rubbish) for x in (TRAIN, SAMPLE)]
    np.testing.assert_array_equal(
      truncated_importance(*spoilt, MASK, 2.0), truncated_importance(TRAIN, SAMPLE, MASK, 2.0)
    )


def test_an_impossible_token_weighs_nothing_and_a_surprising_one_the_cap():
  train, sample = jnp.asarray([[-jnp.inf, 0.0]]), jnp.asarray([[-1.0, -200.0]])
  np.testing.assert_array_equal(truncated_importance(train, sample, jnp.ones((1, 2), bool), 3.0), [[0, 3]])


def test_weighted_means_of_other_draws_are_means_of_the_policy():
  """E_q[min(c, p/q) f] by enumeration: E_p[f] under a high cap, sum min(p, c q) f under a low one."""
  p, q = (RNG.dirichlet(np.ones(9)) for _ in range(2))
  f, every = RNG.normal(size=9), jnp.ones((1, 9), bool)
  log = lambda x: jnp.asarray(np.log(x)[None], jnp.float32)
  for cap in (1e6, 1.5):
    weights = np.asarray(truncated_importance(log(p), log(q), every, cap), np.float64)[0]
    np.testing.assert_allclose((q * weights * f).sum(), (np.minimum(p, cap * q) * f).sum(), rtol=1e-5)
  assert abs((q * f).sum() - (p * f).sum()) > 0.05


def test_sums_of_micro_batches_add_up():
  weights = truncated_importance(TRAIN, SAMPLE, MASK, 2.0)
  parts = [weight_sums(weights[rows], MASK[rows]) for rows in (slice(0, 2), slice(2, 5))]
  np.testing.assert_allclose(parts[0] + parts[1], weight_sums(weights, MASK), rtol=1e-6)


def test_no_weight_is_no_sample():
  assert float(effective_sample_size(weight_sums(jnp.zeros((2, 3)), jnp.ones((2, 3), bool)))) == 0
  # One that outweighs all others.
  alone = jnp.asarray([1.0, 0.0, 0.0, 0.0])
  assert float(effective_sample_size(weight_sums(alone, jnp.ones(4, bool)))) == 0.25
