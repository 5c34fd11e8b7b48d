import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d1jax.state import Frozen, TrainState, apply_gradients, create, merge

OPTIMIZER = optax.adam(0.1)


@pytest.fixture
def state() -> TrainState:
  init = lambda key: {"a": jax.random.normal(key, (3,)), "b": {"c": jnp.ones((2, 2))}}
  return create(init, OPTIMIZER, jax.random.key(0), jax.random.key(1))


GRADIENTS = {"a": jnp.asarray([1.0, -2.0, 0.0]), "b": {"c": jnp.full((2, 2), 0.5)}}


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_create_starts_at_step_zero_with_the_run_key_and_weights_of_the_other_key(state):
  assert int(state.step) == 0
  assert state.step.dtype == jnp.int32
  np.testing.assert_array_equal(state.trainable["a"], jax.random.normal(jax.random.key(1), (3,)))
  np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(jax.random.key(0)))


def test_a_finite_step_is_the_optimisers(state):
  new = apply_gradients(state, GRADIENTS, OPTIMIZER, jnp.bool_(True))
  updates, opt_state = OPTIMIZER.update(GRADIENTS, state.opt_state, state.trainable)
  assert_same(new.trainable, optax.apply_updates(state.trainable, updates))
  assert_same(new.opt_state, opt_state)
  assert int(new.step) == 1


def test_a_step_that_is_not_finite_changes_nothing(state):
  state = apply_gradients(state, GRADIENTS, OPTIMIZER, jnp.bool_(True))
  broken = jax.tree.map(lambda g: g * jnp.nan, GRADIENTS)
  new = apply_gradients(state, broken, OPTIMIZER, jnp.bool_(False))
  assert_same(new._replace(key=0), state._replace(key=0))
  assert int(new.step) == 1


def test_full_fine_tuning_merges_to_the_trainable_weights(state):
  assert merge(state.trainable, Frozen({}, GRADIENTS)) is state.trainable
