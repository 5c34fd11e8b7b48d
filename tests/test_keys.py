from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax import keys

KEY = jax.random.key(7)


def data(key: jax.Array) -> np.ndarray:
  return np.asarray(jax.random.key_data(key))


def test_a_seed_names_its_generator():
  expected = data(jax.random.key(7, impl="threefry2x32"))
  for implementation in ("threefry2x32", "rbg", "unsafe_rbg"):
    with jax.default_prng_impl(implementation):
      key = keys.seeded(7)
      assert str(jax.random.key_impl(key)) == "threefry2x32"
      np.testing.assert_array_equal(data(key), expected)
      np.testing.assert_array_equal(
        data(keys.purpose_key(key, keys.Purpose.ROLLOUT)), data(keys.purpose_key(KEY, keys.Purpose.ROLLOUT))
      )


@pytest.mark.parametrize("seed", [2**32, 2**40, 2**70, -(2**31) - 1])
def test_a_seed_that_would_lose_bits_is_refused(seed):
  with pytest.raises(ValueError, match=f"the seed {seed} has more than 32 bits"):
    keys.seeded(seed)


@pytest.mark.parametrize("seed", [0, 5, 2**31, 2**32 - 1, -1])
def test_other_seeds_are_jaxs(seed):
  np.testing.assert_array_equal(data(keys.seeded(seed)), data(jax.random.key(seed)))


def test_draws_that_would_depend_on_the_mesh_are_refused():
  with jax.threefry_partitionable(False), pytest.raises(ValueError, match="unset JAX_THREEFRY_PARTITIONABLE"):
    keys.seeded(0)


def test_every_key_of_the_package_is_made_here():
  """But for those whose shapes alone are looked at."""
  root = Path(keys.__file__).parent
  made = [
    (path, line) for path in root.rglob("*.py") for line in path.read_text().splitlines() if "random.key(" in line
  ]
  assert {path.name for path, line in made if "eval_shape" not in line} == {"keys.py"}


def test_a_purpose_key_is_two_folds_whose_numbers_never_change():
  numbers = {
    "INITIALISATION": 0,
    "CORRUPTION": 1,
    "ROLLOUT": 2,
    "PROMPT_MASK": 3,
    "EVALUATION": 4,
    "SFT_PROMPT_MASK": 5,
    "DROPOUT": 6,
    "ADAPTER": 7,
    "MASK_EMBEDDING": 8,
    "LIKELIHOOD": 9,
    "PREFERENCE": 10,
  }
  assert {p.name: int(p) for p in keys.Purpose} == numbers
  for purpose, number in zip(keys.Purpose, numbers.values(), strict=True):
    expected = jax.random.fold_in(jax.random.fold_in(KEY, number), 5)
    np.testing.assert_array_equal(data(keys.purpose_key(KEY, purpose, 5)), data(expected))
    np.testing.assert_array_equal(data(keys.purpose_key(KEY, purpose, jnp.int32(5))), data(expected))


def test_purposes_and_steps_have_different_keys():
  made = {data(keys.purpose_key(KEY, p, s)).tobytes() for p in keys.Purpose for s in range(20)}
  assert len(made) == len(keys.Purpose) * 20


def test_a_sample_key_depends_on_the_id_alone():
  ids = jnp.asarray([5, 0, 9, 5], jnp.int32)
  batch = keys.sample_keys(KEY, ids)
  for row, identity in enumerate(ids):
    np.testing.assert_array_equal(data(batch[row]), data(jax.random.fold_in(KEY, identity)))


def test_fold_folds_each_key():
  batch = keys.sample_keys(KEY, jnp.arange(3))
  folded = keys.fold(batch, 4)
  for row in range(3):
    np.testing.assert_array_equal(data(folded[row]), data(jax.random.fold_in(batch[row], 4)))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 129])
def test_a_uniform_depends_on_key_and_position_whatever_the_length(length):
  batch = keys.sample_keys(KEY, jnp.arange(3))
  longest = np.asarray(keys.uniforms(batch, 200))
  np.testing.assert_array_equal(np.asarray(keys.uniforms(batch, length)), longest[:, :length])
  np.testing.assert_array_equal(np.asarray(keys.uniforms(batch[1:2], length)), longest[1:2, :length])


def test_uniforms_are_uniform():
  draws = np.asarray(keys.uniforms(keys.sample_keys(KEY, jnp.arange(100)), 1000))
  assert draws.dtype == np.float32
  assert draws.min() >= 0
  assert draws.max() < 1
  assert abs(draws.mean() - 0.5) < 4 * np.sqrt(1 / 12 / draws.size)
  assert abs(draws.var() - 1 / 12) < 1e-3
  assert len(np.unique(draws)) > 0.99 * draws.size


def test_a_token_key_depends_on_its_sample_and_its_place_alone():
  places = jnp.asarray([-2, -1, 0, 1]).astype(jnp.uint32)
  whole = data(keys.token_keys(KEY, jnp.asarray([3, 8], jnp.int32), places))
  np.testing.assert_array_equal(whole[:, 1:], data(keys.token_keys(KEY, jnp.asarray([3, 8], jnp.int32), places[1:])))
  np.testing.assert_array_equal(whole[1:], data(keys.token_keys(KEY, jnp.asarray([8], jnp.int32), places)))
  assert len(np.unique(whole.reshape(8, -1), axis=0)) == 8
