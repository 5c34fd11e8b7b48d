"""Rollouts whose unfinished rows go on in the next iterations, under newer weights."""

import dataclasses

import jax
import numpy as np
import pytest

from d1jax import recipe
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.errors import RunError
from d1jax.rl.estimators import ESTIMATORS
from d1jax.rl.losses import ClippedToken
from d1jax.rl.method import Method
from d1jax.run import experiment as experiments
from d1jax.run.checkpoint import Checkpoints
from d1jax.training import configured, partial
from d1jax.training.ahead import Ahead, abstract_waiting
from d1jax.training.shape import Shape
from tests import jobs
from tests.training.test_ahead import check_killed

PARTIAL = {
  "grpo__partial_age": 1,
  "grpo__rollout_slots": 5,
  "grpo__rollout_chunks": 1,
  "grpo__estimator": "step_merged",
  "rollout__early_exit": True,
  "rollout__block_length": 3,
  "rollout__diffusion_steps": 6,
  "rollout__temperature": 2.0,  # so that it writes answers of different lengths
  "grpo__overlong": 12,
  "task__protocol": "strict",
}


@pytest.mark.slow(reason="compiles programs of its own")
def test_rows_that_wait_and_rows_that_go_on_are_in_a_checkpoint(tmp_path):
  """Six iterations at staleness 1, and the last three of them again from a checkpoint, to the bit. Each completion is
  trained on once, and none began more than an iteration before its own. Then three iterations without staleness.
  """
  changes = PARTIAL | {"mesh__data": 4, "rollout_mesh__data": 4, "grpo__rollout_slots": 4}
  changes |= {"grpo__off_policy_steps": 1, "grpo__curriculum": True}
  experiment = experiments.build(jobs.started(tmp_path, **changes), None)
  optimizer = experiment.optimizer(experiment.config.grpo, 6)
  programs, grading = configured.programs(experiment, optimizer), configured.grading(experiment)
  curriculum, weights = configured.curriculum(experiment, grading.prompts), experiment.model.weights
  programs.compile()
  trained, update = [], programs.update

  def watched(state, frozen, chunks, *others):
    trained.extend(np.concatenate([chunk.sample_id for chunk in chunks]).tolist())
    return update(state, frozen, chunks, *others)

  programs.update = watched
  checkpoints = Checkpoints(tmp_path / "checkpoints", writes=True)

  def run(state, first, last=6, waiting=()):
    ahead = Ahead(
      programs, grading, weights.frozen, first, tmp_path, seed=0, gap_every=9, curriculum=curriculum, waiting=waiting
    )
    records = []
    for iteration in range(first, last):
      state, record = ahead(state, iteration)
      records.append(jobs.untimed(record))
      if iteration == 2 and last == 6:
        said = {"config": {}, "seconds": 0.0} | curriculum.state()
        checkpoints.save(3, state, said, None, ahead.waiting())
    return records, jax.device_get(state.trainable)

  with grading.grader:
    whole, expected = run(weights.state_from(weights.start(), optimizer), 0)
    checkpoints.wait()
    assert trained == list(range(6 * programs.shape.rows))

    def waiting(step):
      curriculum.restore(checkpoints.metadata(step))
      return abstract_waiting(programs, grading, 0, step, curriculum)

    start = checkpoints.restore_latest(weights.abstract_state(optimizer), waiting)
    curriculum.restore(start.metadata)
    parts, found = run(start.state, 3, waiting=start.waiting)
    curriculum.restore({})
    programs.shape = dataclasses.replace(programs.shape, off_policy_steps=0)
    fresh, _ = run(weights.state_from(weights.start(), optimizer), 0, last=3)
  assert parts == whole[3:]
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert all(0 <= record["partial/age"] <= 1 for record in whole)
  assert whole[0]["partial/carried"] == 0 < whole[0]["partial/unfinished"] <= 4
  assert all(record["partial/carried"] > 0 < record["behaviour_gap"] for record in whole[2:])
  assert [record["async/staleness"] for record in fresh] == [0, 0, 0]
  assert fresh[0]["behaviour_gap"] < 1e-6 < fresh[2]["behaviour_gap"], "rows went on under the next weights"


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"rollout__early_exit": False}, r"rollout\.early_exit=False lets no row end .* use early_exit=True"),
    ({"rollout__cache": "dual"}, r"drift_every=4 .* grpo\.partial_age=1 does not keep: set grpo\.drift_every=0"),
  ],
)
def test_a_sampler_that_cannot_go_on_claims_no_folder(tmp_path, changes, message):
  with pytest.raises(RunError, match=message):
    recipe.run(jobs.small(tmp_path / "run", **(PARTIAL | {"grpo__rollout_slots": 8} | changes)))
  assert not (tmp_path / "run").exists()


STEPS = ESTIMATORS["step_merged"]


@pytest.mark.parametrize(
  ("shape", "temperature", "estimator", "message"),
  [
    ({"slots": None}, 1.0, STEPS, r"partial_age=1 .* grpo\.rollout_slots=None .*: set grpo\.rollout_slots"),
    ({"chunks": 2}, 1.0, STEPS, r"not in grpo\.rollout_chunks=2: set grpo\.rollout_chunks=1"),
    ({}, 1.0, ESTIMATORS["one_step"], r"estimator=one_step scores it by one: set grpo\.estimator=step_merged"),
    ({}, 1.0, STEPS.bind(segments=2), "step_merged without segments"),
    ({}, 0.0, STEPS, r"takes the probabilities of draws .* rollout\.temperature=0 takes the argmax"),
  ],
)
def test_what_cannot_be_corrected_is_refused(shape, temperature, estimator, message):
  given = Shape(4, 4, (8,), **({"slots": 4, "partial_age": 1} | shape))
  sampler = SamplerSpec(6, 6, 6, temperature=temperature, early_exit=True)
  with pytest.raises(ValueError, match=message):
    partial.check(given, sampler, Method(estimator, ClippedToken(epsilon=0.2), behaviour_cap=5.0))


@pytest.mark.long
@pytest.mark.slow(reason="a process that is killed twenty times")
def test_a_run_with_rows_that_go_on_and_staleness_one_that_is_killed_twenty_times_ends_the_same(tmp_path):
  check_killed(tmp_path, kills=20, steps=100, **PARTIAL)
