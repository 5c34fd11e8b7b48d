"""A job of two processes, one of which is killed again and again at random moments, ends with the bits of one that
nobody disturbed.
"""

import json
import random
import subprocess
import time

import pytest

from d1jax.run.metrics import read_records
from tests import jobs, runs

TIMEOUT = 20
"""Seconds that a process waits for another: at the start, and without a sign of life."""


def start(workdir):
  return jobs.start_processes(2, *jobs.flags(workdir, **jobs.BRIEF), timeout=TIMEOUT)


def wait(processes, seconds):
  """Whether all end by themselves within some seconds."""
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    if all(process.poll() is not None for process in processes):
      return True
    time.sleep(0.01)
  return False


def check_end(workdir, expected):
  results = [json.loads((folder / "results.json").read_text()) for folder in (workdir, expected)]
  for name in ("params_fingerprint", "before", "after", "samples", "best_iteration"):
    assert results[0][name] == results[1][name], name
  records = [read_records(folder / "metrics.jsonl") for folder in (workdir, expected)]
  seen = [[(r["stage"], r["iteration"], r["loss"], r.get("reward")) for r in one] for one in records]
  assert seen[0] == seen[1]


def finish(processes, workdir, expected):
  """Waits for processes that nobody kills."""
  found = jobs.finish_processes(processes)
  assert [code for code, _, _ in found] == [0, 0], found
  check_end(workdir, expected)


def kill(processes, victim, workdir):
  """Kills one; the other ends by itself, with a line that says what to do."""
  processes[victim].kill()
  try:
    code, _, err = jobs.finish(processes[1 - victim], timeout=3 * TIMEOUT)
  except subprocess.TimeoutExpired:
    pytest.fail(f"process {1 - victim} hangs, {3 * TIMEOUT} seconds after process {victim} was killed")
  finally:
    for process in processes:
      process.kill()
  if code:  # 0: it was about to end
    assert code == 75, err
    assert err.strip().splitlines()[-1].startswith("d1jax: "), err
  else:
    assert (workdir / "results.json").exists()


@pytest.mark.slow(reason="two processes, which start again and again")
@pytest.mark.parametrize("kills", [6])
def test_a_job_that_is_killed_at_random_moments_ends_the_same(tmp_path, kills):
  expected, _, seconds = runs.undisturbed(2)
  chance = random.Random(kills)
  ended, killed = 0, 0
  workdir = tmp_path / str(ended)
  while killed < kills:
    processes = start(workdir)
    if wait(processes, chance.uniform(0, 0.7 * seconds)):  # it compiled, and these read what it compiled
      finish(processes, workdir, expected)
      ended += 1
      workdir = tmp_path / str(ended)
    else:
      kill(processes, chance.randrange(2), workdir)
      killed += 1
  finish(start(workdir), workdir, expected)
