import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.rl.advantage import STD_EPSILON, group_relative

REWARDS = np.random.default_rng(0).normal(size=24).astype(np.float32)


@pytest.mark.parametrize("group", [1, 2, 6, 24])
@pytest.mark.parametrize("divide", [False, True])
def test_reward_minus_the_mean_of_its_neighbours(group, divide):
  expected = []
  for start in range(0, 24, group):
    rewards = REWARDS[start : start + group].astype(np.float64)
    deviation = np.sqrt(np.mean((rewards - rewards.mean()) ** 2))
    expected.extend((rewards - rewards.mean()) / (deviation + 1e-4 if divide else 1.0))
  found = group_relative(jnp.asarray(REWARDS), group, divide_by_std=divide)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_each_group_adds_up_to_nothing():
  sums = np.asarray(group_relative(jnp.asarray(REWARDS), 6)).reshape(4, 6).sum(axis=1)
  np.testing.assert_allclose(sums, 0, atol=1e-5)


@pytest.mark.parametrize("divide", [False, True])
def test_equal_rewards_have_no_advantage(divide):
  assert STD_EPSILON == 1e-4
  np.testing.assert_array_equal(group_relative(jnp.full(12, 0.25), 4, divide_by_std=divide), 0)


def test_groups_do_not_see_each_other():
  changed = REWARDS.copy()
  changed[:6] += 10 * np.arange(6)
  a, b = (group_relative(jnp.asarray(r), 6) for r in (REWARDS, changed))
  np.testing.assert_array_equal(a[6:], b[6:])


def test_half_precision_rewards_are_centred_in_float32():
  rewards = jnp.asarray([256.0, 257.0, 258.0, 260.0], jnp.bfloat16)
  found = group_relative(rewards, 4)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, np.asarray(rewards, np.float32) - np.asarray(rewards, np.float32).mean())


def test_a_batch_that_is_not_whole_groups_is_an_error():
  with pytest.raises(TypeError, match="reshape"):
    group_relative(jnp.asarray(REWARDS), 7)
