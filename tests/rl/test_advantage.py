import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.rl import advantage
from d1jax.rl.advantage import ADVANTAGES

REWARDS = np.random.default_rng(0).normal(size=24).astype(np.float32)

every = pytest.mark.parametrize("name", list(ADVANTAGES))


def naive(name: str, rewards: np.ndarray) -> list[float]:
  """Of one group, in float64, a sample at a time."""
  r = [float(x) for x in rewards]
  centre = sum(r) / len(r)
  deviation = np.sqrt(sum((x - centre) ** 2 for x in r) / len(r))
  found = []
  for i, x in enumerate(r):
    others = r[:i] + r[i + 1 :]
    up, down = np.exp(x) / sum(np.exp(r)), np.exp(-x) / sum(np.exp(-np.asarray(r)))
    values = {"mean": x - centre, "mean_std": (x - centre) / (deviation + 1e-4), "softmax": up - down}
    values["leave_one_out"] = x - sum(others) / len(others)
    found.append(values[name])
  return found


@pytest.mark.few(5, reason="each case compiles programs of its own")
@pytest.mark.parametrize("group", [2, 6, 24])
@every
def test_the_advantage_is_a_loop_over_a_groups_samples(name, group):
  expected = [value for start in range(0, 24, group) for value in naive(name, REWARDS[start : start + group])]
  found = ADVANTAGES[name](jnp.asarray(REWARDS), group)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@every
def test_each_group_adds_up_to_nothing(name):
  sums = np.asarray(ADVANTAGES[name](jnp.asarray(REWARDS), 6)).reshape(4, 6).sum(axis=1)
  np.testing.assert_allclose(sums, 0, atol=1e-5)


@every
def test_equal_rewards_have_no_advantage(name):
  assert advantage.STD_EPSILON == 1e-4
  np.testing.assert_array_equal(ADVANTAGES[name](jnp.full(12, 0.25), 4), 0)


@every
def test_groups_do_not_see_each_other(name):
  changed = REWARDS.copy()
  changed[:6] += 10 * np.arange(6)
  a, b = (ADVANTAGES[name](jnp.asarray(r), 6) for r in (REWARDS, changed))
  np.testing.assert_array_equal(a[6:], b[6:])
  assert (np.asarray(a)[:6] != np.asarray(b)[:6]).all()


def test_half_precision_rewards_are_centred_in_float32():
  rewards = jnp.asarray([256.0, 257.0, 258.0, 260.0], jnp.bfloat16)
  found = advantage.mean(rewards, 4)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, np.asarray(rewards, np.float32) - np.asarray(rewards, np.float32).mean())


def test_large_rewards_have_finite_weights():
  np.testing.assert_allclose(advantage.softmax(jnp.asarray([500.0, -500.0]), 2), [1, -1])


def test_a_batch_that_is_not_whole_groups_is_an_error():
  with pytest.raises(TypeError, match="reshape"):
    advantage.mean(jnp.asarray(REWARDS), 7)
