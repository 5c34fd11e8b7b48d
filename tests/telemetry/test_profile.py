"""Which iterations are traced, and what the trace holds."""

import shutil
from collections import Counter

import jax
import pytest
from jax.profiler import ProfileData

from d1jax import recipe
from d1jax.parallel import multihost
from d1jax.telemetry import profile
from tests import runs
from tests.jobs import small


def events(folder):
  """The events of the only trace in a folder."""
  (path,) = folder.rglob("*.xplane.pb")
  return [e for plane in ProfileData.from_file(str(path)).planes for line in plane.lines for e in line.events]


def traced_steps(folder):
  """{name: step numbers} of the step annotations of a trace."""
  found = {}
  for event in events(folder):
    stats = dict(event.stats)
    if "step_num" in stats:
      found.setdefault(event.name, []).append(stats["step_num"])
  return found


@pytest.mark.parametrize(("steps", "found"), [(None, []), ("2:4", [2, 3, 4]), ("7:7", [7]), ("1:8", list(range(1, 9)))])
def test_both_ends_are_included(steps, found):
  assert list(profile.iterations(steps, 8)) == found


@pytest.mark.parametrize("steps", ["", "3", "0:2", "3:2", "7:9", "-1:2", "1:2:3", "a:b", "2:"])
def test_what_names_no_iterations_is_refused(steps):
  with pytest.raises(ValueError, match=r"must be FIRST:LAST, .*for example 1:8$"):
    profile.iterations(steps, 8)


def test_the_chosen_iterations_are_steps_of_the_trace(tmp_path):
  traced = profile.Profile(range(3, 5), "grpo", tmp_path)
  for number in range(1, 7):
    with traced.iteration(number):
      jax.block_until_ready(jax.numpy.ones(3) + number)
    assert bool(list(tmp_path.rglob("*.pb"))) == (number >= 4)
  traced.close()
  assert traced_steps(tmp_path) == {"grpo": [3, 4]}


def test_a_run_that_ends_in_between_leaves_its_trace(tmp_path):
  traced = profile.Profile(range(1, 5), "sft", tmp_path)
  with pytest.raises(KeyError), traced.iteration(1):
    raise KeyError
  traced.close()
  assert traced_steps(tmp_path) == {"sft": [1]}


def test_a_bucket_takes_a_trace(tmp_path, bucket):
  traced = profile.Profile(range(1, 2), "grpo", bucket / "run/profile")
  with traced.iteration(1):
    pass
  (path,) = (bucket / "run/profile/plugins/profile").glob("*/*.xplane.pb")
  (tmp_path / path.name).write_bytes(path.read_bytes())
  assert traced_steps(tmp_path) == {"grpo": [1]}


def test_other_processes_trace_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(multihost, "is_main", lambda: False)
  with profile.Profile(range(1, 3), "sft", tmp_path).iteration(1):
    pass
  assert list(tmp_path.iterdir()) == []


@pytest.mark.slow(reason="runs the recipe")
def test_a_run_traces_what_it_is_told_and_names_its_parts(tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(runs.finished()[0], workdir)
  assert not (workdir / "profile").exists()
  # A run that goes on may be looked at, and is told which iterations are its own.
  recipe.run(small(workdir, **runs.CHANGES | {"grpo__steps": 8}, profile_steps="6:7"))
  assert traced_steps(workdir / "profile") == {"grpo": [6, 7]}
  counted = Counter(event.name for event in events(workdir / "profile"))
  # Two chunks an iteration, and grades that are waited for at its end; iteration 6 validates and is saved, and its page
  # is drawn.
  expected = {"rollout": 4, "grading": 6, "update": 2, "validation": 1, "saving": 2}
  assert {name: counted[name] for name in expected} == expected
