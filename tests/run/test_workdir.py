import errno
import json
import os
import shutil

import pytest

from d1jax.errors import RunError
from d1jax.run import workdir as workdirs
from d1jax.run.identity import check_splits, holds_run
from d1jax.run.workdir import claim, is_workdir, local, read_tokenizer, write_atomically
from tests.run.test_identity import CONFIG, FILES, SPLITS, changed


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


def test_a_file_in_the_way_is_a_run_error(tmp_path):
  (tmp_path / "file").write_text("")
  for folder in (tmp_path / "file", tmp_path / "file" / "run"):
    assert not holds_run(folder, CONFIG)
    with pytest.raises(RunError, match="cannot be written"):
      claim(folder, CONFIG, FILES, SPLITS)


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
    check_splits(run, CONFIG, SPLITS | {"test": {"n": 2, "sha256": "c"}})


def test_a_draft_is_nobody_elses_file_and_no_part_of_a_tokenizer(tmp_path):
  (tmp_path / "x.tmp").write_text("mine")
  write_atomically(tmp_path / "x", b"new")
  assert (tmp_path / "x.tmp").read_text() == "mine"
  claim(tmp_path / "run", CONFIG, FILES, SPLITS)
  (tmp_path / "run" / "tokenizer" / f".tokenizer.json.1234{workdirs.DRAFT}").write_text("half")
  assert read_tokenizer(tmp_path / "run") == FILES


def test_a_folder_in_the_place_of_a_file_is_one_line(tmp_path):
  (tmp_path / "results.json").mkdir()
  with pytest.raises(RunError, match=r"results\.json is a folder, expected a file: move it away"):
    write_atomically(tmp_path / "results.json", b"{}")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOENT, errno.ENAMETOOLONG])
def test_a_disk_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, number):
  def fail(descriptor):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(workdirs.os, "fsync", fail)
  with pytest.raises(RunError, match="cannot be written"):
    claim(tmp_path, CONFIG, FILES, SPLITS)


def test_a_damaged_tokenizer_is_one_line(tmp_path):
  claim(tmp_path, CONFIG, FILES, SPLITS)
  (tmp_path / "tokenizer" / "x").mkdir()
  with pytest.raises(RunError, match="tokenizer/x is a folder, expected a file"):
    read_tokenizer(tmp_path)
  shutil.rmtree(tmp_path / "tokenizer")
  (tmp_path / "tokenizer").mkdir()
  with pytest.raises(RunError, match="tokenizer is empty"):
    read_tokenizer(tmp_path)


def test_a_work_directory_is_known_by_what_it_holds(tmp_path):
  for name in ("20251129", "\u00b2", "runs"):
    assert not is_workdir(tmp_path / name)
    (tmp_path / name / "checkpoints").mkdir(parents=True)
    assert is_workdir(tmp_path / name)


def test_a_path_in_a_bucket_is_refused_where_it_must_be_local():
  assert str(local("output", "a/b")) == "a/b"
  with pytest.raises(RunError, match=r"config\.output=gs://bucket/x is no path of this machine"):
    local("output", "gs://bucket/x")


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_not_the_current_folder(name):
  with pytest.raises(RunError, match="empty name"):
    workdirs.folder(name)
