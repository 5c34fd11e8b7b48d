"""Runs whose rollouts are drawn ahead by older weights, on devices of their own."""

import json
import random
import shutil
import time

import pytest

from d1jax import recipe
from d1jax.run.metrics import read_records
from tests import jobs, runs

HALVES = {"mesh__data": 4, "rollout_mesh__data": 4}
LEARNS = {"grpo__steps": 4, "grpo__validate_every": 4, "grpo__save_every": 1, "grpo__p_mask_prompt": 0.3}
SPLIT = {"mesh__data": 1, "rollout_mesh__data": 1, "grpo__off_policy_steps": 1, "grpo__save_every": 1}


def records_of(workdir):
  return [jobs.untimed(record) for record in read_records(workdir / "metrics.jsonl")]


@pytest.mark.slow(reason="runs the recipe")
def test_a_run_that_stops_while_rollouts_wait_goes_on_bit_for_bit(tmp_path):
  """Its checkpoint holds the two rollouts that wait, which older weights drew in slots, for prompts of older success
  rates. The weights are gone: drawn again by the weights of the checkpoint, they would be others.
  """
  changes = HALVES | LEARNS | {"grpo__off_policy_steps": 2, "grpo__num_iterations": 2, "grpo__dump_every": 3}
  changes |= {"grpo__curriculum": True, "grpo__length_reward": 0.5, "grpo__length_warmup": 1}
  changes |= {"grpo__rollout_slots": 4, "rollout__early_exit": True, "rollout__block_length": 6}
  changes |= {"rollout__diffusion_steps": 6, "task__protocol": "strict"}
  whole = recipe.run(jobs.started(tmp_path / "whole", **changes))
  records = records_of(tmp_path / "whole")
  assert [record["async/staleness"] for record in records] == [0, 1, 2, 2]
  gaps = [record["behaviour_gap"] for record in records]
  assert gaps[0] < 1e-6, "the weights that drew are those that are updated, scored with the same masks"
  assert max(gaps) > 1e-3
  assert records[0]["curriculum/asked"] == 4 / 64 < records[-1]["curriculum/asked"]
  assert ["reward/length" in record for record in records] == [False, True, True, True]
  assert all(0 < record["importance/effective_sample_size"] <= 1 + 1e-6 for record in records)
  for record in read_records(tmp_path / "whole" / "metrics.jsonl"):
    assert 0 <= record["async/idle/rollout"] <= 1
    assert 0 <= record["async/idle/update"] <= 1
  shutil.copytree(tmp_path / "whole", tmp_path / "parts")
  (tmp_path / "parts" / "results.json").unlink()
  shutil.rmtree(tmp_path / "parts" / "checkpoints" / "grpo" / "4")
  parts = recipe.run(jobs.started(tmp_path / "parts", **changes))
  assert parts["params_fingerprint"] == whole["params_fingerprint"]
  assert parts["after"] == whole["after"]
  assert records_of(tmp_path / "parts") == records


def check_killed(folder, kills, steps, **more):
  """A run at staleness 1 that is killed so many times, each time behind at least two more iterations, ends the same."""

  def start(workdir):
    changes = jobs.STARTED | SPLIT | more | {"grpo__steps": steps, "grpo__validate_every": steps}
    return jobs.start(*jobs.flags(workdir, **changes))

  code, _, err = jobs.finish(start(folder / "whole"))
  assert code == 0, err
  workdir, chance = folder / "killed", random.Random(22)
  for _ in range(kills):
    reached = max(saved(workdir), default=0)
    stale, process = jobs.written(workdir), start(workdir)
    jobs.wait_for(workdir, "grpo", reached + 2, process, stale=stale)
    time.sleep(chance.uniform(0, 0.05))
    process.kill()
    code, _, err = jobs.finish(process)
    assert code == -9, err
  code, _, err = jobs.finish(start(workdir))
  assert code == 0, err
  runs.check_same_end(workdir, folder / "whole")


def saved(workdir):
  """The iterations of which there are checkpoints."""
  return [int(path.name) for path in (workdir / "checkpoints" / "grpo").glob("*") if path.name.isdigit()]


@pytest.mark.long
@pytest.mark.slow(reason="a process that is killed twenty times")
def test_a_run_at_staleness_one_that_is_killed_twenty_times_ends_the_same(tmp_path):
  check_killed(tmp_path, kills=20, steps=100)


@pytest.mark.long
@pytest.mark.slow(reason="two processes of the recipe, and one")
def test_several_processes_draw_ahead_as_one_does(tmp_path):
  """Each of two processes has a device of either side; one process has them all."""
  changes = jobs.STARTED | LEARNS | {"mesh__data": 2, "rollout_mesh__data": 2, "grpo__off_policy_steps": 1}
  one = jobs.start(*jobs.flags(tmp_path / "one", **changes, cpu_devices=4))
  assert jobs.finish(one)[0] == 0
  two = jobs.start_processes(2, *jobs.flags(tmp_path / "two", **changes), devices=2)
  for code, _, err in jobs.finish_processes(two):
    assert code == 0, err
  alone, together = (read_records(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
  for a, b in zip(alone, together, strict=True):
    assert a["async/staleness"] == b["async/staleness"]
    assert a["reward"] == pytest.approx(b["reward"], abs=1e-6)
    assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
  assert json.loads((tmp_path / "two" / "results.json").read_text())["best_iteration"] == 4
