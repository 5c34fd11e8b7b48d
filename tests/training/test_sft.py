"""Fine-tuning on a file: length buckets, truncation, the held-out loss."""

import json

import jax
import numpy as np
import pytest

from d1jax import recipe
from d1jax.errors import RunError
from d1jax.run import experiment as experiments
from d1jax.run.metrics import read_records
from d1jax.tasks import held_out
from d1jax.training import configured, sft
from d1jax.training.held_out_loss import HeldOutLoss
from tests.jobs import small

ROWS = [
  {"question": f"What is {i} + {i}?", "thinking_trajectories": [f"{i} and {i}. " * (1 + i % 4)], "attempt": f"{2 * i}"}
  for i in range(48)
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  (folder / "solved.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
  return folder


def job(root, workdir, **changes):
  fields = {
    "sft__data": str(root / "solved.jsonl"),
    "sft__held_out": 0.2,
    "sft__prompt_buckets": (160,),
    "sft__completion_buckets": (72, 112),
    "sft__steps": 8,
    "sft__validate_every": 4,
    "tokenizer__vocab_size": 512,
    "task__style": "d1",
    "evaluation__prompt_buckets": (900,),
  }
  return small(workdir, "sft", **(fields | changes))


@pytest.mark.slow(reason="runs the recipe")
def test_a_file_trains_in_buckets_and_validates_by_its_held_out_loss(root, tmp_path, capsys):
  results = recipe.run(job(root, tmp_path / "run"))
  records = read_records(tmp_path / "run" / "metrics.jsonl")
  validated = [r["validation"] for r in records if "validation" in r]
  assert len(validated) == 2
  assert validated[0] < validated[1] < 0, "minus the loss, which falls"
  assert results["after"]["n"] == 24
  out = capsys.readouterr().out
  assert "tokens in buckets of" in out
  computed = {round(r["tokens_per_second"] * r["seconds"]) for r in records}
  assert computed <= {16 * 72, 16 * 112}
  assert len(computed) == 2, "both buckets came"


def test_demonstrations_of_test_questions_are_left_out(root, tmp_path, capsys, monkeypatch):
  config = job(root, tmp_path, sft__held_out=0.0)
  asked = held_out.fingerprint(held_out.normalize(ROWS[3]["question"].upper()))
  monkeypatch.setattr(held_out, "listed", lambda task: frozenset([asked] if task == "math" else []))
  found, _ = configured.demonstrations(experiments.build(config, None))
  assert len(found.prompts) == len(ROWS) - 1
  assert "left out 1 of 48 demonstrations, which answer test questions" in capsys.readouterr().out


@pytest.mark.slow(reason="compiles an update for each pair of buckets")
def test_every_pair_of_buckets_is_compiled_before_the_first_step(root, tmp_path):
  config = job(root, tmp_path, sft__prompt_buckets=(140, 160))
  experiment = experiments.build(config, None)
  steps = sft.Steps(experiment.model, configured.fine_tuning(config), experiment.optimizer(config.sft, 8))
  assert set(steps.compiled) == {(140, 72), (140, 112), (160, 72), (160, 112)}


@pytest.mark.slow(reason="compiles programs of its own")
def test_the_held_out_loss_is_a_function_of_the_weights(root, tmp_path):
  config = job(root, tmp_path)
  experiment = experiments.build(config, None)
  _, validating = configured.demonstrations(experiment)
  made = lambda: HeldOutLoss(experiment.model, validating, configured.fine_tuning(config))
  loss = made()
  weights = experiment.model.weights
  start = weights.start()
  first, again = (
    loss(start, weights.frozen),
    made()(start, weights.frozen),
  )
  assert first == again
  # Uniform predictions: the loss a token is log V times the mean of masked / t, which is 1 in expectation.
  flat = {**start, "head": jax.tree.map(np.zeros_like, jax.device_get(start["head"]))}
  known = experiment.model.denoiser.vocab - len(experiment.model.denoiser.forbidden_ids)
  assert loss(flat, weights.frozen) == pytest.approx(-np.log(known), rel=0.15)


def test_long_answers_are_left_out_or_cut(root, tmp_path, capsys):
  for truncate, words in ((False, "left out"), (True, "cut")):
    config = job(root, tmp_path, sft__completion_buckets=(72, 80), sft__truncate=truncate)
    found, _ = configured.demonstrations(experiments.build(config, None))
    long = sum(len(answer) > 80 for answer in found.completions)
    assert 0 < long < len(found.completions)
    assert f"{words} {long} of {len(found.completions)} answers longer than 80 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"sft__data": "nowhere.jsonl"}, "nowhere.jsonl is missing, expected a file; check the path"),
    ({"sft__held_out": 1.0}, "held_out=1.0"),
    ({"sft__prompt_buckets": (20,)}, "none of .* demonstrations fits sft.prompt_buckets"),
  ],
)
def test_bad_files_and_buckets_are_one_line(root, tmp_path, changes, message):
  with pytest.raises(RunError, match=message) as caught:
    recipe.run(job(root, tmp_path / "run", **changes))
  assert "\n" not in str(caught.value)
  assert not (tmp_path / "run").exists()
