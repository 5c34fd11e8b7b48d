"""Jobs on several tasks, and on a task of a user's own, through the configuration."""

from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from d1jax import recipe
from d1jax.errors import RunError
from d1jax.run import experiment as experiments
from d1jax.run.metrics import read_records
from d1jax.training import dump
from tests.jobs import SMALL, load, small

PARITY = str(Path(__file__).parents[1] / "tasks/parity_task.py")

CUSTOM = {
  "task__module": PARITY,
  "data__prompt_buckets": (9,),
  "evaluation__prompt_buckets": (9,),
  "sft__prompt_buckets": (9,),
  "sft__completion_buckets": (5,),
  "rollout__completion_length": 5,
  "rollout__block_length": 5,
  "grpo__steps": 4,
}


def mixed(workdir: Path, **changes) -> ConfigDict:
  """A small job on Countdown and Sudoku."""
  config = load("grpo", "smoke,sudoku,countdown")
  fields = SMALL | {key.replace("__", "."): value for key, value in changes.items()} | {"workdir": str(workdir)}
  for field, value in fields.items():
    config.update_from_flattened_dict({field: value})
  config.lock()
  return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A finished job on a mix, drawn three to one."""
  workdir = tmp_path_factory.mktemp("mixed")
  changes = {"task__mix__sudoku": 3.0, "rollout__temperature": 1.0, "grpo__prompts_per_iteration": 8}
  config = mixed(workdir, **changes, grpo__steps=4, grpo__dump_every=1)
  return workdir, config, recipe.run(config)


@pytest.mark.slow(reason="runs the recipe")
def test_prompts_are_drawn_by_the_weights(finished):
  """Eight prompts an iteration, four completions each: a Sudoku prompt is 33 tokens long, one of Countdown shorter."""
  workdir, _, _ = finished
  for iteration in range(4):
    lengths = dump.read(workdir / "rollouts", iteration).rollout.prompt_valid.sum(axis=1)
    assert (lengths == 33).sum() == 24
    assert (lengths < 25).sum() == 8
  records = [r for r in read_records(workdir / "metrics.jsonl") if r["stage"] == "grpo"]
  assert any(r["reward"] > 0 for r in records), "the test shows nothing"
  for r in records:
    for name in ("reward", "solved", "well_formed"):
      assert r[name] == pytest.approx(0.75 * r[f"sudoku/{name}"] + 0.25 * r[f"countdown/{name}"], abs=1e-6)
    assert r["cell_accuracy"] == r["sudoku/cell_accuracy"]
    assert "countdown/cell_accuracy" not in r


@pytest.mark.slow(reason="runs the recipe")
def test_each_task_has_its_share_of_the_results(finished):
  _, _, results = finished
  after = results["after"]
  assert after["n"] == 48
  assert after["solved"] == pytest.approx((after["sudoku/solved"] + after["countdown/solved"]) / 2)
  assert after["cell_accuracy"] == after["sudoku/cell_accuracy"]
  assert results["config"]["task"]["name"] == "countdown+sudoku"
  assert {name: split["n"] for name, split in results["splits"].items()} == {
    "demonstrations": 32,
    "train": 128,
    "validation": 32,
    "test": 48,
  }


def test_the_order_of_the_words_does_not_matter():
  assert load("grpo", "smoke,sudoku,countdown").to_dict() == load("grpo", "countdown,smoke,sudoku").to_dict()
  assert load("grpo", "smoke,sudoku,sudoku").to_dict() == load("grpo", "smoke,sudoku").to_dict()


@pytest.mark.parametrize("size", ["tiny", "llada_8b"])
@pytest.mark.parametrize("tasks", [("sudoku", "countdown"), ("gsm8k", "math", "sudoku", "countdown")])
def test_a_mix_has_room_for_the_longest_of_its_tasks(size, tasks):
  mix = load("grpo", ",".join((size, *tasks)))
  for task in tasks:
    alone = load("grpo", f"{size},{task}")
    for section, field in [
      *(("data", "prompt_buckets"), ("sft", "prompt_buckets"), ("sft", "completion_buckets")),
      *(("evaluation", "prompt_buckets"), ("rollout", "completion_length"), ("rollout", "block_length")),
    ]:
      assert np.max(mix[section][field]) >= np.max(alone[section][field])
    assert mix.grpo.steps >= alone.grpo.steps
    if (size, task) == ("tiny", "countdown"):  # alone it has easier problems, of which there are too few for a mix
      assert (mix.task.options.to_dict().get(task), alone.task.options.largest) == (None, 20)
    else:
      assert mix.task.options.to_dict().get(task, {}) == alone.task.options.to_dict()
    assert mix.task.mix[task] == 1.0
  assert mix.rollout.completion_length % mix.rollout.block_length == 0
  if size == "tiny" and len(tasks) == 2:
    assert mix.data.prompt_buckets == (33,)
    assert mix.rollout.completion_length == mix.rollout.block_length == 24


@pytest.mark.slow(reason="trains a tokenizer")
def test_a_tokenizer_of_a_mix_knows_the_characters_of_every_task(tmp_path):
  config = mixed(tmp_path, task__sizes__demonstrations=1, task__sizes__train=3000)
  experiment = experiments.build(config, None)
  tokenizer = experiment.tokenizer
  for text in ("12+3*(45-6)/7", "abcdefghijklmnop", "1234432121433412"):
    assert tokenizer.decode_all([tokenizer.completion(text)]) == [text]


@pytest.mark.slow(reason="runs the recipe")
def test_a_task_of_a_users_file_is_trained_in_workers(tmp_path):
  results = recipe.run(small(tmp_path, **CUSTOM, task__options={"share": 0.5}, grpo__grading_workers=2))
  assert results["after"]["n"] == 24
  assert results["baseline"]["solved"] == pytest.approx(0.5, abs=0.25)
  assert results["after"]["well_formed"] > 0.5, "the words are learned, if not which"
  records = [r for r in read_records(tmp_path / "metrics.jsonl") if r["stage"] == "grpo"]
  assert all({"reward/word", "reward/right", "solved"} <= set(r) for r in records)
  assert any(r["reward_std"] > 0 for r in records)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"task__mix__sudoku": 0.0}, "the weight of sudoku in the mix is 0.0; give a positive number"),
    (
      {"task__name": "sudoku"},
      r"task\.mix is of countdown\+sudoku, but task\.name=sudoku and task\.module=None: a mix",
    ),
    ({"task__module": PARITY}, r"task\.mix is of countdown\+sudoku, but .* task\.module=.*parity_task\.py"),
    (
      {"task__options": {"gsm8k": {}}},
      "unknown task in the options of a mix 'gsm8k'; choose one of: countdown, sudoku",
    ),
    ({"task__mix": {"sudoku": 1.0, "chess": 1.0}}, "unknown task 'chess'"),
    ({"data__prompt_buckets": (24,)}, "no record of sudoku is left; raise the prompt buckets"),
  ],
)
def test_a_wrong_mix_is_one_line(tmp_path, changes, message):
  with pytest.raises(RunError, match=message) as caught:
    recipe.run(mixed(tmp_path / "run", **changes))
  assert "\n" not in str(caught.value)


def test_a_wrong_file_of_a_task_is_one_line_and_claims_no_folder(tmp_path):
  with pytest.raises(RunError, match=r"absent\.py: no such Python file under"):
    recipe.run(small(tmp_path / "run", task__module=str(tmp_path / "absent.py")))
  assert not (tmp_path / "run").exists()
