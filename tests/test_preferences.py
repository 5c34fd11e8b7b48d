"""Preference tuning as a run: pairs from graded rollouts and from files, the reference, a resume."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest

from d1jax import recipe
from d1jax.errors import RunError
from d1jax.evaluation import rollout_answers
from d1jax.preferences import Preferences
from d1jax.run import experiment as experiments
from d1jax.run.identity import holds_run
from d1jax.run.metrics import read_records
from d1jax.training import configured, dpo
from tests import jobs
from tests.session import shared

OWN = {
  "dpo__steps": 6,
  "dpo__validate_every": 3,
  "dpo__learning_rate": 3e-3,
  "dpo__batch_size": 8,
  "dpo__prompt_buckets": (56,),
  "dpo__completion_buckets": (24,),  # a text may have more tokens than its answer was sampled with
  "dpo__samples": 2,
  "pairs__questions": 64,
  "pairs__held_out": 0.3,
}


def job(workdir, **changes):
  return jobs.started(workdir, "dpo", **(OWN | changes))


def rows(workdir):
  return [json.loads(line) for line in (workdir / "pairs.jsonl").read_text().splitlines()]


def finished():
  """A run from a model that solves nothing: a right answer is one that is well-formed."""

  def make(workdir):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(rollout_answers, "METRIC", "well_formed")
      return recipe.run(job(workdir))

  return shared("preferences", make)


@pytest.mark.slow(reason="runs the recipe")
def test_pairs_of_graded_rollouts_train_validate_and_resume_bit_for_bit():
  workdir, results = finished()
  made = rows(workdir)
  assert made
  task = experiments.build(job(workdir), None).task
  for row in made:
    record = task.records("train")[row["made"]["question"]]
    grades = [task.grade(row[side], record).metrics["well_formed"] for side in ("chosen", "rejected")]
    assert [reached == possible for reached, possible in grades] == [True, False]
    assert row["messages"] == task.prompt(record, "terse")[0]
  records = [r for r in read_records(workdir / "metrics.jsonl") if r["stage"] == "dpo"]
  assert records[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
  assert records[0]["margin"] == pytest.approx(0, abs=1e-4)
  assert records[-1]["margin"] > 0.01
  assert {"validation", "held_out/accuracy", "held_out/margin", "held_out/loss"} <= records[2].keys()
  assert set(results["seconds"]) == {"dpo", "this_invocation"}

  again = workdir.with_name("preferences-again")  # which finds the compiled programs beside it
  shutil.copytree(workdir, again)
  for path in (again / "results.json", again / "checkpoints" / "dpo" / "6"):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  assert recipe.run(job(again))["params_fingerprint"] == results["params_fingerprint"]
  for path in (again / "results.json", again / "checkpoints" / "dpo" / "6"):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in made]
  (again / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in swapped))
  with pytest.raises(RunError, match=r"pairs are not those .* put the file of pairs back"):
    recipe.run(job(again))


@pytest.mark.slow(reason="samples with programs of its own")
def test_another_run_makes_the_pairs_and_each_says_which(tmp_path, monkeypatch):
  monkeypatch.setattr(rollout_answers, "METRIC", "well_formed")
  workdir, results = finished()
  config = job(tmp_path, pairs__checkpoint=str(workdir), pairs__questions=32, pairs__held_out=0.0)
  made = Preferences(experiments.build(config, None), configured.preferences(config), tmp_path)
  made.prepare(None, lambda: None)
  assert made.held_out is None
  assert made.count == len(rows(tmp_path)) > 0
  for row in rows(tmp_path):
    assert row["made"]["checkpoint"] == results["checkpoint"]
    assert row["made"]["question"] < 32
  before = (tmp_path / "pairs.jsonl").read_bytes()
  monkeypatch.setattr(rollout_answers, "sample", None)  # sampling again would fail
  again = Preferences(experiments.build(config, None), configured.preferences(config), tmp_path)
  again.prepare(None, lambda: None)
  assert again.hash() == made.hash()
  assert (tmp_path / "pairs.jsonl").read_bytes() == before


@pytest.mark.slow(reason="compiles a step of its own")
def test_adapters_are_tuned_against_a_copy_of_themselves(tmp_path):
  """Also where they have been trained before, so that the base is not the reference."""
  config = job(tmp_path, lora__rank=4, lora__alpha=8.0, dpo__warmup_steps=0)
  experiment = experiments.build(config, None)
  model, options, tokenizer = experiment.model, configured.preferences(config), experiment.tokenizer
  answers = [tokenizer.completion(text) for text in ("1234", "4321")]
  prompt = tokenizer.prompt([{"role": "user", "content": "1234"}], "")
  found = dpo.PairTokens([prompt] * 2, answers, answers[::-1])
  optimizer = experiment.optimizer(config.dpo, 6)
  start = jax.tree.map(lambda x: x + 0.01, model.weights.start())
  frozen = model.weights.frozen._replace(reference=start)
  advance = dpo.advancer(model, found, options, optimizer, frozen, 0, seed=0)
  state, figures = advance(model.weights.state_from(start, optimizer), 0)
  assert figures["loss"] == pytest.approx(np.log(2), abs=1e-6)
  assert figures["margin"] == pytest.approx(0, abs=1e-5)
  _, figures = advance(state, 1)
  assert figures["chosen_gain"] != 0
  held_out = dpo.HeldOutPairs(model, options)(found, start, frozen)
  assert held_out["loss"] == pytest.approx(np.log(2), abs=1e-6)


@functools.cache
def built():
  return experiments.build(job(jobs.ROOT / "none"), None)


FILES = {
  "long": ({"chosen": "1" * 40}, r"1 of 1 pairs \(the first is line 1\) are longer than .*completion_buckets=\(24,\)"),
  "one question": ({}, r"pairs.held_out=0.3 parts 1 pairs into .* change the share, or add pairs"),
  "two sources": ({}, "name one of them"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_does_not_serve_is_refused_before_anything_is_computed(tmp_path, name):
  change, message = FILES[name]
  file = tmp_path / "pairs.jsonl"
  file.write_text(json.dumps({"prompt": "1234", "chosen": "1234", "rejected": "4321"} | change) + "\n")
  more = {"pairs__checkpoint": "runs/none"} if name == "two sources" else {}
  config = job(tmp_path / "run", pairs__file=str(file), **more)
  with pytest.raises(ValueError, match=message) as caught:
    Preferences(dataclasses.replace(built(), config=config), configured.preferences(config), tmp_path)
  assert "\n" not in str(caught.value)


def test_what_decides_the_pairs_may_change_until_they_are_trained_on(tmp_path):
  workdir, config = tmp_path / "run", job(tmp_path / "run").to_dict()
  workdir.mkdir()
  (workdir / "config.json").write_text(json.dumps(config))
  changed = config | {"pairs": config["pairs"] | {"samples": 32}}
  assert holds_run(workdir, changed)
  (workdir / "checkpoints" / "dpo").mkdir(parents=True)
  with pytest.raises(RunError, match=r"pairs\.samples was 8, now 32"):
    holds_run(workdir, changed)
