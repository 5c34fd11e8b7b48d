import functools
import itertools

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
TRUTH, ONE_BLOCK = (Truth(draw_params(0), SamplerSpec(LENGTH, LENGTH, block)) for block in (BLOCK, LENGTH))
SOME = np.arange(0, 81, 9)
"""Completions of the 81."""


def masks(block_length: int) -> list[tuple[float, tuple[bool, ...]]]:
  """Every mask that may be drawn, and its probability: a block, a count of its tokens, which ones; all later ones."""
  found, blocks = [], LENGTH // block_length
  for block in range(blocks):
    inside = range(block * block_length, (block + 1) * block_length)
    for count in range(1, block_length + 1):
      subsets = list(itertools.combinations(inside, count))
      chance = 1 / (blocks * block_length * len(subsets))
      found += [(chance, tuple(i in hide or i > inside[-1] for i in range(LENGTH))) for hide in subsets]
  return found


def of_masks(truth: Truth, each) -> np.ndarray:
  """The mean of `each(log p [O C], mask [C])` over the masks."""
  by_subset = {shown: np.asarray(logp, np.float64) for shown, logp in truth.by_subset(truth.params).items()}
  found = masks(truth.spec.block_length)
  assert sum(chance for chance, _ in found) == pytest.approx(1)
  return sum(c * each(by_subset[tuple(not x for x in mask)], np.asarray(mask)) for c, mask in found)


def exact_lower(truth: Truth) -> np.ndarray:
  """n times the mean over masks of the mean over what each masks."""
  return LENGTH * of_masks(truth, lambda logp, mask: logp[:, mask].mean(axis=1))


def exact_upper(truth: Truth, exponent: float) -> np.ndarray:
  """sum_k (1 / b) log(E w p_k^b / E w), w = n / m where a mask of m tokens hides token k, else 0."""
  weighed = of_masks(truth, lambda logp, mask: np.exp(exponent * logp) * mask / mask.sum())
  share = of_masks(truth, lambda logp, mask: np.ones_like(logp) * mask / mask.sum())
  return np.sum(np.log(weighed / share), axis=1) / exponent


@pytest.mark.parametrize("truth", [TRUTH, ONE_BLOCK], ids=["blocks", "one block"])
def test_lower_is_the_mean_over_the_masks(truth):
  mean, error = means(functools.partial(sandwich, samples=3, exponent=1.5), truth, truth.completions[SOME])
  np.testing.assert_array_less(np.abs(mean - exact_lower(truth)[SOME]), 4.5 * error)


def test_with_one_block_it_is_the_bound_of_log_p():
  np.testing.assert_allclose(exact_lower(ONE_BLOCK), ONE_BLOCK.lower_bound(ONE_BLOCK.params), rtol=1e-5)
  truth = np.asarray(ONE_BLOCK.random_order(ONE_BLOCK.params))
  np.testing.assert_array_less(truth - 1e-5, exact_upper(ONE_BLOCK, float(LENGTH)))
  np.testing.assert_array_less(exact_lower(ONE_BLOCK) - 1e-5, truth)


@pytest.mark.parametrize(("truth", "exponent"), [(TRUTH, 1.5), (ONE_BLOCK, 4.0)], ids=["blocks", "one block"])
def test_upper_is_the_mean_of_powers_over_the_masks(truth, exponent):
  rollout = many(truth, truth.completions[SOME], 8)
  score = jax.jit(functools.partial(sandwich, truth.denoiser, spec=truth.spec, samples=1000, exponent=exponent))
  scores = score(truth.params, rollout, key=jax.random.key(4))
  assert (np.asarray(scores.upper) >= np.asarray(scores.logp) - 1e-5).all()
  np.testing.assert_array_equal(scores.upper_weight, 1)  # every token is seen by one of so many
  each = np.asarray(jnp.sum(scores.upper, axis=1), np.float64).reshape(-1, 8)
  interval = 5 * each.std(axis=1, ddof=1) / np.sqrt(8) + 1e-3
  np.testing.assert_array_less(np.abs(each.mean(axis=1) - exact_upper(truth, exponent)[SOME]), interval)


def test_a_mask_hides_a_part_of_one_block_and_all_later_ones():
  """And what it hides weighs n over its number, in both bounds: with one sample they are alike."""
  rollout = toy.rollout(64)
  spec = SamplerSpec(6, 6, 3)
  score = functools.partial(sandwich, toy.DENOISER, PARAMS, spec=spec, key=jax.random.key(3), samples=1, exponent=1.5)
  scores = jax.jit(score)(rollout)
  met = set()
  for row, n in zip(np.asarray(scores.weight), np.asarray(rollout.completion_mask).sum(axis=1).tolist(), strict=True):
    hidden = np.flatnonzero(row)
    first = hidden[0] // 3 * 3  # of the drawn block
    count = sum(hidden < first + 3)
    assert set(range(first + 3, n)) <= set(hidden.tolist())
    assert hidden.max() < n
    np.testing.assert_allclose(row[hidden], n / len(hidden), rtol=1e-6)
    met.add((n, int(first), int(count)))
  assert {(6, first, count) for first in (0, 3) for count in (1, 2, 3)} <= met
  np.testing.assert_array_equal(scores.upper_weight, scores.weight)
  np.testing.assert_allclose(scores.upper, scores.logp, rtol=1e-4, atol=1e-5)


def test_gradients_are_finite_where_a_token_has_no_probability():
  far = {**PARAMS, "head": 300 * PARAMS["head"]}
  total = lambda p: jnp.sum(
    sandwich(toy.DENOISER, p, toy.rollout(), toy.SPEC, jax.random.key(0), samples=2, exponent=2.0).upper
  )
  value, gradient = jax.jit(jax.value_and_grad(total))(far)
  assert jnp.isfinite(value)
  assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))


@pytest.mark.slow(reason="compiles programs of its own")
def test_rows_stand_alone():
  check_rows_stand_alone(functools.partial(sandwich, samples=4, exponent=1.5, p_mask_prompt=0.3))


@pytest.mark.slow(reason="compiles gradients of many samples")
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
