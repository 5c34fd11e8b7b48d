import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.rl.selection import with_signal

# Groups of two: with, without, without, with, with.
REWARDS = np.asarray([0, 1, 1, 1, 0, 0, 0.5, 0, 2, 3], np.float32)


@pytest.mark.parametrize(
  ("groups", "expected"),
  [(1, [0]), (2, [0, 3]), (3, [0, 3, 4]), (4, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4])],
)
def test_the_first_groups_with_signal_are_taken_and_filled_up(groups, expected):
  rows = jax.jit(with_signal, static_argnums=(1, 2))(jnp.asarray(REWARDS), 2, 2 * groups)
  np.testing.assert_array_equal(rows, [2 * g + i for g in expected for i in (0, 1)])


def test_where_none_has_signal_the_first_are_taken():
  np.testing.assert_array_equal(with_signal(jnp.ones(12), 3, 6), np.arange(6))
