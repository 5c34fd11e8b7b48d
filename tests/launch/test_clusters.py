"""GKE, Slurm, SkyPilot: what each is asked to do."""

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


def manifest(folder, *flags: str, **settings: str) -> dict:
  """The JobSet that kubectl would get."""
  result = Machine(folder).run("gke", "manifest", *flags, **settings)
  assert result.returncode == 0, result.stderr
  return yaml.safe_load(result.stdout)


def test_a_jobset_starts_again_on_75_and_ends_on_what_would_come_again(tmp_path):
  jobset = manifest(tmp_path, *HOSTILE, SLICES="2", ACCELERATOR="v6e-16", HOURS="2")
  assert (jobset["apiVersion"], jobset["kind"], jobset["metadata"]["name"]) == (
    "jobset.x-k8s.io/v1alpha2",
    "JobSet",
    "d1jax",
  )
  policy = jobset["spec"]["failurePolicy"]
  assert policy["maxRestarts"] == 3
  assert policy["rules"] == [
    {"name": "ended", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy", "DeadlineExceeded"]}
  ]
  (slices,) = jobset["spec"]["replicatedJobs"]
  job = slices["template"]["spec"]
  assert (slices["replicas"], job["parallelism"], job["completions"], job["completionMode"]) == (2, 4, 4, "Indexed")
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule["action"] == "FailJob"
  assert rule["onExitCodes"]["operator"] == "In"
  codes = {*rule["onExitCodes"]["values"]}
  assert {1, 2, 70, 71, 74, 124, 130} == codes  # docs/architecture.md; 124 is the end of HOURS
  assert job["activeDeadlineSeconds"] > 2 * 3600
  pod = job["template"]["spec"]
  assert pod["restartPolicy"] == "Never"
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
    "cloud.google.com/gke-tpu-topology": "4x4",
    "cloud.google.com/gke-spot": "true",
  }
  (container,) = pod["containers"]
  assert container["command"] == ["timeout", "--foreground", "--kill-after=120", "7200", ".venv/bin/python", *WORDS]
  assert container["resources"] == {"limits": {"google.com/tpu": 4}}
  assert container["image"] == "registry/image:1"
  assert "envFrom" not in container
  assert "serviceAccountName" not in pod


def test_a_jobset_follows_the_settings(tmp_path):
  keys = tmp_path / "keys.env"
  keys.write_text("HF_TOKEN=secret\n")
  settings = {"SPOT": "no", "RESERVATION": "mine", "SERVICE_ACCOUNT": "trainer", "ENV_FILE": str(keys)}
  settings |= {
    "ACCELERATOR": "v5p-8",
    "TPU": "tpu-v5p-slice",
    "TOPOLOGY": "2x2x1",
    "SLICE_HOSTS": "1",
    "HOST_CHIPS": "4",
  }
  pod = manifest(tmp_path / "1", **settings)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  assert pod["serviceAccountName"] == "trainer"
  assert pod["nodeSelector"]["cloud.google.com/reservation-name"] == "mine"
  assert "cloud.google.com/gke-spot" not in pod["nodeSelector"]
  assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "d1jax"}}]
  machine = Machine(tmp_path / "2", (("get", "jobset"), [("Completed", 0)]))
  result = machine.run("gke", **settings)
  assert result.returncode == 0
  assert ["kubectl", "create", "secret", "generic", "d1jax", f"--from-env-file={keys}"] in machine.calls
  assert "secret" not in (result.stdout + result.stderr).replace("secretRef", "").replace(str(keys), "")


@pytest.mark.parametrize(
  ("accelerator", "topology", "hosts", "chips"),
  [("v6e-1", "1x1", 1, 1), ("v6e-8", "2x4", 1, 8), ("v5litepod-16", "4x4", 4, 4), ("v6e-256", "16x16", 64, 4)],
)
def test_a_slice_has_its_shape(accelerator, topology, hosts, chips, tmp_path):
  job = manifest(tmp_path, ACCELERATOR=accelerator)["spec"]["replicatedJobs"][0]["template"]["spec"]
  pod = job["template"]["spec"]
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
  assert (job["parallelism"], pod["containers"][0]["resources"]["limits"]["google.com/tpu"]) == (hosts, chips)


@pytest.mark.parametrize(
  ("settings", "reason"),
  [
    ({"ACCELERATOR": "v6e-7"}, "ACCELERATOR is 'v6e-7'; slices have"),
    ({"ACCELERATOR": "v5p-8"}, "TPU is empty"),
    ({"SUBMIT": "xpk"}, "SUBMIT is 'xpk'; set it to kubectl or gcluster"),
    ({"SUBMIT": "gcluster", "ENV_FILE": "/dev/null"}, "gcluster has no secrets; use SUBMIT=kubectl"),
  ],
)
def test_what_gke_cannot_do_is_refused(settings, reason, tmp_path):
  machine = Machine(tmp_path)
  result = machine.run("gke", **settings)
  assert result.returncode == 2
  assert reason in result.stderr
  assert not machine.called("create") + machine.called("submit")


# Flags of `gcluster job submit` by cmd/job/submit.go of GoogleCloudPlatform/cluster-toolkit (commit 00774fd, 2026).
GCLUSTER = {
  *("name", "cluster", "project", "location", "image", "compute-type", "num-slices", "restarts"),
  *("restart-on-exit-codes", "grace-period", "command", "service-account", "queue", "priority"),
}


def test_cluster_toolkit_gets_flags_that_it_has(tmp_path):
  settings = {
    "SUBMIT": "gcluster",
    "ACCELERATOR": "v6e-16",
    "EXTRA": "--queue=mine --priority=high",
    "SERVICE_ACCOUNT": "sa",
  }
  commands = printed(Machine(tmp_path).run("gke", "--dry-run", *HOSTILE, **settings))
  (submit,) = (command for command in commands if command[0] == "gcluster")
  assert submit[1:3] == ["job", "submit"]
  assert {word[2:].partition("=")[0] for word in submit[3:]} <= GCLUSTER
  assert {"--compute-type=v6e-16", "--restarts=3", "--restart-on-exit-codes=75", "--queue=mine"} <= set(submit)
  assert "--service-account=sa" in submit
  training = value(submit, "command").removeprefix("exec timeout --foreground --kill-after=120 86400 ")
  assert heard(training, tmp_path / "pod") == [ascii(word) for word in WORDS]


@pytest.mark.parametrize(("end", "code"), [("Completed", 0), ("Failed", 1)])
def test_gke_logs_are_followed_over_restarts_until_the_end(end, code, tmp_path):
  machine = Machine(tmp_path, (("get", "jobset"), [("", 0), ("", 0), (end, 0)]))
  result = machine.run("gke")
  assert result.returncode == code
  logs = machine.called("kubectl", "logs")
  assert len(logs) == 3
  assert value(logs[0], "selector") == "jobset.sigs.k8s.io/jobset-name=d1jax,batch.kubernetes.io/job-completion-index=0"
  assert "gcloud container clusters delete c1 --location=z1 --project=p1" in result.stderr


def test_a_jobset_that_cannot_be_made_is_not_followed(tmp_path):
  machine = Machine(tmp_path, (("kubectl", "create"), [("", 1)]))
  assert machine.run("gke").returncode == 1
  assert not machine.called("kubectl", "logs")


def test_slurm_gets_a_process_for_each_gpu(tmp_path):
  settings = {
    "NODES": "4",
    "GPUS_PER_NODE": "8",
    "PARTITION": "gpu",
    "ACCOUNT": "mine",
    "TIME": "1:00:00",
    "EXTRA": "--qos=high",
  }
  submit = printed(Machine(tmp_path).run("slurm", "--dry-run", *HOSTILE, **settings))[-1]
  assert submit[0] == "sbatch"
  assert {
    "--wait",
    "--nodes=4",
    "--ntasks-per-node=8",
    "--gpus-per-node=8",
    "--cpus-per-task=8",
    "--qos=high",
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
  settings |= {"GPUS_PER_NODE": "8", "EXTRA": "--disk-size=500"}
  _, _, launch = printed(Machine(tmp_path).run("skypilot", "--dry-run", *HOSTILE, **settings))
  assert launch[:3] == ["sky", "jobs", "launch"]
  assert {
    "--name=d1jax",
    "--num-nodes=2",
    "--gpus=A100:8",
    "--infra=aws/us-east-1",
    "--use-spot",
    "--disk-size=500",
  } <= set(launch)
  assert launch[-1] == "launch/skypilot.yaml"
  assert "--env=SETUP=bash launch/install.sh cuda13 && { fetch weights; }" in launch
  on_demand = printed(Machine(tmp_path / "2").run("skypilot", "--dry-run", SPOT="no"))[-1]
  assert not [word for word in on_demand if word.startswith(("--use-spot", "--infra"))]


def test_skypilot_copies_what_is_packed_and_nothing_else(tmp_path):
  # Looks while sky runs: the folder is removed afterwards.
  machine = Machine(tmp_path)
  (tmp_path / "bin/sky").write_text(
    '#!/bin/bash\nfor w; do [[ $w != --workdir=* ]] || ls -A "${w#*=}" >"$FAKES/seen"; done\n'
  )
  assert machine.run("skypilot").returncode == 0
  seen = set((tmp_path / "seen").read_text().split())
  assert {"d1jax", "configs", "launch", "requirements.txt"} <= seen
  assert ".git" not in seen
  assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp.")]


def test_skypilot_takes_keys_from_its_environment(tmp_path):
  keys = tmp_path / "keys.env"
  keys.write_text("# mine\nHF_TOKEN=secret=1\n\nWANDB_API_KEY=secret 2")
  machine = Machine(tmp_path / "machine")
  result = machine.run("skypilot", ENV_FILE=str(keys))
  assert result.returncode == 0
  (launch,) = machine.called("sky", "launch")
  assert {"--secret=HF_TOKEN", "--secret=WANDB_API_KEY"} <= set(launch)
  shown = machine.run("skypilot", "--dry-run", ENV_FILE=str(keys)).stdout
  assert f"\nbash launch/with_env.sh {keys} sky jobs launch " in shown
  assert "secret 2" not in " ".join(launch) + shown
  assert "secret=1" not in " ".join(launch) + shown


@pytest.mark.parametrize("hosts", [1, 3])
def test_skypilot_hosts_are_told_of_each_other(hosts, tmp_path):
  _, _, launch = printed(Machine(tmp_path).run("skypilot", "--dry-run", *HOSTILE))
  training = next(word for word in launch if word.startswith("--env=TRAINING=")).removeprefix("--env=TRAINING=")
  task = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
  assert set(task) == {"resources", "envs", "setup", "run"}
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
  limit = "timeout --foreground --kill-after=120 86400 "
  assert training.startswith(limit)
  assert heard(task["run"], tmp_path / "host", TRAINING=training.removeprefix(limit), **sky) == [
    ascii(word) for word in expected
  ]


def test_what_a_host_of_skypilot_sets_up_can_fail(tmp_path):
  task = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
  result = subprocess.run(["bash", "-c", task["setup"]], env={"SETUP": "true && { exit 3; }", "PATH": "/bin"})
  assert result.returncode == 3


@pytest.mark.parametrize(
  ("name", "command"),
  [
    ("gke", "kubectl delete jobset d1jax"),
    ("slurm", "scancel --name=d1jax"),
    ("skypilot", "sky jobs cancel --yes --name=d1jax"),
  ],
)
def test_stop_ends_the_job(name, command, tmp_path):
  machine = Machine(tmp_path)
  assert machine.run(name, "stop").returncode == 0
  assert shlex.split(command) in [call[: len(shlex.split(command))] for call in machine.calls]
