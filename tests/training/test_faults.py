"""Jobs that are stopped, killed, starved and damaged, as real processes: nothing is lost, the end is the same bits."""

import json
import shutil
import signal

import pytest

from d1jax.run.metrics import read_records
from tests import jobs, runs

SLOW = pytest.mark.slow(reason="processes of the whole recipe")
ONE_MORE = pytest.mark.slow(reason="one more process that imports JAX")


@pytest.fixture(scope="module")
def undisturbed():
  """The results of a job that ran in one go."""
  workdir, ((_, out, _),), _ = runs.undisturbed()
  assert "SFT + diffu-GRPO" in out
  return json.loads((workdir / "results.json").read_text())


def resume_and_compare(workdir, undisturbed, changes=jobs.BRIEF):
  """Runs the job again to its end, which must be that of the undisturbed one."""
  code, _, err = jobs.finish(jobs.start(*jobs.flags(workdir, **changes)))
  assert code == 0, err
  results = json.loads((workdir / "results.json").read_text())
  assert results["params_fingerprint"] == undisturbed["params_fingerprint"]
  for arm in ("before", "after"):
    assert results[arm] == undisturbed[arm]
  records = [(r["stage"], r["iteration"]) for r in read_records(workdir / "metrics.jsonl")]
  stages = (("sft", changes["sft__steps"]), ("grpo", 6))
  assert records == [(stage, i) for stage, n in stages for i in range(1, n + 1)]
  return err


def check_stopped(workdir, err, name, stage):
  """A job that was stopped has said so, and saved itself."""
  said = err.strip().splitlines()[-1]
  assert said.startswith(f"d1jax: {name}: saved at {stage} iteration")
  assert "run the same command again" in said
  stopped_at = int(said.split("iteration ")[1].split(";")[0])
  assert (workdir / "checkpoints" / stage / str(stopped_at)).is_dir()


@SLOW
def test_a_job_that_is_stopped_and_then_killed_ends_bit_identical(tmp_path):
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  code, _, err = jobs.finish(jobs.start(*jobs.flags(whole, **jobs.STARTED)))
  assert code == 0, err
  undisturbed = json.loads((whole / "results.json").read_text())
  process = jobs.start(*jobs.flags(broken, **jobs.STARTED))
  jobs.wait_for(broken, "grpo", 1, process)
  code, _, err = jobs.interrupt(process, signal.SIGTERM)
  assert code == 75, err
  check_stopped(broken, err, "SIGTERM", "grpo")
  process = jobs.start(*jobs.flags(broken, **jobs.STARTED))
  jobs.wait_for(broken, "grpo", 4, process)
  assert jobs.interrupt(process, signal.SIGKILL)[0] == -signal.SIGKILL
  assert not (broken / "results.json").exists()
  resume_and_compare(broken, undisturbed, jobs.STARTED)


@SLOW
def test_ctrl_c_saves_and_the_job_goes_on(tmp_path, undisturbed):
  process = jobs.start(*jobs.flags(tmp_path, **jobs.BRIEF))
  jobs.wait_for(tmp_path, "sft", 1, process)
  code, _, err = jobs.interrupt(process, signal.SIGINT)
  assert code == 130, err
  check_stopped(tmp_path, err, "SIGINT", "sft")
  resume_and_compare(tmp_path, undisturbed)


@SLOW
def test_a_job_killed_in_its_first_stage_ends_bit_identical(tmp_path, undisturbed):
  process = jobs.start(*jobs.flags(tmp_path, **jobs.BRIEF))
  jobs.wait_for(tmp_path, "sft", 30, process)
  assert jobs.interrupt(process, signal.SIGKILL)[0] == -signal.SIGKILL
  assert not (tmp_path / "results.json").exists()
  resume_and_compare(tmp_path, undisturbed)


@SLOW
@pytest.mark.parametrize("delay", [4, 8])
def test_a_kill_at_any_moment(tmp_path, undisturbed, delay):
  process = jobs.start(*jobs.flags(tmp_path, **jobs.BRIEF))
  try:
    process.wait(timeout=delay)
  except jobs.subprocess.TimeoutExpired:
    jobs.interrupt(process, signal.SIGKILL)
  resume_and_compare(tmp_path, undisturbed)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  """The folder of a job that was stopped in its second stage."""
  workdir = tmp_path_factory.mktemp("stopped")
  process = jobs.start(*jobs.flags(workdir, **jobs.BRIEF))
  jobs.wait_for(workdir, "grpo", 4, process)
  jobs.interrupt(process, signal.SIGTERM)
  return workdir


def stopped_job(stopped, workdir):
  """Makes `workdir` the stopped job; the steps of its checkpoints."""
  shutil.copytree(stopped, workdir, dirs_exist_ok=True)
  (workdir / "results.json").unlink(missing_ok=True)  # had it ended before the signal came
  steps = sorted(int(p.name) for p in (workdir / "checkpoints" / "grpo").iterdir() if p.name.isdigit())
  assert len(steps) >= 2
  return steps


def damage(folder, how):
  """Truncates or flips a byte in the largest file of a checkpoint."""
  largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  content = bytearray(largest.read_bytes())
  if how == "truncated":
    content = content[: len(content) // 2]
  else:
    content[len(content) // 2] ^= 0x40
  largest.write_bytes(content)


@SLOW
@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, stopped, undisturbed, how):
  steps = stopped_job(stopped, tmp_path)
  damage(tmp_path / "checkpoints" / "grpo" / str(steps[-1]), how)
  err = resume_and_compare(tmp_path, undisturbed)
  assert f"grpo/{steps[-1]}" in err
  assert "falling back" in err
  assert f"going on from checkpoint {tmp_path}/checkpoints/grpo/{steps[-2]}" in err
  assert (tmp_path / "checkpoints" / "corrupt" / f"grpo-{steps[-1]}").is_dir()


@SLOW
def test_without_a_good_checkpoint_the_job_says_so(tmp_path, stopped):
  for step in stopped_job(stopped, tmp_path):
    shutil.rmtree(tmp_path / "checkpoints" / "grpo" / str(step) / "state")
  code, _, err = jobs.finish(jobs.start(*jobs.flags(tmp_path, **jobs.BRIEF)))
  assert code == 2
  assert "can be read; delete the folder to start this stage again" in err.splitlines()[-1]


@SLOW
def test_a_loss_that_is_not_finite_stops_with_its_own_code(tmp_path):
  code, _, err = jobs.finish(jobs.start(*jobs.flags(tmp_path, **jobs.BRIEF, sft__learning_rate=1e38)))
  assert code == 70
  said = err.strip().splitlines()[-1]
  assert "loss or gradient is not finite" in said
  assert "the same command goes on with the next batch" in said
  saved = [p for p in (tmp_path / "checkpoints" / "sft").iterdir() if p.name.isdigit()]
  assert saved, "the last finite state is saved"


@SLOW
def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path, undisturbed):
  """No file may grow beyond 24 KiB, which a checkpoint does; the same path as a full disk or quota takes."""
  code, _, err = jobs.finish(jobs.start(*jobs.flags(tmp_path, **jobs.BRIEF), largest_file_kib=24))
  assert code == 74, err
  said = err.strip().splitlines()[-1]
  assert "took no more data" in said
  assert "run the same command again" in said
  resume_and_compare(tmp_path, undisturbed)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--config=configs/grpo.py", "--config.grpo.lerning_rate=1"], "unknown field 'lerning_rate' Did you mean"),
    pytest.param(
      ["--config=configs/grpo.py", "--config.grpo.learning_rate=fast"],
      "could not convert string to float: 'fast'",
      marks=ONE_MORE,
    ),
    pytest.param(
      ["--config=configs/grpo.py:tinny"], "unknown preset word 'tinny'; known: tiny, smoke, lora, full", marks=ONE_MORE
    ),
    pytest.param(
      ["--config=configs/grpo.py:tiny,smoke"], "preset words tiny, smoke exclude each other", marks=ONE_MORE
    ),
    pytest.param(["--config=configs/nothing.py"], "no such file; the configurations are in configs/", marks=ONE_MORE),
    pytest.param(["--confg=configs/grpo.py"], "Unknown command line flag 'confg'", marks=ONE_MORE),
    pytest.param(["--config=configs/grpo.py", "extra"], "unexpected argument 'extra'", marks=ONE_MORE),
    pytest.param([], "no configuration; try --config=configs/grpo.py", marks=ONE_MORE),
  ],
)
def test_a_wrong_command_line_is_one_line(arguments, message):
  code, out, err = jobs.finish(jobs.start(*arguments))
  assert code == 2
  assert out == ""
  assert len(err.splitlines()) == 1
  assert err.startswith("d1jax: ")
  assert message in err
