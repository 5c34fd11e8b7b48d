"""An average of the weights: what it is, that training does not notice, and who reads it."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d1jax import recipe
from d1jax.evaluation import subject
from d1jax.fingerprint import fingerprint
from d1jax.optimizer import adamw, evaluated
from d1jax.parallel import mesh as meshes
from d1jax.run.checkpoint import Checkpoints
from d1jax.state import TrainState, apply_gradients, create
from d1jax.training import loop
from tests import jobs
from tests.test_optimizer import SETTINGS
from tests.training import test_loop

DECAY = 0.75


def states(ema_decay: float | None, steps: int = 3) -> list[TrainState]:
  """The states of a few steps, the start first; the second step is not finite."""
  optimizer = adamw(**SETTINGS, ema_decay=ema_decay)
  found = [create(lambda _: {"w": jnp.arange(4.0)}, optimizer, jax.random.key(0), jax.random.key(1))]
  for i in range(steps):
    gradients = {"w": jnp.full(4, jnp.nan if i == 1 else 1.0 + i)}
    found.append(apply_gradients(found[-1], gradients, optimizer, jnp.bool_(i != 1)))
  return found


def test_the_average_follows_the_weights_and_changes_no_step():
  found, plain = states(DECAY), states(None)
  np.testing.assert_array_equal(evaluated(found[0])["w"], found[0].trainable["w"])
  expected = np.arange(4.0)
  for state in (found[1], found[3]):
    expected = DECAY * expected + (1 - DECAY) * np.asarray(state.trainable["w"], np.float64)
    np.testing.assert_allclose(evaluated(state)["w"], expected, rtol=1e-6)
  np.testing.assert_array_equal(evaluated(found[2])["w"], evaluated(found[1])["w"], "a refused step leaves it")
  for with_average, without in zip(found, plain, strict=True):
    np.testing.assert_array_equal(with_average.trainable["w"], without.trainable["w"])
    assert evaluated(without) is without.trainable


def test_the_average_lives_where_the_weights_do():
  mesh = meshes.make_mesh({"data": 1, "fsdp": 8, "tensor": 1, "sequence": 1}, jax.devices())
  abstract, axes = {"w": jax.ShapeDtypeStruct((16, 8), jnp.float32)}, {"w": ("embed", "mlp")}
  placed = meshes.state_shardings(mesh, meshes.RULES, axes, abstract, adamw(**SETTINGS, ema_decay=DECAY))
  assert evaluated(placed)["w"] == placed.trainable["w"]
  assert not placed.trainable["w"].is_fully_replicated


def test_the_average_is_validated_saved_and_read_without_the_moments(tmp_path, monkeypatch):
  optimizer = adamw(**SETTINGS, ema_decay=DECAY)
  monkeypatch.setattr(optax, "adam", lambda rate: optimizer)
  seen = {}
  original = loop.run

  def run(stage, *arguments):
    validate = lambda params: seen.setdefault(len(seen), np.asarray(params["w"])).sum()
    return original(
      dataclasses.replace(stage, validate=lambda params, iteration: loop.Scored(float(validate(params)))), *arguments
    )

  monkeypatch.setattr(loop, "run", run)
  test_loop.run(tmp_path)
  checkpoints = Checkpoints(tmp_path / "checkpoints" / "sft")
  abstract = jax.eval_shape(lambda: test_loop.fresh(optimizer))
  state = checkpoints.restore(test_loop.STEPS, abstract).state
  assert np.any(evaluated(state)["w"] != state.trainable["w"])
  np.testing.assert_array_equal(evaluated(state)["w"], seen[len(seen) - 1])
  np.testing.assert_array_equal(checkpoints.restore_evaluated(test_loop.STEPS, abstract)["w"], seen[len(seen) - 1])


@pytest.mark.slow(reason="runs the recipe, and its end once more")
def test_a_run_with_an_average_goes_on_bit_for_bit_and_is_read(tmp_path):
  """Everything that reads the run reads the average."""
  config = lambda name: jobs.started(tmp_path / name, grpo__ema_decay=DECAY, grpo__learning_rate=1e-2, grpo__steps=4)
  whole = recipe.run(config("whole"))
  shutil.copytree(tmp_path / "whole", tmp_path / "broken")
  (tmp_path / "broken" / "results.json").unlink()
  shutil.rmtree(tmp_path / "broken" / "checkpoints" / "grpo" / "4")
  broken = recipe.run(config("broken"))
  assert broken["params_fingerprint"] == whole["params_fingerprint"]
  assert broken["after"] == whole["after"]
  found = subject.find_checkpoint(tmp_path / "broken")
  _, experiment, read = subject.read_run(found, jobs.load("eval"))
  optimizer = experiment.optimizer(config("broken").grpo, 4)
  state = found.checkpoints.restore(int(found.home.name), experiment.model.weights.abstract_state(optimizer)).state
  assert fingerprint(read) == fingerprint(evaluated(state)) != fingerprint(state.trainable)
