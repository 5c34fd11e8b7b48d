"""What makes a folder the folder of this run, whatever became of its files."""

import json

import pytest

from d1jax.errors import RunError
from d1jax.run.checkpoint import Checkpoints
from d1jax.run.identity import check_splits, flatten, holds_run, kind, record_changes
from d1jax.run.workdir import claim
from tests.damages import DAMAGES
from tests.run.test_checkpoint import state

CONFIG = {
  "mode": "grpo",
  "seed": 0,
  "workdir": "a",
  "mesh": {"data": 1, "fsdp": 1},
  "rules": {"batch": ("data", "fsdp")},
  "cpu_devices": 2,
  "sft": {"steps": 10, "learning_rate": 0.1},
  "grpo": {"steps": 5, "dump_every": 0, "beta": 0.04, "learning_rate": 1e-3, "accumulation": 1},
  "data": {"prompt_buckets": (33,), "root": None},
  "evaluation": {"batch_size": 16},
  "task": {"options": {}},
}


def changed(name: str, value) -> dict:
  """`CONFIG` with one field, by its dotted name, replaced."""
  config = json.loads(json.dumps(CONFIG))
  *sections, leaf = name.split(".")
  target = config
  for section in sections:
    target = target.setdefault(section, {})
  target[leaf] = value
  return config


SPLITS = {"train": {"n": 3, "sha256": "a"}, "test": {"n": 2, "sha256": "b"}}
FILES = {"tokenizer.json": b"{}", "config.json": b"the model's own"}


def test_the_same_config_may_go_on(tmp_path):
  claim(tmp_path, CONFIG, FILES, SPLITS)
  assert holds_run(tmp_path, CONFIG)


def test_slots_of_partial_rollouts_are_a_part_of_the_run(tmp_path):
  """They decide which weights draw which tokens."""
  for age, folder in ((0, tmp_path / "whole"), (1, tmp_path / "partial")):
    grpo = {"partial_age": age, "rollout_slots": 4}
    claim(folder, CONFIG | {"grpo": grpo}, FILES, SPLITS)
    other = CONFIG | {"grpo": grpo | {"rollout_slots": 8}}
    if not age:
      assert holds_run(folder, other)
      continue
    with pytest.raises(RunError, match=r"another config \(grpo.rollout_slots was 4, now 8\)"):
      holds_run(folder, other)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("workdir", "b"),
    ("mesh.data", 4),
    ("rules.batch", ["data"]),
    ("cpu_devices", 1),
    ("sft.steps", 99),
    ("grpo.steps", 99),
    ("grpo.dump_every", 1),
    ("trackers", "wandb"),
    ("sft.save_every", 2),
    ("grpo.patience", 3),
    ("grpo.max_skipped_steps", 3),
    ("grpo.grading_workers", 2),
    ("grpo.accumulation", 2),
    ("grpo.rollout_chunks", 4),
    ("grpo.logits_tile", 16),
    ("evaluation.batch_size", 8),
    ("model.remat", True),
    ("data.root", "/moved"),
    ("grpo.learning_rate", 1e-5),
  ],
)
def test_placement_totals_and_logging_may_change(tmp_path, name, value):
  claim(tmp_path, CONFIG, FILES, SPLITS)
  assert holds_run(tmp_path, changed(name, value))


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("seed", 1),
    ("grpo.beta", 0.0),
    ("data.prompt_buckets", [33, 64]),
    ("task.options", {"digits": 3}),
  ],
)
def test_anything_else_is_another_run_and_named(tmp_path, name, value):
  claim(tmp_path, CONFIG, FILES, SPLITS)
  with pytest.raises(RunError, match=rf"{name}.* was .*, now .*--config.workdir") as caught:
    holds_run(tmp_path, changed(name, value))
  assert str(tmp_path) in str(caught.value)
  assert caught.value.exit_code == 2
  assert json.loads((tmp_path / "config.json").read_text()) == json.loads(json.dumps(CONFIG)), "left as it was"


def test_a_field_that_is_gone_is_named(tmp_path):
  claim(tmp_path, CONFIG, FILES, SPLITS)
  with pytest.raises(RunError, match=r"grpo\.beta was 0\.04, now None"):
    holds_run(tmp_path, {k: v for k, v in CONFIG.items() if k != "grpo"})


def test_many_differences_are_cut_short(tmp_path):
  claim(tmp_path, {"mode": "grpo"} | {f"f{i}": 0 for i in range(5)}, FILES, SPLITS)
  with pytest.raises(RunError, match=r"f0 was 0, now 1, f1 was 0, now 1, f2 was 0, now 1, \.\.\."):
    holds_run(tmp_path, {f"f{i}": 1 for i in range(5)})


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("mesh", "placement"),
    ("mesh.data", "placement"),
    ("meshes", "identity"),
    ("sft.steps", "total"),
    ("sft.stepsize", "identity"),
    ("sft", "identity"),
    ("data.root", "place"),
    ("grpo.learning_rate", "recorded"),
  ],
)
def test_prefixes_are_whole_names(name, expected):
  assert kind(name) == expected


@pytest.mark.parametrize(("name", "value"), [("sft.steps", 99), ("sft.learning_rate", 0.2)])
def test_the_start_of_reinforcement_learning_is_settled_once_it_has_begun(tmp_path, name, value):
  claim(tmp_path, CONFIG, FILES, SPLITS)
  assert holds_run(tmp_path, changed(name, value))
  (tmp_path / "checkpoints" / "grpo").mkdir(parents=True)
  with pytest.raises(RunError, match=f"{name} was"):
    holds_run(tmp_path, changed(name, value))


@pytest.mark.parametrize(
  ("rank", "old", "new", "allowed"),
  [
    (8, "/a", "/b", True),  # the base of adapters has a fingerprint, which every stage compares
    (8, None, "/b", False),
    (8, "/a", None, False),
    (0, "/a", "/b", False),
  ],
)
def test_the_folder_of_a_base_may_move(tmp_path, rank, old, new, allowed):
  claim(tmp_path, CONFIG | {"lora": {"rank": rank}, "model": {"pretrained": old}}, FILES, SPLITS)
  config = CONFIG | {"lora": {"rank": rank}, "model": {"pretrained": new}}
  if allowed:
    assert holds_run(tmp_path, config)
  else:
    with pytest.raises(RunError, match=r"model\.pretrained was"):
      holds_run(tmp_path, config)


def test_what_changed_though_it_decides_results_is_recorded(tmp_path, caplog):
  claim(tmp_path, CONFIG, FILES, SPLITS)
  save(tmp_path, "grpo", 4)
  config = changed("grpo.learning_rate", 1e-5) | {"cpu_devices": 1}
  config["sft"]["new_field"] = 3  # of a release after the one that began the run
  assert holds_run(tmp_path, config)
  record_changes(tmp_path, config)
  claim(tmp_path, config, FILES, SPLITS)
  record_changes(tmp_path, config)  # nothing more
  lines = [json.loads(line) for line in (tmp_path / "changes.jsonl").read_text().splitlines()]
  assert [(one["field"], one["was"], one["now"], one["after"]) for one in lines] == [
    ("grpo.learning_rate", 1e-3, 1e-5, {"grpo": 4}),
    ("sft.new_field", None, 3, {"grpo": 4}),
  ]
  assert "grpo.learning_rate was 0.001, and is 1e-05 after grpo iteration 4" in caplog.text
  assert "sft.new_field is new since this run began; it goes on with 3" in caplog.text


def test_a_run_meets_the_questions_that_it_began_with(tmp_path):
  check_splits(tmp_path, CONFIG, SPLITS)  # nothing is known yet
  claim(tmp_path, CONFIG, FILES, SPLITS)
  more = SPLITS | {"validation": {"n": 1, "sha256": "c"}}
  check_splits(tmp_path, CONFIG, SPLITS)
  check_splits(tmp_path, CONFIG, more)
  check_splits(tmp_path, changed("data.root", "/moved"), SPLITS)
  with pytest.raises(RunError, match=r"the questions of test are not those that .*; restore them"):
    check_splits(tmp_path, CONFIG, SPLITS | {"test": {"n": 2, "sha256": "x"}})
  with pytest.raises(RunError, match=r"data\.root changed, and .* does not say what validation held"):
    check_splits(tmp_path, changed("data.root", "/moved"), more)


def save(workdir, stage: str, step: int) -> None:
  checkpoints = Checkpoints(workdir / "checkpoints" / stage, writes=True)
  checkpoints.save(step, state(step), {"config": json.loads(json.dumps(CONFIG)), "seconds": 0.0}, None)
  checkpoints.wait()
  checkpoints.close()


@pytest.mark.parametrize("how", DAMAGES)
def test_a_checkpoint_stands_in_for_a_damaged_configuration(tmp_path, how, caplog):
  claim(tmp_path, CONFIG, FILES, SPLITS)
  DAMAGES[how](tmp_path / "config.json")
  if how == "deleted":
    assert not holds_run(tmp_path, CONFIG)
  else:
    with pytest.raises(RunError, match=r"config\.json .* no checkpoint holds a copy of it: delete it"):
      holds_run(tmp_path, CONFIG)
  save(tmp_path, "sft", 3)
  assert holds_run(tmp_path, CONFIG)
  with pytest.raises(RunError, match="seed was 0, now 1"):
    holds_run(tmp_path, changed("seed", 1))
  record_changes(tmp_path, CONFIG)
  assert "a checkpoint holds a copy" in caplog.text


@pytest.mark.parametrize("how", [how for how in DAMAGES if how not in ("deleted", "another type inside")])
def test_damaged_splits_are_one_line_whose_remedy_works(tmp_path, how):
  claim(tmp_path, CONFIG, FILES, SPLITS)
  path = tmp_path / "splits.json"
  DAMAGES[how](path)
  if how != "an empty object":
    with pytest.raises(RunError, match=r"splits\.json .*; delete it to go on"):
      check_splits(tmp_path, CONFIG, SPLITS)
    path.rmdir() if path.is_dir() else path.unlink()
  check_splits(tmp_path, CONFIG, SPLITS)


def test_flatten():
  assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}
