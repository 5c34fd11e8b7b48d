"""Where an export may be written is known before a model is read."""

import errno
import os

import pytest

from d1jax import export
from d1jax.errors import RunError
from tests.jobs import load


def exported(output) -> None:
  """Fails at the output, or at the checkpoint that is not there."""
  config = load("export")
  config.update(checkpoint="nowhere", output=str(output))
  export.run(config)


def make_file(path):
  path.write_text("mine")
  return path


def make_full(path):
  path.mkdir()
  (path / "thesis.tex").write_text("mine")
  return path


def make_link(path):
  (path.parent / "empty").mkdir()
  path.symlink_to(path.parent / "empty")
  return path


def make_dead_link(path):
  path.symlink_to("nowhere")
  return path


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (make_file, "out is a file, expected a folder"),
    (lambda path: make_file(path) / "deep", "out is a file, expected a folder"),
    (make_full, "out is not empty"),
    (make_link, "out is a link"),
    (make_dead_link, "out is a link to nothing"),
    (lambda path: path / ("x" * 300), r"cannot be written \(File name too long\); name another folder"),
    (lambda path: "/proc/out", r"/proc cannot be written \(No such file or directory\)"),
    (lambda path: "gs://bucket/out", r"config\.output=gs://bucket/out is no path of this machine"),
  ],
)
def test_an_output_that_is_in_use_is_refused_first(tmp_path, make, message, monkeypatch):
  monkeypatch.chdir(tmp_path)
  output = make(tmp_path / "out")
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(RunError, match=message):
    exported(output)
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["new", "deep/new", "empty"])
def test_a_new_or_empty_folder_is_fine_and_nothing_else_is_touched(tmp_path, name):
  (tmp_path / "empty").mkdir()
  for beside in ("new.tmp", "empty.tmp"):
    make_full(tmp_path / beside)
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(RunError, match="no checkpoint in nowhere"):
    exported(tmp_path / name)
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_disk_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, number):
  def fail(*arguments, **more):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(export.tempfile, "TemporaryDirectory", fail)
  with pytest.raises(RunError, match=f"{tmp_path} cannot be written"):
    exported(tmp_path / "out")


def test_no_local_folder_stands_for_a_bucket(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for field in ("pretrained", "adapter"):
    config = load("export")
    config.update({"pretrained": "base", "adapter": "adapter", "output": "out"} | {field: "gs://bucket/x"})
    with pytest.raises(RunError, match=rf"config\.{field}=gs://bucket/x is no path of this machine"):
      export.run(config)
  assert not list(tmp_path.iterdir())
