import contextlib
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from d1jax import recipe
from d1jax.errors import RunError
from d1jax.run import experiment as experiments
from d1jax.run.metrics import read_records
from d1jax.training import configured, dump
from tests import jobs
from tests.jobs import small, started


@pytest.mark.slow(reason="runs the recipe")
def test_workers_change_no_number(tmp_path):
  runs = [recipe.run(started(tmp_path / str(n), grpo__grading_workers=n, grpo__steps=3)) for n in (0, 2)]
  assert runs[0]["params_fingerprint"] == runs[1]["params_fingerprint"]
  assert runs[0]["after"] == runs[1]["after"]
  here, pooled = (read_records(tmp_path / str(n) / "metrics.jsonl") for n in (0, 2))
  assert [jobs.untimed(r) for r in here] == [jobs.untimed(r) for r in pooled]
  assert any(r["stage"] == "grpo" and r["reward_std"] > 0 for r in pooled)
  assert not any("importance/effective_sample_size" in r for r in pooled), "no cap was set"


def test_a_wrong_number_of_workers_claims_no_folder(tmp_path):
  with pytest.raises(RunError, match=r"grpo\.grading_workers=-2 must be a whole number of at least 0"):
    recipe.run(small(tmp_path / "run", grpo__grading_workers=-2))
  assert not (tmp_path / "run").exists()


DEADLY = """
import os
from d1jax.tasks.sudoku import Sudoku

class Deadly(Sudoku):
  def grade(self, text, record, protocol="strict"):
    os._exit(0)

build = Deadly
"""


def test_a_grader_that_exits_ends_the_job_before_it_begins(tmp_path):
  (tmp_path / "deadly.py").write_text(DEADLY)
  config = small(tmp_path / "run", task__module=str(tmp_path / "deadly.py"))
  with pytest.raises(
    RunError, match=r"deadly.py: grade\(text='', .* ended its process twice \(exit code 0; "
  ) as caught:
    recipe.run(config)
  assert caught.value.exit_code == 2
  assert not (tmp_path / "run").exists()


def running():
  """The processes that run, with their parents; one that has ended and that nobody has asked about does not."""
  found = {}
  for path in Path("/proc").glob("[0-9]*/stat"):
    try:
      state, parent = path.read_text().rsplit(")", 1)[1].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
      continue
    if state != "Z":
      found[int(path.parent.name)] = int(parent)
  return found


@pytest.mark.slow(reason="a process of the recipe, and its workers")
def test_ctrl_c_to_all_processes_stops_the_job_as_one_to_the_job_does(tmp_path):
  """As a terminal sends it; that workers live through what some schedulers send is in tests/rl/test_grading.py."""
  changes = jobs.STARTED | {"grpo__steps": 400, "grpo__validate_every": 400}
  process = jobs.start(*jobs.flags(tmp_path, **changes, grpo__grading_workers=2))
  jobs.wait_for(tmp_path, "grpo", 3, process)
  workers = [pid for pid, parent in running().items() if parent == process.pid]
  assert len(workers) >= 2
  for pid in (*workers, process.pid):
    with contextlib.suppress(ProcessLookupError):  # a child that was about to end
      os.kill(pid, signal.SIGINT)
  exit_code, _, err = jobs.finish(process)
  assert exit_code == 130, err
  assert "SIGINT: saved at grpo iteration" in err
  end = time.monotonic() + 20
  while set(workers) & running().keys():
    assert time.monotonic() < end, "processes are left behind"
    time.sleep(0.02)


def records_of(workdir):
  return [r for r in read_records(workdir / "metrics.jsonl") if r["stage"] == "grpo"]


@pytest.mark.slow(reason="runs the recipe")
def test_the_recorded_states_train_as_well(tmp_path):
  """They are those of rollouts in slots, whose rows are at different blocks in the same pass."""
  changes = {"grpo__estimator": "step_merged", "grpo__importance_cap": 2.0, "grpo__num_iterations": 2}
  changes |= {
    "grpo__rollout_slots": 8,
    "grpo__rollout_chunks": 1,
    "rollout__early_exit": True,
    "rollout__block_length": 6,
  }
  changes |= {"rollout__diffusion_steps": 9, "task__protocol": "strict"}
  recipe.run(started(tmp_path, grpo__steps=3, grpo__accumulation=2, grpo__loss__beta=0.01, **changes))
  records = records_of(tmp_path)
  assert len(records) == 3
  assert any(r["grad_norm"] > 0 for r in records)
  assert all(np.isfinite(r["loss"]) for r in records)
  for record in records:
    # Rollouts without a cache are drawn from what is trained.
    assert record["importance/effective_sample_size"] == pytest.approx(1, abs=1e-5)
    assert "drift/logp_difference" not in record
    assert record["cost/passes_saved/rollout"] >= 0
    assert record["cost/passes/rollout"] % 8 == 0


GREEDY = {"rollout__temperature": 0.0, "rollout__remasking": "random"}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"grpo__loss": "sandwich"},
      "loss=sandwich needs the option upper_share: give --config.grpo.loss.upper_share=",
    ),
    ({"grpo__reward_weights": "sloved=1"}, "names 'sloved', which is no component; known: constraints, solved"),
    ({"grpo__rollout_slots": 4}, r"rollout\.early_exit=False lets no row end .* use early_exit=True"),
    (
      {"grpo__rollout_slots": 8, "rollout__early_exit": True, "task__protocol": "strict"},
      r"grpo\.rollout_slots=8 leaves no row",
    ),
    ({"grpo__oversample": 0}, "grpo.oversample=0 must be a whole number of at least 1"),
    ({"grpo__importance_cap": 2.0}, r"needs an estimator of the recorded states.* no ratio to the sampler"),
    ({"grpo__importance_cap": 0.0, "grpo__estimator": "step_merged"}, "importance_cap=0.0 must be positive"),
    (
      {"grpo__importance_cap": 2.0, "grpo__estimator": "step_merged", **GREEDY},
      "importance_cap=2.0 .* compare the probabilities of draws, but rollout.temperature=0 takes the argmax",
    ),
    ({"rollout__cache": "dual", **GREEDY}, "drift_every=4 compare the probabilities of draws"),
    (
      {"grpo__off_policy_steps": 1, "grpo__estimator": "step_merged", **GREEDY},
      "off_policy_steps=1 takes the probabilities of draws .* rollout.temperature=0",
    ),
    (
      {"grpo__off_policy_steps": 1, "rollout__cache": "dual"},
      "drift_every=4 .* set grpo.drift_every=0, or rollout.cache",
    ),
    ({"grpo__off_policy_steps": 1, "grpo__loss": "sandwich", "grpo__loss__upper_share": 0.5}, "Sandwich"),
    ({"rollout_mesh__data": 8}, "mesh .* and rollout_mesh .data=8. do not share 8 devices"),
    ({"grpo__drift_every": -1}, "grpo.drift_every is -1"),
    ({"grpo__drift_every": 0, "grpo__drift_limit": 0.1}, "grpo.drift_limit is 0.1 with grpo.drift_every=0"),
    ({"grpo__drift_limit": -0.1}, "grpo.drift_limit is -0.1"),
  ],
)
def test_combinations_that_make_no_sense_claim_no_folder(tmp_path, changes, message):
  with pytest.raises(RunError, match=message):
    recipe.run(small(tmp_path / "run", **changes))
  assert not (tmp_path / "run").exists()


@pytest.mark.slow(reason="runs the recipe")
def test_groups_with_signal_are_taken_out_of_more_and_rewards_are_shaped(tmp_path):
  """Six groups of four are drawn an iteration, two of them trained on; it goes on from where it was."""
  changes = {"grpo__prompts_per_iteration": 2, "grpo__oversample": 3, "grpo__rollout_chunks": 3, "grpo__dump_every": 1}
  changes |= {
    "grpo__overlong": 4,
    "grpo__answered": 0.25,
    "grpo__reward_weights": "solved=2",
    "grpo__validate_every": 1,
    "grpo__curriculum": True,
    "grpo__length_reward": 0.5,
    "grpo__length_warmup": 1,
  }
  results = recipe.run(started(tmp_path / "whole", grpo__steps=2, **changes))
  shutil.copytree(tmp_path / "whole", tmp_path / "parts")
  (tmp_path / "parts" / "results.json").unlink()
  shutil.rmtree(tmp_path / "parts" / "checkpoints" / "grpo" / "2")
  resumed = recipe.run(started(tmp_path / "parts", grpo__steps=2, **changes))
  assert resumed["params_fingerprint"] == results["params_fingerprint"]
  for iteration, record in enumerate(records_of(tmp_path / "whole")):
    dumped = dump.read(tmp_path / "whole" / "rollouts", iteration)
    assert len(dumped.rewards) == len(dumped.advantages) == 24
    silent = np.ptp(dumped.rewards.reshape(6, 4), axis=1) < 1e-6
    assert record["no_signal"] == pytest.approx(silent.mean())
    parts = ("constraints", "solved", "overlong", "answered", *(("length",) if iteration else ()))
    assert ("reward/length" in record) == (iteration == 1)
    assert 6 / 64 <= record["curriculum/asked"] <= 6 * (iteration + 1) / 64
    assert record["reward"] == pytest.approx(sum(record[f"reward/{name}"] for name in parts), abs=1e-6)
    assert record["reward/overlong"] <= 0 <= record["reward/answered"] <= 0.25
    assert (record["cost/tokens/rollout"], record["cost/tokens/update"]) == (24 * 18, 8 * 18)
    assert (record["cost/passes/rollout"], record["cost/passes/update"]) == (24 * 4, 8)
    if silent.sum() <= 4:
      assert record["grad_norm"] > 0


@pytest.mark.slow(reason="compiles a rollout three times")
def test_without_its_cache_a_sampler_is_the_exact_one(tmp_path):
  """The program that a run falls back to gives the rollouts of a run that never had a cache, bit for bit."""
  found = []
  for cache in ("none", "dual"):
    fields = {"rollout__cache": cache, "rollout__diffusion_steps": 6, "model__overrides__layers": 2}
    experiment = experiments.build(small(tmp_path, **fields), None)
    optimizer = experiment.optimizer(experiment.config.grpo, 4)
    programs = configured.programs(experiment, optimizer)
    programs.compile()
    assert (programs.watch is not None) == (cache == "dual")
    state, frozen = experiment.model.weights.fresh_state(optimizer), experiment.model.weights.frozen
    rng = np.random.default_rng(0)
    prompt = rng.integers(4, 9, (8, 33)).astype(np.int32)
    ids = np.arange(8, dtype=np.int32)
    placed = jax.device_put(((prompt, np.ones_like(prompt, bool), ids, ids // 4),), experiment.model.by_row)
    iteration = jax.device_put(np.int32(3), experiment.model.replicated)
    params = programs.publish(state, frozen)
    ways = [True, False] if cache == "dual" else [True]
    found += [jax.device_get(programs.rollout(params, list(placed), state.key, iteration, cached=w))[0] for w in ways]
  exact, cached, without = found
  jax.tree.map(np.testing.assert_array_equal, without, exact)
  assert (cached.reveal_logp != exact.reveal_logp).any()
