import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.diffusion.corruption import EPSILON, NoiseSpec, corrupt, mask_prompt

KEY = jax.random.key(5)
MASK = 99


@pytest.fixture(scope="module")
def many():
  completion = jnp.asarray(np.random.default_rng(0).integers(0, 50, (4000, 40)), jnp.int32)
  return completion, corrupt(KEY, jnp.arange(4000, dtype=jnp.int32), completion, MASK)


def test_masked_tokens_become_masks_and_the_others_stay(many):
  completion, noisy = many
  np.testing.assert_array_equal(noisy.tokens, np.where(noisy.masked, MASK, completion))


def test_times_are_uniform_from_epsilon_to_one(many):
  time = np.asarray(many[1].time)
  assert EPSILON == 1e-3
  assert time.min() >= EPSILON
  assert time.max() <= 1
  assert time.min() < EPSILON + 2e-3
  histogram = np.histogram(time, bins=10, range=(EPSILON, 1))[0]
  assert np.abs(histogram - 400).max() < 4 * np.sqrt(400)


def test_tokens_are_masked_with_probability_t_independently(many):
  _, noisy = many
  masked, time = np.asarray(noisy.masked), np.asarray(noisy.time)[:, None]
  residual = (masked - time) / np.sqrt(np.maximum(time * (1 - time), 1e-6))
  inside = residual[(time[:, 0] > 0.02) & (time[:, 0] < 0.98)]
  assert abs(inside.mean()) < 4 / np.sqrt(inside.size)
  # Given t, neighbours do not know of each other; nor do rows with their t shuffled.
  assert abs((inside[:, 1:] * inside[:, :-1]).mean()) < 4 / np.sqrt(inside.size)
  assert abs((inside[1:] * inside[:-1]).mean()) < 4 / np.sqrt(inside.size)
  for lower in np.arange(0, 1, 0.25):
    rows = (time[:, 0] >= lower) & (time[:, 0] < lower + 0.25)
    assert abs(masked[rows].mean() - time[rows].mean()) < 0.01


def test_keyed_by_sample_id_and_not_by_batch_position(many):
  completion, noisy = many
  ids = jnp.asarray([77, 3, 1999], jnp.int32)
  few = corrupt(KEY, ids, completion[ids], MASK)
  for a, b in zip(few, noisy, strict=True):
    np.testing.assert_array_equal(a, b[ids])


def test_another_key_another_mask(many):
  completion, noisy = many
  other = corrupt(jax.random.key(6), jnp.arange(4000, dtype=jnp.int32), completion, MASK)
  assert (np.asarray(other.time) != np.asarray(noisy.time)).mean() > 0.99
  assert (np.asarray(other.masked) != np.asarray(noisy.masked)).mean() > 0.2


@pytest.mark.parametrize("whole", [True, False])
def test_a_complement_masks_what_the_first_copy_does_not(many, whole):
  """And of what is not learned, nobody sees anything."""
  ids, learned = (
    jnp.arange(40, dtype=jnp.int32),
    None if whole else jnp.arange(40)[None, :] < jnp.arange(1, 41)[:, None],
  )
  completion, spec = many[0][ids], NoiseSpec((0.3, 0.8), "flat", complementary=True)
  first, second = (
    corrupt(KEY, ids, completion, MASK, spec, learned=learned, complement=jnp.full(40, second))
    for second in (False, True)
  )
  keep = np.ones(completion.shape, bool) if whole else np.asarray(learned)
  np.testing.assert_array_equal(first.masked ^ second.masked, keep)
  np.testing.assert_allclose(first.time + second.time, 1, rtol=1e-6)
  assert first.time.min() >= 0.3
  assert first.time.max() <= 0.8
  for noisy in (first, second):
    np.testing.assert_array_equal(noisy.tokens, np.where(noisy.masked | ~keep, MASK, completion))
  assert whole or first.masked.any(axis=1).all()


WRONG = [
  (dict(mask_ratio=(0.0, 1.0)), r"mask_ratio=\(0.0, 1.0\) must be two numbers"),
  (dict(mask_ratio=(0.8, 0.3)), "0 < least <= most <= 1"),
  (dict(mask_ratio=(0.5,)), "must be two numbers"),
  (dict(weighting="both"), "weighting='both' is unknown; known: inverse, flat"),
  (dict(complementary=True), r"no bound for mask_ratio=\(0.001, 1.0\): use mask_ratio=\(0.001, 0.999\), or weighting"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_noise_that_does_not_fit_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    NoiseSpec(**options)
  NoiseSpec(mask_ratio=(0.001, 0.999), complementary=True)  # the remedy
  NoiseSpec(weighting="flat", complementary=True)


def masked_prompt(prompt, valid, probability, ids=None, key=KEY):
  ids = jnp.arange(prompt.shape[0], dtype=jnp.int32) if ids is None else ids
  return np.asarray(mask_prompt(key, ids, prompt, valid, probability, MASK))


@pytest.mark.parametrize("probability", [0.0, 0.15, 0.5, 1.0])
def test_prompt_masking_rate(probability):
  prompt = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2000, 30)), jnp.int32)
  found = masked_prompt(prompt, jnp.ones(prompt.shape, bool), probability)
  hit = found == MASK
  np.testing.assert_array_equal(found[~hit], np.asarray(prompt)[~hit])
  assert abs(hit.mean() - probability) <= 4 * np.sqrt(probability * (1 - probability) / hit.size)


@pytest.mark.parametrize("width", [12, 13, 40])
def test_padding_is_never_masked_and_its_width_changes_nothing(width):
  rng = np.random.default_rng(1)
  lengths = np.arange(1, 13)
  narrow, wide = np.full((12, 12), 7, np.int32), np.full((12, width), 7, np.int32)
  for row, n in enumerate(lengths):
    narrow[row, 12 - n :] = wide[row, width - n :] = rng.integers(10, 50, n)
  inside = np.arange(12)[None] >= 12 - lengths[:, None]
  base = masked_prompt(jnp.asarray(narrow), jnp.asarray(inside), 0.5)
  padded = masked_prompt(jnp.asarray(wide), jnp.asarray(np.pad(inside, ((0, 0), (width - 12, 0)))), 0.5)
  np.testing.assert_array_equal(padded[:, width - 12 :][inside], base[inside])
  assert (base[~inside] == 7).all()
  assert (padded[:, : width - 12] == 7).all()
  assert 0.2 < (base[inside] == MASK).mean() < 0.8


def test_prompt_masks_are_keyed_by_sample_id():
  prompt = jnp.zeros((6, 20), jnp.int32)
  valid = jnp.ones(prompt.shape, bool)
  base = masked_prompt(prompt, valid, 0.5)
  order = jnp.asarray([4, 0, 5, 1], jnp.int32)
  np.testing.assert_array_equal(masked_prompt(prompt[:4], valid[:4], 0.5, order), base[order])
  assert len({row.tobytes() for row in base}) == 6
  assert (masked_prompt(prompt, valid, 0.5, key=jax.random.key(0)) != base).any()
