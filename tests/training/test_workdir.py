import json

import pytest

from d1jax.errors import RunError
from d1jax.training import workdir as workdirs
from d1jax.training.workdir import (
  check_splits,
  claim,
  flatten,
  holds_run,
  may_change,
  read_tokenizer,
  write_atomically,
)

CONFIG = {
  "seed": 0,
  "workdir": "a",
  "mesh": {"data": 1, "fsdp": 1},
  "rules": {"batch": ("data", "fsdp")},
  "cpu_devices": 2,
  "sft": {"steps": 10, "learning_rate": 0.1},
  "grpo": {"steps": 5, "dump_every": 0, "beta": 0.04},
  "data": {"prompt_buckets": (33,), "root": None},
}


def changed(name: str, value) -> dict:
  """`CONFIG` with one field, by its dotted name, replaced."""
  config = json.loads(json.dumps(CONFIG))
  *sections, leaf = name.split(".")
  target = config
  for section in sections:
    target = target[section]
  target[leaf] = value
  return config


SPLITS = {"train": {"n": 3, "sha256": "a"}, "test": {"n": 2, "sha256": "b"}}
FILES = {"tokenizer.json": b"{}", "config.json": b"the model's own"}


def test_a_new_folder_holds_no_run_and_is_not_touched(tmp_path):
  assert not holds_run(tmp_path / "run", CONFIG)
  assert not list(tmp_path.iterdir())


def test_a_claim_makes_the_folder_with_configuration_and_tokenizer(tmp_path):
  folder = tmp_path / "deep" / "run"
  claim(folder, CONFIG, FILES, SPLITS)
  assert json.loads((folder / "config.json").read_text()) == json.loads(json.dumps(CONFIG))
  assert read_tokenizer(folder) == FILES
  assert json.loads((folder / "splits.json").read_text()) == SPLITS
  assert len(list(folder.iterdir())) == 3


def test_a_run_meets_the_questions_that_it_began_with(tmp_path):
  check_splits(tmp_path, SPLITS)  # nothing is known yet
  claim(tmp_path, CONFIG, FILES, SPLITS)
  check_splits(tmp_path, SPLITS)
  check_splits(tmp_path, SPLITS | {"validation": {"n": 1, "sha256": "c"}})
  with pytest.raises(RunError, match=r"the questions of test are not those that .*; restore them"):
    check_splits(tmp_path, SPLITS | {"test": {"n": 2, "sha256": "x"}})


def test_the_revision_is_a_hash_of_the_package_and_the_commit(tmp_path, monkeypatch):
  found = workdirs.revision()
  assert found == workdirs.revision()
  assert len(found["source"]) == 64
  package = tmp_path / "d1jax" / "training"
  package.mkdir(parents=True)
  monkeypatch.setattr(workdirs, "__file__", str(package / "workdir.py"))
  lone = workdirs.revision()
  assert lone["commit"] is None
  (package / "workdir.py").write_text("1")
  assert workdirs.revision()["source"] != lone["source"] != found["source"]


def test_a_tokenizer_is_looked_for_in_a_work_directory(tmp_path):
  with pytest.raises(RunError, match="inside the work directory"):
    read_tokenizer(tmp_path)


def test_the_configuration_comes_last(tmp_path, monkeypatch):
  def fail(path, value):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(workdirs, "write_json", fail)
  with pytest.raises(OSError, match="No space"):
    claim(tmp_path, CONFIG, FILES, SPLITS)
  assert [p.name for p in tmp_path.iterdir()] == ["tokenizer"]
  assert not holds_run(tmp_path, CONFIG)


def test_the_same_config_may_go_on(tmp_path):
  claim(tmp_path, CONFIG, FILES, SPLITS)
  assert holds_run(tmp_path, CONFIG)


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
    ("grpo.grading_workers", 2),
  ],
)
def test_placement_totals_and_logging_may_change(tmp_path, name, value):
  claim(tmp_path, CONFIG, FILES, SPLITS)
  assert holds_run(tmp_path, changed(name, value))


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("seed", 1),
    ("sft.learning_rate", 0.2),
    ("grpo.beta", 0.0),
    ("data.prompt_buckets", [33, 64]),
    ("data.root", "/x"),
    ("sft.extra", 3),
  ],
)
def test_anything_else_is_another_run_and_named(tmp_path, name, value):
  claim(tmp_path, CONFIG, FILES, SPLITS)
  with pytest.raises(RunError, match=rf"{name} was .*, now .*--config.workdir") as caught:
    holds_run(tmp_path, changed(name, value))
  assert str(tmp_path) in str(caught.value)
  assert caught.value.exit_code == 2
  assert json.loads((tmp_path / "config.json").read_text()) == json.loads(json.dumps(CONFIG)), "left as it was"


def test_a_field_that_is_gone_is_named(tmp_path):
  claim(tmp_path, CONFIG, FILES, SPLITS)
  with pytest.raises(RunError, match=r"grpo\.beta was 0\.04, now None"):
    holds_run(tmp_path, {k: v for k, v in CONFIG.items() if k != "grpo"})


def test_many_differences_are_cut_short(tmp_path):
  claim(tmp_path, {f"f{i}": 0 for i in range(5)}, FILES, SPLITS)
  with pytest.raises(RunError, match=r"f0 was 0, now 1, f1 was 0, now 1, f2 was 0, now 1, \.\.\."):
    holds_run(tmp_path, {f"f{i}": 1 for i in range(5)})


def test_a_file_in_the_way_is_a_run_error(tmp_path):
  (tmp_path / "file").write_text("")
  for folder in (tmp_path / "file", tmp_path / "file" / "run"):
    assert not holds_run(folder, CONFIG)
    with pytest.raises(RunError, match="cannot be written"):
      claim(folder, CONFIG, FILES, SPLITS)


@pytest.mark.parametrize(
  ("name", "allowed"),
  [
    ("mesh", True),
    ("mesh.data", True),
    ("meshes", False),
    ("sft.steps", True),
    ("sft.stepsize", False),
    ("sft", False),
  ],
)
def test_prefixes_are_whole_names(name, allowed):
  assert may_change(name) == allowed


def test_flatten():
  assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}


def test_writing_replaces_and_leaves_no_draft(tmp_path):
  path = tmp_path / "x"
  write_atomically(path, b"old")
  write_atomically(path, b"new")
  assert path.read_bytes() == b"new"
  assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "x"
  write_atomically(path, b"old")

  def fail(descriptor):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(workdirs.os, "fsync", fail)
  with pytest.raises(OSError, match="No space"):
    write_atomically(path, b"new and longer")
  assert path.read_bytes() == b"old"


def test_versions_name_what_decides_numbers():
  found = workdirs.versions()
  assert {"python", "jax", "jaxlib", "flax", "optax", "numpy"} <= found.keys()
  assert all(found.values())


def test_a_bucket_is_claimed_and_known_as_a_folder_is(bucket):
  run = workdirs.folder("gs://bucket/deep/run")
  assert not holds_run(run, CONFIG)
  claim(run, CONFIG, FILES, SPLITS)
  assert sorted(path.name for path in run.iterdir()) == ["config.json", "splits.json", "tokenizer"]
  assert holds_run(run, changed("mesh.data", 4))
  assert read_tokenizer(run) == FILES
  with pytest.raises(RunError, match=r"gs://bucket/deep/run holds a run of another config \(seed was 0, now 1\)"):
    holds_run(run, changed("seed", 1))
  with pytest.raises(RunError, match="the questions of test are not those that gs://bucket/deep/run began with"):
    check_splits(run, SPLITS | {"test": {"n": 2, "sha256": "c"}})
