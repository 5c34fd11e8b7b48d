"""Several real processes on one machine, over gloo: the same numbers as one process, and they end together."""

import json
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.errors import RunError
from d1jax.parallel import multihost
from d1jax.parallel.mesh import make_mesh, place, sharding
from d1jax.run.metrics import read_records
from tests import jobs, runs

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
ALONE = ("coordinator=127.0.0.1:1", "processes=2", "process=1", "timeout=2")

SLOW = pytest.mark.slow(reason="several processes of the recipe")


@pytest.fixture
def updates(monkeypatch) -> list[tuple[str, int]]:
  found: list[tuple[str, int]] = []
  monkeypatch.setattr(jax.config, "update", lambda *setting: found.append(setting))
  return found


def test_the_cpu_is_split(updates, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/nowhere")
  multihost.split_cpu(2)
  assert updates == [("jax_num_cpu_devices", 2)]


def test_a_number_set_by_hand_stands(updates, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
  multihost.split_cpu(2)
  assert updates == []


def test_a_number_of_devices_below_one_is_refused(updates):
  with pytest.raises(RunError, match="cpu_devices is 0; give at least 1"):
    multihost.split_cpu(0)


def test_a_run_takes_no_generator_and_no_precision_from_the_environment(updates, monkeypatch, caplog):
  monkeypatch.setattr(multihost, "split_cpu", lambda devices: None)
  multihost.prepare(2)
  assert updates == []
  with jax.threefry_partitionable(False), jax.enable_x64(True):
    multihost.prepare(2)
  assert updates == [("jax_threefry_partitionable", True), ("jax_enable_x64", False)]
  assert "JAX_ENABLE_X64 is set to True in the environment; a run needs False" in caplog.text


@pytest.mark.parametrize(
  ("error", "reason"), [(RuntimeError("Unable to initialize 'cuda'"), r" \(Unable to.*\)"), (AssertionError(), "")]
)
def test_a_platform_that_is_not_there_is_named(updates, monkeypatch, error, reason):
  def devices():
    raise error

  monkeypatch.setattr(multihost, "split_cpu", lambda devices: None)
  monkeypatch.setattr(jax, "devices", devices)
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  with pytest.raises(
    RunError, match=f"^JAX_PLATFORMS=cuda names a platform that JAX cannot use here{reason}: unset it"
  ):
    multihost.prepare(2)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"process": 2, "processes": 2, "coordinator": "h:1"}, r"process is 2; processes are numbered from 0, below .*=2"),
    ({"process": -1, "processes": 2, "coordinator": "h:1"}, "process is -1"),
    ({"coordinator": "h:1"}, r"distributed\.processes and distributed\.process must be set too"),
    ({"processes": 2, "process": 0}, r"distributed\.coordinator must be set too"),
    ({"coordinator": "host", "processes": 2, "process": 0}, "coordinator is 'host'; give HOST:PORT"),
    ({"processes": 0}, "processes is 0"),
    ({"timeout": 0}, "timeout is 0; give at least 1 second"),
  ],
)
def test_settings_that_do_not_fit_are_refused(monkeypatch, settings, message):
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  given = {"coordinator": None, "processes": None, "process": None, "timeout": 5} | settings
  with pytest.raises(RunError, match=message) as caught:
    multihost.initialize("run", **given)
  assert caught.value.exit_code == 2
  assert "\n" not in str(caught.value)


def test_alone_nothing_is_opened_and_nothing_waited_for(monkeypatch):
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("a socket would be opened"))
  multihost.initialize("run", None, None, None, 5)
  multihost.initialize("run", "host:1", 1, 0, 5)
  assert multihost.alone()
  assert multihost.is_main()
  value = {"any": ["thing"]}
  assert multihost.gather(value) == [value]
  assert multihost.from_main(lambda: value) is value
  multihost.barrier("here")
  multihost.check_same("the number", 3)


def test_a_mode_of_one_process_refuses_more(monkeypatch):
  for name, value in ({**SLURM, "SLURM_NTASKS": "2"}).items():
    monkeypatch.setenv(name, value)
  with pytest.raises(RunError, match="mode export runs in one process, but SLURM_NTASKS tells of 2"):
    multihost.check_alone("export")
  monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # a shell inside of an allocation
  multihost.check_alone("export")


@pytest.fixture
def initialized(monkeypatch) -> list[tuple[tuple, dict]]:
  """What JAX is asked for instead of a meeting."""
  found: list[tuple[tuple, dict]] = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **named: found.append((given, named)))
  monkeypatch.setattr(multihost, "_answer_aborts", lambda message: None)
  monkeypatch.setattr(multihost.threading.Thread, "start", lambda thread: None)
  monkeypatch.setattr(jax.config, "update", lambda *setting: None)
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  return found


@pytest.mark.parametrize(("process", "bound"), [(0, "127.0.0.1:1234"), (1, None)])
def test_the_coordinator_of_one_machine_is_reached_from_it_alone(initialized, monkeypatch, process, bound):
  multihost.initialize("run", "127.0.0.1:1234", 2, process, 5)
  monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "0.0.0.0:1234")
  multihost.initialize("run", "127.0.0.1:1234", 2, process, 5)
  ((given, named), (_, by_hand)) = initialized
  assert given == ("127.0.0.1:1234", 2, process)
  assert named["coordinator_bind_address"] == bound
  assert by_hand["coordinator_bind_address"] == "0.0.0.0:1234"


def test_a_step_of_slurm_counts_its_own_tasks(initialized, monkeypatch):
  for name, value in ({**SLURM, "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2"}).items():
    monkeypatch.setenv(name, value)
  multihost.initialize("run", None, None, None, 5)
  assert initialized[0][0] == (None, 2, None)


@pytest.mark.parametrize("name", ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"])
def test_numbers_of_the_environment_are_numbers(monkeypatch, name):
  monkeypatch.setenv(name, "two")
  with pytest.raises(RunError, match=f"the environment says {name}='two', which is not a whole number"):
    multihost.initialize("run", None, None, None, 5)


def test_processes_of_torchrun_are_refused(monkeypatch):
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  monkeypatch.setenv("WORLD_SIZE", "2")
  monkeypatch.setenv("RANK", "0")
  for start in (lambda: multihost.initialize("run", None, None, None, 5), lambda: multihost.check_alone("export")):
    with pytest.raises(RunError, match="WORLD_SIZE=2 and RANK=0"):
      start()


def test_nothing_follows_the_last_line():
  log = "os.write(2, b'a log line that is cut off')"
  program = f"import os; from d1jax.parallel import multihost; {log}; multihost.say_last('the end'); {log}"
  found = subprocess.run([sys.executable, "-c", program], cwd=jobs.ROOT, capture_output=True, text=True, check=True)
  assert found.stderr.endswith("a log line that is cut off\nd1jax: the end\n")


class Store:
  """JAX's client, of which the store of its coordinator alone is used."""

  def __init__(self, said=None):
    self.said, self.waited = said, []

  def key_value_set(self, key, value):
    if self.said is not None:
      raise RuntimeError("ALREADY_EXISTS")
    self.said = value

  def key_value_try_get(self, key):
    if self.said is None:
      raise RuntimeError("NOT_FOUND")
    return self.said


class ExitedError(BaseException):
  """Stands for the end of the process."""


@pytest.fixture
def ending(monkeypatch):
  """A process of several that would end: (store, what it says)."""
  store, said = Store(), []

  def leave(code):
    raise ExitedError(code)

  monkeypatch.setattr(multihost, "alone", lambda: False)
  monkeypatch.setattr(multihost.distributed.global_state, "client", store)
  monkeypatch.setattr(multihost.distributed.global_state, "process_id", 3)
  monkeypatch.setattr(multihost, "_heard", [])
  monkeypatch.setattr(multihost, "_leaving", threading.Event())
  monkeypatch.setattr(multihost, "OWN_SECONDS", 0.01)
  monkeypatch.setattr(multihost.time, "sleep", lambda seconds: None)
  monkeypatch.setattr(multihost.os, "_exit", leave)
  monkeypatch.setattr(multihost, "say_last", said.append)
  monkeypatch.setattr(multihost.orbax_multihost, "get_barrier_sync_fn", lambda: lambda **_: None)
  return store, said


def test_a_process_that_fails_says_so_before_it_leaves(ending):
  store, _ = ending
  with pytest.raises(ExitedError, match=r"^70$"):
    multihost.leave(70, "not finite")
  assert json.loads(store.said) == [70, 3, "not finite"]
  with pytest.raises(ExitedError, match=r"^2$"):
    multihost.leave(2, "another, later")
  assert json.loads(store.said) == [70, 3, "not finite"]  # the first is the reason


def test_a_process_that_lost_another_says_nothing(ending):
  store, _ = ending
  with pytest.raises(ExitedError, match=r"^75$"):
    multihost.leave(75, "another is gone", together=False)
  assert store.said is None


def test_a_process_that_hears_of_a_failure_ends_with_its_code(ending):
  store, said = ending
  store.said = json.dumps([1, 0, "ValueError: no"])
  with pytest.raises(ExitedError, match=r"^1$"):
    multihost._listen()
  assert said == ["process 0 ended: ValueError: no"]
  assert multihost.failure_of_another() == (1, "process 0 ended: ValueError: no")


def test_a_process_that_ends_with_an_error_of_its_own_is_left_alone(ending):
  store, said = ending
  store.said = json.dumps([70, 0, "not finite"])
  multihost._leaving.set()
  multihost._listen()
  assert said == []
  assert multihost.failure_of_another() is None


def test_rows_of_one_process_are_all_rows():
  mesh = make_mesh({"data": 4, "fsdp": 1, "tensor": 2, "sequence": 1})
  tree = {"x": np.arange(24).reshape(8, 3), "mask": np.arange(8) > 3}
  rows, found = multihost.local_rows(place(tree, sharding(mesh, {"batch": "data"}, "batch")))
  np.testing.assert_array_equal(rows, np.arange(8))
  jax.tree.map(np.testing.assert_array_equal, found, tree)
  jax.tree.map(np.testing.assert_array_equal, multihost.fetch(jax.tree.map(jnp.asarray, tree)), tree)


def told(count, *questions, devices=1):
  """What each of some processes found."""
  started = jobs.start_processes(count, *questions, devices=devices, module="tests.parallel.peers")
  found = jobs.finish_processes(started)
  assert [code for code, _, _ in found] == [0] * count, found[0][2]
  return [json.loads(out.splitlines()[-1]) for _, out, _ in found]


@SLOW
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.long)])
def test_processes_do_as_one_does(count):
  """Every row is on two processes; in the whole job below it is on one."""
  (single,), found = told(1, "iteration", devices=count), told(count, "iteration", "talk")
  check_talk(found)
  for own in found:
    for name in ("prompts", "masks", "tokens", "key", "rewards", "texts", "advantages"):
      assert own[name] == single[name], name
    np.testing.assert_allclose(own["losses"], single["losses"], rtol=0, atol=1e-5)
    assert own["sums"].keys() == single["sums"].keys()
    for name, pair in own["sums"].items():
      assert pair == pytest.approx(single["sums"][name]), name
    assert own["state"] == found[0]["state"]
  # Each row is on one process, also where it is on several devices of two.
  assert sorted(row for own in found for row in own["rows"]) == list(range(16))
  assert [own["graded"] for own in found] == [32 // count, 0] * (count // 2)
  assert len(set(single["rewards"])) > 2
  assert single["losses"][0] != 0


def check_talk(found):
  count = len(found)
  assert [own["is_main"] for own in found] == [True] + [False] * (count - 1)
  for own in found:
    assert own["gather"] == [{"process": i, "text": "é" * 700 * i} for i in range(count)]
    assert own["largest"] == count - 1
    assert own["from_main"] == [{"number": 0}, "process 0 does not like it"]
    assert own["in_order"] == [f"{i % count}!" for i in range(6)]
    others = ", ".join(map(str, range(1, count)))
    assert own["same"][0] is None
    assert own["same"][1].startswith(f"the number of process {others} differs from that of process 0")


@pytest.fixture(scope="module")
def undisturbed():
  """The folder of a job of one process with two devices that ran in one go."""
  return runs.undisturbed()[0]


def results(workdir):
  return json.loads((workdir / "results.json").read_text())


def same_end(workdir, undisturbed):
  found, expected = results(workdir), results(undisturbed)
  for name in ("params_fingerprint", "before", "after", "samples", "splits", "best_iteration"):
    assert found[name] == expected[name], name
  mine, theirs = (read_records(folder / "metrics.jsonl") for folder in (workdir, undisturbed))
  assert [(r["stage"], r["iteration"]) for r in mine] == [(r["stage"], r["iteration"]) for r in theirs]
  for own, other in zip(mine, theirs, strict=True):
    for name in ("loss", "reward", "validation"):
      assert own.get(name) == pytest.approx(other.get(name), abs=1e-5), name


def resumed(workdir, count):
  found = jobs.finish_processes(jobs.start_processes(count, *jobs.flags(workdir, **jobs.BRIEF), devices=2 // count))
  assert [code for code, _, _ in found] == [0] * count, found
  return found


@SLOW
def test_a_job_of_two_processes_is_the_job_of_one(undisturbed):
  workdir, ((_, out, _), (_, silent, said)), _ = runs.undisturbed(2)
  same_end(workdir, undisturbed)
  assert "SFT + diffu-GRPO" in out
  assert not [line for line in silent.splitlines() if not line.startswith("[Gloo]")]
  assert said == ""
  mine, theirs = (
    {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "checkpoints" not in p.parts}
    for folder in (workdir, undisturbed)
  )
  for folder in (mine, theirs):
    assert len({name for name in folder if name.startswith("tensorboard")}) == 2
  assert {name for name in mine if "tensorboard" not in name} == {name for name in theirs if "tensorboard" not in name}


def without_its_end(job, workdir):
  """A copy of a job that lost its results and its last checkpoint."""
  shutil.copytree(job, workdir)
  (workdir / "results.json").unlink()
  shutil.rmtree(workdir / "checkpoints" / "grpo" / "6")


@SLOW
def test_one_process_goes_on_where_two_stopped(tmp_path, undisturbed):
  """Two go on where one stopped below; what a stop of one saves is in test_kills.py."""
  without_its_end(runs.undisturbed(2)[0], tmp_path / "run")
  resumed(tmp_path / "run", 1)
  same_end(tmp_path / "run", undisturbed)
  mine, theirs = (read_records(job / "metrics.jsonl") for job in (tmp_path / "run", runs.undisturbed(2)[0]))
  assert mine[:-2] == theirs[:-2], "only the last two iterations are made again"


@SLOW
def test_processes_with_other_commands_refuse_to_run(tmp_path):
  commands = [(f"--config.seed={seed}",) for seed in (0, 5)]
  found = jobs.finish_processes(jobs.start_processes(2, *jobs.flags(tmp_path, **jobs.BRIEF), each=commands))
  assert [code for code, _, _ in found] == [2, 2]
  for _, _, err in found:
    assert "the configuration of process 1 differs from that of process 0" in err.splitlines()[-1]
  assert not (tmp_path / "config.json").exists()


@SLOW
def test_a_coordinator_that_never_comes_is_named(tmp_path):
  job = jobs.start(*jobs.flags(tmp_path, **jobs.BRIEF), *(f"--config.distributed.{flag}" for flag in ALONE))
  code, out, err = jobs.finish(job, timeout=60)
  assert (code, out) == (75, "")
  assert "did not meet at 127.0.0.1:1 within 2 seconds" in err.strip().splitlines()[-1]


@SLOW
def test_a_loss_that_is_not_finite_ends_all_with_its_code(tmp_path):
  flags = jobs.flags(tmp_path, **jobs.BRIEF, sft__learning_rate=1e38)
  found = jobs.finish_processes(jobs.start_processes(2, *flags))
  assert [code for code, _, _ in found] == [70, 70]
  (said,) = {err.strip().splitlines()[-1] for _, _, err in found}
  assert "loss or gradient is not finite" in said
  assert "the same command goes on with the next batch" in said
  saved = [p for p in (tmp_path / "checkpoints" / "sft").iterdir() if p.name.isdigit()]
  assert saved, "the last finite state is saved"


@SLOW
def test_a_damaged_checkpoint_is_passed_over_by_all(tmp_path, undisturbed):
  shutil.copytree(undisturbed, tmp_path / "run")
  (tmp_path / "run" / "results.json").unlink()
  largest = max((tmp_path / "run/checkpoints/grpo/6").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  (_, _, said), (_, _, silent) = resumed(tmp_path / "run", 2)
  assert f"going on from checkpoint {tmp_path}/run/checkpoints/grpo/4" in said
  assert silent == ""
  assert (tmp_path / "run/checkpoints/corrupt/grpo-6").is_dir()
  same_end(tmp_path / "run", undisturbed)


@SLOW
def test_an_evaluation_of_two_processes_is_that_of_one(tmp_path, undisturbed):
  flags = ["--config=configs/eval.py", f"--config.checkpoint={undisturbed}", "--config.batch_size=16"]
  flags += ["--config.temperatures=(1.0,)", "--config.samples=2", "--config.seeds=(3,)"]
  outputs = [[f"--config.output={tmp_path / name}"] for name in ("one", "two")]
  code, _, err = jobs.finish(jobs.start(*flags, *outputs[0]))
  assert code == 0, err
  found = jobs.finish_processes(jobs.start_processes(2, *flags, *outputs[1]))
  assert [code for code, _, _ in found] == [0, 0], found
  timed = {"forward_passes", "seconds"}
  for path in (tmp_path / "one" / "items").iterdir():
    one, two = ([json.loads(line) for line in (tmp_path / n / "items" / path.name).open()] for n in ("one", "two"))
    assert [{k: v for k, v in item.items() if k not in timed} for item in two] == [
      {k: v for k, v in item.items() if k not in timed} for item in one
    ]
    assert len(one) == 48
  assert "accuracy" in found[0][1]
  assert not [line for line in found[1][1].splitlines() if not line.startswith("[Gloo]")]


# A task that fails for one process alone, which starts the task's own process: tests.tasks.parity_task, and a failure.
TASK = """
import os
from pathlib import Path
from tests.tasks.parity_task import Parity

class Failing(Parity):
  def grade(self, text, record, protocol="strict"):
    if b"--config.distributed.process={process}" in Path(f"/proc/{{os.getppid()}}/cmdline").read_bytes().split(b"\\0"):
      raise ValueError("Gloo: a grader's own failure")
    return super().grade(text, record, protocol)

build = Failing
"""


@pytest.mark.slow(reason="two processes")
@pytest.mark.parametrize("process", [0, 1])
def test_a_failure_of_one_process_ends_all_with_its_code(tmp_path, process):
  """Not with 75, which a launcher would try again."""
  (tmp_path / "task.py").write_text(TASK.format(process=process))
  own = ["--config.task.module=" + str(tmp_path / "task.py"), "--config.sft.steps=2", "--config.task.style=terse"]
  found = jobs.finish_processes(jobs.start_processes(2, *jobs.flags(tmp_path / "run"), *own, forked=False))
  assert [code for code, _, _ in found] == [2, 2], found
  own, other = (found[i][2].strip().splitlines()[-1].removeprefix("d1jax: ") for i in (process, 1 - process))
  assert "task.py line " in own
  assert "ValueError: Gloo: a grader's own failure" in own
  assert other == f"process {process} ended: {own}"
