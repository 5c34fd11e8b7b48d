"""A job of two processes, one of which stands still and is killed again and again, ends with the bits of one that
nobody disturbed.
"""

import random
import re
import signal
import subprocess
import time

import pytest

from tests import jobs, runs

TIMEOUT = 20
"""Seconds that a process waits for another: at the start, and without a sign of life."""


def start(workdir, timeout=TIMEOUT):
  return jobs.start_processes(2, *jobs.flags(workdir, **jobs.BRIEF), timeout=timeout)


def wait(processes, seconds):
  """Whether all end by themselves within some seconds."""
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    if all(process.poll() is not None for process in processes):
      return True
    time.sleep(0.01)
  return False


def finish(processes, workdir, expected):
  """Waits for processes that nobody kills."""
  found = jobs.finish_processes(processes)
  assert [code for code, _, _ in found] == [0, 0], found
  runs.check_same_end(workdir, expected)


def kill(processes, victim, workdir):
  """Kills one; the other ends by itself, with a line that says what to do, which is returned."""
  processes[victim].kill()
  try:
    code, _, err = jobs.finish(processes[1 - victim], timeout=3 * TIMEOUT)
  except subprocess.TimeoutExpired:
    pytest.fail(f"process {1 - victim} hangs, {3 * TIMEOUT} seconds after process {victim} was killed")
  finally:
    for process in processes:
      process.kill()
  said = err.strip().splitlines()[-1] if err.strip() else ""
  if code:  # 0: it was about to end
    assert code == 75, err
    assert said.startswith("d1jax: "), err
  else:
    assert (workdir / "results.json").exists()
  return code, said


@pytest.mark.slow(reason="two processes, which start again and again")
def test_a_job_that_is_killed_again_and_again_ends_the_same(tmp_path):
  expected, _, seconds = runs.undisturbed(2)
  processes = start(tmp_path, timeout=10)
  jobs.wait_for(tmp_path, "sft", 5, processes[0])
  processes[1].send_signal(signal.SIGSTOP)
  code, _, err = jobs.finish(processes[0], timeout=60)
  processes[1].kill()
  assert code == 75, err
  assert "has not answered for 10 seconds" in err.strip().splitlines()[-1]

  for victim, iteration in ((0, 1), (1, 2)):
    stale, processes = jobs.written(tmp_path), start(tmp_path)
    jobs.wait_for(tmp_path, "grpo", iteration, processes[0], stale=stale)
    code, said = kill(processes, victim, tmp_path)
    assert code == 75
    assert "another process" in said
    assert re.search("run the same command again,? (it goes on|to resume) from the last checkpoint", said)

  # At any moment: it compiled, and this one reads what it compiled.
  processes, chance = start(tmp_path), random.Random(6)
  if not wait(processes, chance.uniform(0, 0.5 * seconds)):
    kill(processes, chance.randrange(2), tmp_path)
    processes = start(tmp_path)
  finish(processes, tmp_path, expected)


@pytest.mark.long
@pytest.mark.slow(reason="two processes, which start again and again")
def test_a_job_that_is_killed_at_random_moments_ends_the_same(tmp_path):
  expected, _, seconds = runs.undisturbed(2)
  chance = random.Random(6)
  ended, killed = 0, 0
  workdir = tmp_path / str(ended)
  while killed < 6:
    processes = start(workdir)
    if wait(processes, chance.uniform(0, 0.7 * seconds)):  # it compiled, and these read what it compiled
      finish(processes, workdir, expected)
      ended += 1
      workdir = tmp_path / str(ended)
    else:
      kill(processes, chance.randrange(2), workdir)
      killed += 1
  finish(start(workdir), workdir, expected)
