"""Jobs that are stopped, killed, starved and damaged, as real processes: nothing is lost, the end is the same bits."""

import json
import os
import signal
import subprocess
import sys

import pytest

from d1jax.run.metrics import read_records
from tests import jobs, runs

SLOW = pytest.mark.slow(reason="processes of the whole recipe")


@pytest.fixture(scope="module")
def undisturbed():
  """The results of a job that ran in one go."""
  workdir, ((_, out, _),), _ = runs.undisturbed()
  assert "SFT + diffu-GRPO" in out
  return json.loads((workdir / "results.json").read_text())


def resume_and_compare(workdir, undisturbed):
  """Runs the job again to its end, which must be that of the undisturbed one; returns standard error."""
  code, _, err = jobs.finish(jobs.start(*jobs.flags(workdir, **jobs.BRIEF)))
  assert code == 0, err
  results = json.loads((workdir / "results.json").read_text())
  assert results["params_fingerprint"] == undisturbed["params_fingerprint"]
  for arm in ("before", "after"):
    assert results[arm] == undisturbed[arm]
  records = [(r["stage"], r["iteration"]) for r in read_records(workdir / "metrics.jsonl")]
  stages = (("sft", jobs.BRIEF["sft__steps"]), ("grpo", jobs.SMALL["grpo.steps"]))
  assert records == [(stage, i) for stage, n in stages for i in range(1, n + 1)]
  return err


def check_stopped(workdir, err, name, stage):
  """A job that was stopped has said so, and saved itself."""
  said = err.strip().splitlines()[-1]
  assert said.startswith(f"d1jax: {name}: saved at {stage} iteration")
  assert "run the same command again" in said
  stopped_at = int(said.split("iteration ")[1].split(";")[0])
  assert (workdir / "checkpoints" / stage / str(stopped_at)).is_dir()


def run_until(workdir, stage, iteration, number):
  """Starts the job, and sends it a signal at an iteration: (exit code, standard error)."""
  stale, process = jobs.written(workdir), jobs.start(*jobs.flags(workdir, **jobs.BRIEF))
  jobs.wait_for(workdir, stage, iteration, process, stale=stale)
  code, _, err = jobs.interrupt(process, number)
  assert not (workdir / "results.json").exists()
  return code, err


@SLOW
def test_a_job_that_is_disturbed_again_and_again_ends_bit_identical(tmp_path, undisturbed):
  """A full disk and a kill in the first stage, a stop and a bit that flips in the second.

  Ctrl-C is in test_grpo.py, and kills in the second stage are in tests/parallel/test_kills.py.
  """
  # No file may grow beyond 24 KiB, which a checkpoint does; the same path as a full disk or quota takes.
  code, _, err = jobs.finish(jobs.start(*jobs.flags(tmp_path, **jobs.BRIEF), largest_file_kib=24))
  assert code == 74, err
  said = err.strip().splitlines()[-1]
  assert "took no more data" in said
  assert "run the same command again" in said
  assert run_until(tmp_path, "sft", 30, signal.SIGKILL)[0] == -signal.SIGKILL
  code, err = run_until(tmp_path, "grpo", 3, signal.SIGTERM)
  assert code == 75, err
  check_stopped(tmp_path, err, "SIGTERM", "grpo")

  checkpoints = tmp_path / "checkpoints" / "grpo"
  *_, before, last = sorted(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
  flip(checkpoints / str(last))
  err = resume_and_compare(tmp_path, undisturbed)
  assert f"grpo/{last}" in err
  assert "falling back" in err
  assert f"going on from checkpoint {checkpoints}/{before}" in err
  assert (tmp_path / "checkpoints" / "corrupt" / f"grpo-{last}").is_dir()


def flip(folder):
  """Flips a bit in the largest file of a checkpoint."""
  largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 0x40
  largest.write_bytes(content)


WRONG = [
  (["--config=configs/grpo.py", "--config.grpo.learning_rate=fast"], "could not convert string to float: 'fast'"),
  (["--config=configs/grpo.py:tinny"], "unknown preset word 'tinny'; known: tiny, smoke, small, lora, full"),
  (["--config=configs/grpo.py:tiny,smoke"], "preset words tiny, smoke exclude each other"),
  (["--config=configs/nothing.py"], "no such file; the configurations are in configs/"),
  (["--confg=configs/grpo.py"], "Unknown command line flag 'confg'"),
  (["--config=configs/grpo.py", "extra"], "unexpected argument 'extra'"),
  ([], "no configuration; try --config=configs/grpo.py"),
]
FORKED = """
import json, os, sys
from d1jax import main
folder = sys.argv[1]
for number, arguments in enumerate(json.loads(sys.argv[2])):
  if not (child := os.fork()):
    for stream, name in ((1, "out"), (2, "err")):
      os.dup2(os.open(f"{folder}/{number}.{name}", os.O_CREAT | os.O_WRONLY), stream)
    sys.argv[1:] = arguments
    main.main()
    sys.exit(0)
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def check_refused(code, out, err, message):
  assert code == 2
  assert out == ""
  assert len(err.splitlines()) == 1
  assert err.startswith("d1jax: ")
  assert message in err


def test_a_wrong_command_line_is_one_line():
  process = jobs.start("--config=configs/grpo.py", "--config.grpo.lerning_rate=1")
  check_refused(*jobs.finish(process), "unknown field 'grpo.lerning_rate'; did you mean grpo.learning_rate or sft.")


@pytest.mark.slow(reason="one more process that imports JAX")
def test_any_wrong_command_line_is_one_line(tmp_path):
  """Each in a fork of a process that has imported the program."""
  lines = json.dumps([arguments for arguments, _ in WRONG])
  command = [sys.executable, "-c", FORKED, str(tmp_path), lines]
  environment = os.environ | {"PYTHONPATH": str(jobs.ROOT)}
  done = subprocess.run(command, cwd=jobs.ROOT, env=environment, capture_output=True, text=True, check=True)
  for number, (code, (_, message)) in enumerate(zip(done.stdout.split(), WRONG, strict=True)):
    out, err = ((tmp_path / f"{number}.{name}").read_text() for name in ("out", "err"))
    check_refused(int(code), out, err, message)
