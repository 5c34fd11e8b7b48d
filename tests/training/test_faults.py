"""Jobs that are stopped, killed, starved and damaged, as real processes: nothing is lost, the end is the same bits."""

import json
import shutil
import signal

import pytest

from d1jax.training.metrics import read_records
from tests import jobs


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """The results of a job that ran in one go."""
  workdir = tmp_path_factory.mktemp("undisturbed")
  code, out, err = jobs.finish(jobs.start(*jobs.flags(workdir)))
  assert code == 0, err
  assert "SFT + diffu-GRPO" in out
  return json.loads((workdir / "results.json").read_text())


def resume_and_compare(workdir, undisturbed):
  """Runs the job again to its end, which must be that of the undisturbed one."""
  code, _, err = jobs.finish(jobs.start(*jobs.flags(workdir)))
  assert code == 0, err
  results = json.loads((workdir / "results.json").read_text())
  assert results["params_fingerprint"] == undisturbed["params_fingerprint"]
  for arm in ("before", "after"):
    assert results[arm] == undisturbed[arm]
  records = [(r["stage"], r["iteration"]) for r in read_records(workdir / "metrics.jsonl")]
  assert records == [(stage, i) for stage, n in (("sft", 120), ("grpo", 6)) for i in range(1, n + 1)]
  return err


@pytest.mark.parametrize(
  ("number", "code", "stage"), [(signal.SIGTERM, 75, "grpo"), (signal.SIGINT, 130, "sft")], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_stop_saves_and_the_job_goes_on(tmp_path, undisturbed, number, code, stage):
  process = jobs.start(*jobs.flags(tmp_path))
  jobs.wait_for(tmp_path, stage, 1, process)
  exit_code, _, err = jobs.interrupt(process, number)
  assert exit_code == code, err
  said = err.strip().splitlines()[-1]
  assert said.startswith(f"d1jax: {number.name}: saved at {stage} iteration")
  assert "run the same command again" in said
  stopped_at = int(said.split("iteration ")[1].split(";")[0])
  assert (tmp_path / "checkpoints" / stage / str(stopped_at)).is_dir()
  resume_and_compare(tmp_path, undisturbed)


@pytest.mark.parametrize(("stage", "iteration"), [("sft", 60), ("grpo", 3)])
def test_a_killed_job_ends_bit_identical(tmp_path, undisturbed, stage, iteration):
  process = jobs.start(*jobs.flags(tmp_path))
  jobs.wait_for(tmp_path, stage, iteration, process)
  assert jobs.interrupt(process, signal.SIGKILL)[0] == -signal.SIGKILL
  assert not (tmp_path / "results.json").exists()
  resume_and_compare(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [2, 6, 9, 12])
def test_a_kill_at_any_moment(tmp_path, undisturbed, delay):
  process = jobs.start(*jobs.flags(tmp_path))
  try:
    process.wait(timeout=delay)
  except jobs.subprocess.TimeoutExpired:
    jobs.interrupt(process, signal.SIGKILL)
  resume_and_compare(tmp_path, undisturbed)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  """The folder of a job that was stopped in its second stage."""
  workdir = tmp_path_factory.mktemp("stopped")
  process = jobs.start(*jobs.flags(workdir))
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


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, stopped, undisturbed, how):
  steps = stopped_job(stopped, tmp_path)
  damage(tmp_path / "checkpoints" / "grpo" / str(steps[-1]), how)
  err = resume_and_compare(tmp_path, undisturbed)
  assert f"grpo/{steps[-1]}" in err
  assert "falling back" in err
  assert f"going on from checkpoint {tmp_path}/checkpoints/grpo/{steps[-2]}" in err
  assert (tmp_path / "checkpoints" / "corrupt" / f"grpo-{steps[-1]}").is_dir()


def test_without_a_good_checkpoint_the_job_says_so(tmp_path, stopped):
  for step in stopped_job(stopped, tmp_path):
    shutil.rmtree(tmp_path / "checkpoints" / "grpo" / str(step) / "state")
  code, _, err = jobs.finish(jobs.start(*jobs.flags(tmp_path)))
  assert code == 2
  assert "can be read; delete the folder to start this stage again" in err.splitlines()[-1]


def test_a_loss_that_is_not_finite_stops_with_its_own_code(tmp_path):
  code, _, err = jobs.finish(jobs.start(*jobs.flags(tmp_path, sft__learning_rate=1e38)))
  assert code == 70
  said = err.strip().splitlines()[-1]
  assert "loss or gradient is not finite" in said
  assert "the same command goes on with the next batch" in said
  saved = [p for p in (tmp_path / "checkpoints" / "sft").iterdir() if p.name.isdigit()]
  assert saved, "the last finite state is saved"


def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path, undisturbed):
  """No file may grow beyond 24 KiB, which a checkpoint does; the same path as a full disk or quota takes."""
  code, _, err = jobs.finish(jobs.start(*jobs.flags(tmp_path), largest_file_kib=24))
  assert code == 74, err
  said = err.strip().splitlines()[-1]
  assert "took no more data" in said
  assert "run the same command again" in said
  resume_and_compare(tmp_path, undisturbed)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--config=configs/grpo.py", "--config.grpo.lerning_rate=1"], "unknown field 'lerning_rate' Did you mean"),
    (["--config=configs/grpo.py", "--config.grpo.learning_rate=fast"], "could not convert string to float: 'fast'"),
    (["--config=configs/grpo.py:tinny"], "unknown preset word 'tinny'; known: tiny, smoke, llada_8b"),
    (["--config=configs/grpo.py:tiny,smoke"], "preset words tiny, smoke exclude each other"),
    (["--config=configs/nothing.py"], "no such file; the configurations are in configs/"),
    (["--confg=configs/grpo.py"], "Unknown command line flag 'confg'"),
    (["--config=configs/grpo.py", "extra"], "unexpected argument 'extra'"),
    ([], "no configuration; try --config=configs/grpo.py"),
  ],
)
def test_a_wrong_command_line_is_one_line(arguments, message):
  code, out, err = jobs.finish(jobs.start(*arguments))
  assert code == 2
  assert out == ""
  assert len(err.splitlines()) == 1
  assert err.startswith("d1jax: ")
  assert message in err
