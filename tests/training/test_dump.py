import jax
import jax.numpy as jnp
import numpy as np

from d1jax.rl.grading import Graded
from d1jax.training import dump
from d1jax.training.host import Visit
from tests import toy


def visit(rollout, texts, rewards):
  rewards = np.asarray(rewards, np.float32)
  lengths = rollout.completion_mask.sum(axis=1)
  return Visit(rewards, rewards, lengths, {}, 0.0, np.arange(len(texts)), rollout, Graded(texts, [], rewards))


def test_an_iteration_comes_back_as_it_was(tmp_path):
  rollout = jax.device_get(toy.rollout())
  halves = [jax.tree.map(lambda x, i=i: jnp.asarray(x[i : i + 2]), rollout) for i in (0, 2)]
  texts = ["plain", "two\nlines", "", "ünï 数 \t end "]
  found = visit(rollout, texts, [0.5, 1.0, 0.0, -1.0])
  graded, advantages = found.graded, jnp.asarray([0.1, 0.2, 0.3, 0.4])
  dump.write(tmp_path / "rollouts", 12, halves, found, advantages)
  assert [p.name for p in (tmp_path / "rollouts").iterdir()] == ["000012.npz"]
  found = dump.read(tmp_path / "rollouts", 12)
  for name, stored, written in zip(rollout._fields, found.rollout, rollout, strict=True):
    np.testing.assert_array_equal(stored, written, err_msg=name)
    assert stored.dtype == written.dtype
  np.testing.assert_array_equal(found.rewards, graded.rewards)
  np.testing.assert_array_equal(found.advantages, advantages)
  assert found.texts == texts


def test_iterations_do_not_overwrite_each_other(tmp_path):
  rollout = toy.rollout()
  for iteration in (0, 1):
    found = visit(jax.device_get(rollout), [str(iteration)] * 4, [iteration] * 4)
    dump.write(tmp_path, iteration, [rollout], found, jnp.asarray(found.rewards))
  for iteration in (0, 1):
    assert dump.read(tmp_path, iteration).texts == [str(iteration)] * 4
    assert (dump.read(tmp_path, iteration).rewards == iteration).all()
