"""What a cache changes is measured, logged and acted on; a run that goes on remembers what it decided."""

import logging
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax import recipe
from d1jax.run.metrics import read_records
from d1jax.training import drift
from tests import toy
from tests.jobs import started, untimed

# The start has two layers: with a single one no key or value depends on other tokens, and no cache is ever stale.
CACHED = {"rollout__diffusion_steps": 6, "rollout__cache": "dual"}
FIGURES = {"token_agreement", "logp_difference", "logp_bias", "effective_sample_size", "reward_gap"}


def pair():
  """Two made-up rollouts that differ in some tokens and in where they end, and log-probabilities to compare with."""
  cached, rng = toy.rollout(batch=5), np.random.default_rng(2)
  exact = cached._replace(
    completion=jnp.where(rng.random((5, 6)) < 0.3, 4, cached.completion),
    completion_mask=cached.completion_mask.at[1, 4:].set(False),
  )
  logp = jnp.asarray(rng.normal(-1, 0.5, (5, 6)), jnp.float32)
  return cached._replace(reveal_logp=logp), exact, logp + jnp.asarray(rng.normal(0.1, 0.2, (5, 6)), jnp.float32)


def test_the_figures_are_the_naive_ones():
  cached, exact, exact_logp = pair()
  found = drift.drift(cached, exact, exact_logp)
  same = either = 0
  differences, ratios = [], []
  for b in range(5):
    log_ratio = 0.0
    for i in range(6):
      mine, other = bool(cached.completion_mask[b, i]), bool(exact.completion_mask[b, i])
      either += mine or other
      same += mine and other and int(cached.completion[b, i]) == int(exact.completion[b, i])
      if mine:
        differences.append(float(cached.reveal_logp[b, i]) - float(exact_logp[b, i]))
        log_ratio -= differences[-1]
    ratios.append(math.exp(log_ratio))
  assert 0 < same < either < 30
  assert float(found["token_agreement"]) == pytest.approx(same / either)
  assert float(found["logp_difference"]) == pytest.approx(np.abs(differences).mean(), rel=1e-5)
  assert float(found["logp_bias"]) == pytest.approx(np.mean(differences), rel=1e-4)
  assert float(found["effective_sample_size"]) == pytest.approx(
    sum(ratios) ** 2 / sum(r * r for r in ratios) / 5, rel=1e-4
  )


def test_the_same_rollout_has_no_drift():
  cached, _, _ = pair()
  found = drift.drift(cached, cached, cached.reveal_logp)
  assert {name: float(value) for name, value in found.items()} == {
    "token_agreement": 1,
    "logp_difference": 0,
    "logp_bias": 0,
    "effective_sample_size": 1,
  }


def test_what_lies_behind_the_stop_is_no_drift():
  cached, exact, exact_logp = pair()
  rubbish = lambda rollout: rollout._replace(completion=jnp.where(rollout.completion_mask, rollout.completion, 9))
  spoilt = drift.drift(rubbish(cached), rubbish(exact), jnp.where(cached.completion_mask, exact_logp, -jnp.inf))
  jax.tree.map(np.testing.assert_array_equal, spoilt, drift.drift(cached, exact, exact_logp))


def test_long_completions_do_not_overflow():
  cached, exact, exact_logp = pair()
  far = drift.drift(cached, exact, exact_logp + 300)
  assert all(np.isfinite(value) for value in far.values())
  assert 1 / 5 - 1e-6 <= float(far["effective_sample_size"]) <= 1


def test_when_to_look():
  assert [i for i in range(9) if drift.Watch(4, None).due(i)] == [0, 4, 8]
  assert not any(drift.Watch(0, None).due(i) for i in range(9))


@pytest.mark.parametrize(
  ("difference", "limit", "beyond"),
  [
    (0.2, 0.1, True),
    (0.1, 0.1, False),
    (0.0, 0.0, False),
    (5.0, None, False),
    (math.nan, 0.1, True),
    (None, 0.1, False),
  ],
)
def test_what_is_beyond_the_limit(difference, limit, beyond):
  values = {"reward": 1.0} if difference is None else {"drift/logp_difference": difference}
  assert drift.Watch(1, limit).beyond(values) == beyond


def test_a_cache_that_was_given_up_stays_off():
  watch = drift.Watch(2, 0.1)
  seen = {1: 0.05, 3: 0.2, 5: 0.01}
  records = [{"stage": "sft", "iteration": i, "drift/logp_difference": 9.0} for i in (1, 2)]
  records += [
    {"stage": "grpo", "iteration": i} | ({"drift/logp_difference": seen[i]} if i in seen else {}) for i in range(1, 7)
  ]
  assert [watch.trusts(records, position) for position in range(7)] == [True, True, True, False, False, False, False]
  assert drift.Watch(2, None).trusts(records, 6)


def grpo_records(workdir):
  return [untimed(r) for r in read_records(workdir / "metrics.jsonl") if r["stage"] == "grpo"]


@pytest.mark.slow(reason="runs the recipe")
def test_a_run_logs_the_drift_of_its_cache(tmp_path, caplog):
  with caplog.at_level(logging.WARNING):
    recipe.run(started(tmp_path, grpo__steps=5, grpo__drift_every=2, **CACHED))
  records = grpo_records(tmp_path)
  looked = [r["iteration"] for r in records if {f"drift/{name}" for name in FIGURES} <= r.keys()]
  assert looked == [1, 3, 5]
  for record in records[::2]:
    assert 0 < record["drift/token_agreement"] <= 1
    assert abs(record["drift/logp_bias"]) <= record["drift/logp_difference"]
    assert record["drift/logp_difference"] > 1e-4, "a stale cache shows"
    assert 1 / 8 <= record["drift/effective_sample_size"] <= 1
    assert math.isfinite(record["drift/reward_gap"])
  assert not any("cache_off" in r for r in records)
  assert "without the cache" not in caplog.text


@pytest.mark.slow(reason="runs the recipe")
def test_a_cache_that_is_always_fresh_changes_nothing(tmp_path):
  exact = recipe.run(started(tmp_path / "exact", grpo__steps=3, **CACHED | {"rollout__cache": "none"}))
  fields = {"rollout__refresh_every": 1, "grpo__drift_every": 1, "grpo__drift_limit": 1e-5}
  fresh = recipe.run(started(tmp_path / "fresh", grpo__steps=3, **CACHED, **fields))
  assert fresh["params_fingerprint"] == exact["params_fingerprint"]
  for record in grpo_records(tmp_path / "fresh"):
    assert (record["drift/token_agreement"], record["drift/reward_gap"]) == (1, 0)
    assert record["drift/logp_difference"] <= 1e-5
    assert "cache_off" not in record


@pytest.mark.slow(reason="runs the recipe")
def test_a_job_that_goes_on_after_its_cache_went_off_ends_bit_identical(tmp_path, caplog):
  """From a checkpoint behind the decision, as after a kill (tests/training/test_faults.py)."""
  config = lambda name: started(tmp_path / name, grpo__steps=6, grpo__drift_every=100, grpo__drift_limit=1e-6, **CACHED)
  with caplog.at_level(logging.WARNING):
    whole = recipe.run(config("whole"))
  assert "grpo iteration 1: a token's log-probability differs by" in caplog.text
  assert "rollouts go on without the cache dual" in caplog.text
  records = grpo_records(tmp_path / "whole")
  assert [r.get("cache_off") for r in records] == [None, *[1.0] * 5]
  assert [r["iteration"] for r in records if "drift/logp_difference" in r] == [1]
  assert any(r["grad_norm"] > 0 for r in records[4:]), "the job has nothing to learn from"

  shutil.copytree(tmp_path / "whole", tmp_path / "cut")
  (tmp_path / "cut" / "results.json").unlink()
  shutil.rmtree(tmp_path / "cut" / "checkpoints" / "grpo" / "6")
  caplog.clear()
  with caplog.at_level(logging.WARNING):
    cut = recipe.run(config("cut"))
  assert "without the cache" not in caplog.text, "the decision is remembered, not taken again"
  assert grpo_records(tmp_path / "cut") == records
  assert cut["params_fingerprint"] == whole["params_fingerprint"]
  assert cut["after"] == whole["after"]
