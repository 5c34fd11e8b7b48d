"""The results of a finished run, whatever became of their file."""

import json

import pytest

from d1jax.errors import RunError
from d1jax.results import finished_results
from d1jax.run.workdir import claim
from tests.damages import DAMAGES
from tests.jobs import small

ROW = {"solved": 0.5, "solved_interval": [0.25, 0.75], "n": 88}


@pytest.fixture
def finished(tmp_path):
  """Folder and configuration of a run that nobody trained."""
  config = small(tmp_path, "sft")
  claim(tmp_path, config.to_dict(), {"tokenizer.model": b""}, {})
  results = {"baseline": ROW, "after": ROW, "seconds": {"sft": 1.0}, "samples": [], "task": "sudoku"}
  (tmp_path / "results.json").write_text(json.dumps(results | {"checkpoint": "x", "config": config.to_dict()}))
  return tmp_path, config


def test_a_finished_run_is_known(finished):
  workdir, config = finished
  assert finished_results(workdir, config)["after"] == ROW
  with config.unlocked():
    config.sft.steps += 1
  assert finished_results(workdir, config) is None, "it goes on"


@pytest.mark.parametrize("how", [how for how in DAMAGES if how != "a folder"])
def test_damaged_results_are_said_and_written_anew(finished, how, caplog):
  workdir, config = finished
  DAMAGES[how](workdir / "results.json")
  assert finished_results(workdir, config) is None
  assert ("results.json is damaged" in caplog.text) == (how != "deleted")
  assert all("\n" not in record.message for record in caplog.records)


@pytest.mark.parametrize("field", ["baseline", "after", "seconds", "samples", "task", "checkpoint", "config"])
@pytest.mark.parametrize("value", ["absent", None, 3, [3]])
def test_results_that_lack_something_are_written_anew(finished, field, value):
  workdir, config = finished
  path = workdir / "results.json"
  results = json.loads(path.read_text())
  del results[field]
  path.write_text(json.dumps(results if value == "absent" else results | {field: value}))
  found = finished_results(workdir, config)
  assert found is None or (field in ("task", "checkpoint") and value != "absent")


def test_a_folder_in_the_place_of_the_results_is_one_line(finished):
  workdir, config = finished
  DAMAGES["a folder"](workdir / "results.json")
  with pytest.raises(RunError, match=r"results\.json is a folder, expected a file: move it away"):
    finished_results(workdir, config)
