"""GKE through xpk, Slurm, SkyPilot: what each is asked to do."""

import shlex
import subprocess

import pytest
import yaml

from tests.launch.scripts import HOSTILE, ROOT, Machine, printed, python, value

WORDS = ["-m", "d1jax.main", *HOSTILE, "--config.workdir=gs://bucket/run"]


def heard(line: str, folder, **variables: str) -> list[str]:
  """The arguments that a program gets when a shell reads a line that starts `.venv/bin/python`."""
  (folder / ".venv/bin").mkdir(parents=True)
  python(folder / ".venv/bin", "for word in arguments: say(ascii(word))")
  environment = {"PATH": "/usr/bin:/bin"} | variables
  result = subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, check=True)
  return result.stdout.splitlines()


def test_xpk_makes_a_jobset_that_starts_again_on_75(tmp_path):
  settings = {"SLICES": "2", "ACCELERATOR": "v5p-128", "PREPARE": "fetch weights"}
  commands = printed(Machine(tmp_path).run("gke", "--dry-run", *HOSTILE, **settings))
  (create,) = (command for command in commands if command[:3] == ["xpk", "workload", "create"])
  assert {
    "--workload=d1jax",
    "--cluster=c1",
    "--project=p1",
    "--zone=z1",
    "--tpu-type=v5p-128",
    "--num-slices=2",
    "--max-restarts=3",
    "--restart-on-exit-codes=75",
  } <= set(create)
  install, _, training = value(create, "command").rpartition(" && exec ")
  assert install == "bash launch/install.sh tpu && { fetch weights; }"
  assert heard(training, tmp_path / "pod") == [ascii(word) for word in WORDS]


def test_the_image_holds_the_working_tree(tmp_path):
  # Looks while xpk runs: the folder is removed afterwards.
  machine = Machine(tmp_path, (("get", "jobset"), [("Completed", 0)]))
  (tmp_path / "bin/xpk").write_text(
    '#!/bin/bash\nfor w; do [[ $w != --script-dir=* ]] || ls "${w#*=}" >"$FAKES/seen"; done\n'
  )
  assert machine.run("gke").returncode == 0
  assert {"d1jax", "configs", "launch", "requirements.txt"} <= set((tmp_path / "seen").read_text().split())
  assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp.")]


@pytest.mark.parametrize(("end", "code"), [("Completed", 0), ("Failed", 1)])
def test_gke_logs_are_followed_over_restarts_until_the_end(end, code, tmp_path):
  machine = Machine(tmp_path, (("get", "jobset"), [("", 0), ("", 0), (end, 0)]))
  result = machine.run("gke")
  assert result.returncode == code
  logs = machine.called("kubectl", "logs")
  assert len(logs) == 3
  assert value(logs[0], "selector") == "jobset.sigs.k8s.io/jobset-name=d1jax,batch.kubernetes.io/job-completion-index=0"
  assert "xpk cluster delete --cluster=c1 --project=p1 --zone=z1 --tpu-type=v6e-8" in result.stderr


def test_a_jobset_that_cannot_be_made_is_not_followed(tmp_path):
  machine = Machine(tmp_path, (("xpk",), [("", 1)]))
  assert machine.run("gke").returncode == 1
  assert not machine.called("kubectl")


def test_slurm_gets_a_process_for_each_gpu(tmp_path):
  settings = {"NODES": "4", "GPUS_PER_NODE": "8", "PARTITION": "gpu", "ACCOUNT": "mine", "TIME": "1:00:00"}
  submit = printed(Machine(tmp_path).run("slurm", "--dry-run", *HOSTILE, **settings))[-1]
  assert submit[0] == "sbatch"
  assert {
    "--wait",
    "--nodes=4",
    "--ntasks-per-node=8",
    "--gpus-per-node=8",
    "--partition=gpu",
    "--account=mine",
    "--time=1:00:00",
    "--requeue",
    "--signal=TERM@120",
    "--open-mode=append",
    "--output=runs/d1jax.log",
  } <= set(submit)
  assert submit[-len(WORDS) - 2 :] == ["launch/slurm_job.sh", ".venv/bin/python", *WORDS]
  without = printed(Machine(tmp_path / "2").run("slurm", "--dry-run"))[-1]
  assert not [word for word in without if word.startswith(("--partition", "--account"))]


@pytest.mark.parametrize("code", [0, 70, 75])
def test_slurm_ends_as_the_job_does(code, tmp_path):
  machine = Machine(tmp_path, (("sbatch",), [("", code)]))
  assert machine.run("slurm", RUN=f"test-of-launch-{code}").returncode == code
  (ROOT / f"runs/test-of-launch-{code}.log").unlink()


@pytest.mark.parametrize(
  ("code", "restarts", "requeued"), [(0, "", 0), (75, "", 1), (75, "2", 1), (75, "3", 0), (70, "", 0), (2, "1", 0)]
)
def test_a_slurm_job_is_queued_again_after_a_preemption_alone(code, restarts, requeued, tmp_path):
  machine = Machine(tmp_path, (("srun",), [("", code)]))
  settings = {"SLURM_JOB_ID": "17"} | ({"SLURM_RESTART_COUNT": restarts} if restarts else {})
  assert machine.run("slurm_job", "python", *WORDS, **settings).returncode == code
  (step,) = machine.called("srun")
  assert step[-len(WORDS) - 1 :] == ["python", *WORDS]
  # Processes that save together are not ended when the first is done.
  assert {"--kill-on-bad-exit=0", "--wait=600", "--label"} <= set(step)
  assert machine.called("scontrol") == [["scontrol", "requeue", "17"]] * requeued


def test_skypilot_gets_hosts_and_the_command(tmp_path):
  settings = {"NODES": "2", "GPU": "A100", "INFRA": "aws/us-east-1", "CUDA": "cuda13", "PREPARE": "fetch weights"}
  (launch,) = printed(Machine(tmp_path).run("skypilot", "--dry-run", *HOSTILE, **settings))
  assert launch[:3] == ["sky", "jobs", "launch"]
  assert {"--name=d1jax", "--num-nodes=2", "--gpus=A100:8", "--infra=aws/us-east-1", "--use-spot", "--yes"} <= set(
    launch
  )
  assert launch[-1] == "launch/skypilot.yaml"
  assert "--env=SETUP=bash launch/install.sh cuda13 && { fetch weights; }" in launch
  on_demand = printed(Machine(tmp_path / "2").run("skypilot", "--dry-run", SPOT="no"))[0]
  assert not [word for word in on_demand if word.startswith(("--use-spot", "--infra"))]


@pytest.mark.parametrize("hosts", [1, 3])
def test_skypilot_hosts_are_told_of_each_other(hosts, tmp_path):
  (launch,) = printed(Machine(tmp_path).run("skypilot", "--dry-run", *HOSTILE))
  training = next(word for word in launch if word.startswith("--env=TRAINING=")).removeprefix("--env=TRAINING=")
  task = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
  assert set(task) == {"workdir", "resources", "envs", "setup", "run"}
  assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75], "max_restarts_on_errors": 0}
  assert set(task["envs"]) == {"SETUP", "TRAINING"}
  sky = {
    "SKYPILOT_NUM_NODES": str(hosts),
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n10.0.0.3",
  }
  several = [
    "--config.distributed.coordinator=10.0.0.1:8476",
    "--config.distributed.processes=3",
    "--config.distributed.process=1",
  ]
  expected = [*WORDS, *(several if hosts > 1 else [])]
  assert heard(task["run"], tmp_path / "host", TRAINING=training, **sky) == [ascii(word) for word in expected]


def test_what_a_host_of_skypilot_sets_up_can_fail(tmp_path):
  task = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
  result = subprocess.run(["bash", "-c", task["setup"]], env={"SETUP": "true && { exit 3; }", "PATH": "/bin"})
  assert result.returncode == 3


@pytest.mark.parametrize(
  ("name", "command"),
  [
    ("gke", "xpk workload delete --workload=d1jax --cluster=c1 --project=p1 --zone=z1 --force"),
    ("slurm", "scancel --name=d1jax"),
    ("skypilot", "sky jobs cancel --yes --name=d1jax"),
  ],
)
def test_stop_ends_the_job(name, command, tmp_path):
  machine = Machine(tmp_path)
  assert machine.run(name, "stop").returncode == 0
  assert machine.calls[0][: len(shlex.split(command))] == shlex.split(command)
