"""A job of two processes, one of which stands still, is killed or preempted, ends with the bits of one that nobody
disturbed.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import QUICK_TO_COMPILE, jobs, runs
from tests.launch.scripts import Machine

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
def test_a_job_that_is_killed_and_preempted_ends_the_same(tmp_path):
  """One process stands still, the first is killed in the first stage, the other one in the second; then the launch
  script starts both, and starts them again after one is preempted.
  """
  expected, _, _ = runs.undisturbed(2)
  workdir = tmp_path / "run"
  processes = start(workdir, timeout=10)
  jobs.wait_for(workdir, "sft", 5, processes[0])
  processes[1].send_signal(signal.SIGSTOP)
  code, _, err = jobs.finish(processes[0], timeout=60)
  processes[1].kill()
  assert code == 75, err
  assert "has not answered for 10 seconds" in err.strip().splitlines()[-1]

  for victim, stage, iteration in ((0, "sft", 21), (1, "grpo", 1)):
    stale, processes = jobs.written(workdir), start(workdir)
    jobs.wait_for(workdir, stage, iteration, processes[0], stale=stale)
    code, said = kill(processes, victim, workdir)
    assert code == 75
    assert "another process" in said
    assert re.search("run the same command again,? (it goes on|to resume) from the last checkpoint", said)

  code, out, err = launched_and_preempted(workdir, tmp_path / "machine")
  assert code == 0, err
  for number in (0, 1):
    assert f"process {number} ended with exit code 75" in err
  assert err.count("preempted; attempt 2 of 4") == 1
  assert "attempt 3" not in err
  assert "[0] Held-out split of sudoku, greedy, " in out
  assert "[1] Held-out split" not in out
  said = dict(re.findall(r"^\[(\d)\] d1jax: (SIGTERM: saved at grpo iteration \d+;.*)$", out, re.MULTILINE))
  assert set(said) == {"0", "1"}
  assert said["0"] == said["1"], "all save themselves at the same iteration"
  shown = re.findall(r"^\[0\] grpo (\d+)/\d+  (?!validation )", out, re.MULTILINE)
  assert len(shown) == len(set(shown)) > 2, "no iteration is made twice"
  runs.check_same_end(workdir, expected)


def launched_and_preempted(workdir, machine):
  """Goes on under launch/local.sh, and sends SIGTERM to process 1 alone: (exit code, standard output and error)."""
  environment = Machine(machine).environment(PYTHON=sys.executable, WORKDIR=str(workdir), RETRY_WAIT="1")
  environment["XLA_FLAGS"] = QUICK_TO_COMPILE
  flags = [flag for flag in jobs.flags(workdir, **jobs.BRIEF) if not flag.startswith("--config.workdir=")]
  stale, pipes = jobs.written(workdir), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  process = subprocess.Popen(
    ["launch/local.sh", *flags, "--config.cpu_devices=1"], cwd=jobs.ROOT, env=environment, **pipes
  )
  jobs.wait_for(workdir, "grpo", 2, process, stale=stale)
  own = {f"--config.workdir={workdir}", "--config.distributed.process=1"}
  (second,) = (int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if own <= set(_words(path)))
  os.kill(second, signal.SIGTERM)
  return jobs.finish(process, timeout=600)


def _words(path):
  """The command line of a process, or none where it has just ended."""
  try:
    return path.read_text().split("\0")
  except OSError:
    return []


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
