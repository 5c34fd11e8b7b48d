import jax
import numpy as np

from d1jax.rl.grading import Graded
from d1jax.training import dump
from tests import toy


def test_an_iteration_comes_back_as_it_was(tmp_path):
  rollout = jax.device_get(toy.rollout())
  texts = ["plain", "two\nlines", "", "ünï 数 \t end "]
  graded = Graded(texts, [], np.asarray([0.5, 1.0, 0.0, -1.0], np.float32))
  advantages = np.asarray([0.1, 0.2, 0.3, 0.4], np.float32)
  dump.write(tmp_path / "rollouts", 12, rollout, graded, advantages)
  assert [p.name for p in (tmp_path / "rollouts").iterdir()] == ["000012.npz"]
  found = dump.read(tmp_path / "rollouts", 12)
  for name, stored, written in zip(rollout._fields, found.rollout, rollout, strict=True):
    np.testing.assert_array_equal(stored, written, err_msg=name)
    assert stored.dtype == written.dtype
  np.testing.assert_array_equal(found.rewards, graded.rewards)
  np.testing.assert_array_equal(found.advantages, advantages)
  assert found.texts == texts


def test_iterations_do_not_overwrite_each_other(tmp_path):
  rollout = jax.device_get(toy.rollout())
  for iteration in (0, 1):
    rewards = np.full(4, iteration, np.float32)
    dump.write(tmp_path, iteration, rollout, Graded([str(iteration)] * 4, [], rewards), rewards)
  for iteration in (0, 1):
    assert dump.read(tmp_path, iteration).texts == [str(iteration)] * 4
    assert (dump.read(tmp_path, iteration).rewards == iteration).all()
