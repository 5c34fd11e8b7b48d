"""TPU hosts: what is asked of gcloud, after what, and how often."""

import shutil
import subprocess

import pytest

from tests.launch.scripts import HOSTILE, ROOT, Machine, printed, python, value

# A TPU that is there; its name for `ready` differs between the two kinds.
THERE = (("describe",), [("READY", 0)])
KINDS = {"tpu_vm": ("tpu-vm", "READY", ["--worker=all"])}
KINDS["queued"] = ("queued-resources", "ACTIVE", ["--node=all", "--worker=all", "--batch-size=all"])
TRAINING = "d1jax.main"

both = pytest.mark.parametrize("name", KINDS)


def actions(machine: Machine) -> list[str]:
  """What gcloud was asked to do, without the looks at the state."""
  return [call[4] for call in machine.calls if call[4] != "describe"]


def ends(*codes: int) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
  """The exit codes of the training, one attempt after the other."""
  return (("ssh", TRAINING), [("", code) for code in codes])


@both
def test_a_fresh_start_creates_copies_installs_and_trains_on_all_hosts(name, tmp_path):
  kind, _, hosts = KINDS[name]
  commands = printed(Machine(tmp_path).run(name, "--dry-run", SPOT="no", PREPARE="fetch weights"))
  assert all(command[:4] == ["gcloud", "compute", "tpus", kind] for command in commands)
  assert [command[4] for command in commands] == ["create", "scp", "ssh", "ssh", "delete"]
  for command in commands:
    assert {"--zone=z1", "--project=p1", "--quiet"} <= set(command)
  for command in commands[1:-1]:
    assert set(hosts) <= set(command)
  assert not {"--spot"} & set(commands[0])
  assert value(commands[0], "accelerator-type") == "v6e-1"
  assert value(commands[2], "command").endswith("bash launch/install.sh tpu && { fetch weights; }")
  limited = "bash launch/attach.sh 1 timeout --foreground --kill-after=120 86400 .venv/bin/python -m d1jax.main"
  assert limited in value(commands[3], "command")


def test_what_is_created_follows_the_settings(tmp_path):
  settings = {"ACCELERATOR": "v5p-128", "RUNTIME": "v2-alpha-tpuv5", "RUN": "big"}
  single = printed(Machine(tmp_path).run("tpu_vm", "--dry-run", **settings))[0]
  assert single[4:6] == ["create", "big"]
  assert {"--accelerator-type=v5p-128", "--version=v2-alpha-tpuv5", "--spot"} <= set(single)
  slices = printed(Machine(tmp_path / "2").run("queued", "--dry-run", SLICES="2", **settings))[0]
  assert {"--node-count=2", "--node-prefix=big", "--runtime-version=v2-alpha-tpuv5", "--spot"} <= set(slices)
  assert "--node-id=big" in printed(Machine(tmp_path / "3").run("queued", "--dry-run", **settings))[0]


@both
def test_a_dry_run_prints_what_a_start_does(name, tmp_path):
  ready = KINDS[name][1]
  machine = Machine(tmp_path, (("describe",), [("", 1), (ready, 0)]))
  assert machine.run(name).returncode == 0
  done = [call for call in machine.calls if call[4] != "describe"]
  expected = printed(Machine(tmp_path / "2").run(name, "--dry-run"))
  assert len(done) == len(expected)
  for call, command in zip(done, expected, strict=True):
    differ = [(a, b) for a, b in zip(call, command, strict=True) if a != b]
    # The name of the temporary file, the number of the attempt.
    assert len(differ) <= 1
    assert all(b == "/tmp/d1jax.tgz" or "launch/attach.sh 1 " in b for _, b in differ)


@both
def test_what_both_take_follows_the_settings(name, tmp_path):
  keys = tmp_path / "keys.env"
  keys.write_text("HF_TOKEN=secret\n")
  settings = {"SPOT": "no", "RESERVATION": "mine", "PUBLIC": "no", "EXTRA": "--network=net --labels=a=b"}
  settings |= {"SERVICE_ACCOUNT": "me@p.iam.gserviceaccount.com", "ENV_FILE": str(keys), "HOURS": "2", "KEEP": "yes"}
  result = Machine(tmp_path / "1").run(name, "--dry-run", **settings)
  create, pack, private, copy, install, train = printed(result)
  account = "--service-account=me@p.iam.gserviceaccount.com"
  assert {"--reserved", "--internal-ips", "--network=net", "--labels=a=b", account} <= set(create)
  assert "--spot" not in create
  assert all("--internal-ip" in command for command in (pack, private, copy, install, train))
  assert value(private, "command") == "install -m 600 /dev/null d1jax.env"
  assert {str(keys), "d1jax:d1jax.env"} <= set(copy)
  assert "timeout --foreground --kill-after=120 7200 bash launch/with_env.sh ../d1jax.env" in value(train, "command")
  assert "AFTER=" not in value(train, "command")
  assert "secret" not in result.stdout + result.stderr


@pytest.mark.parametrize(
  ("code", "keep", "deleted"),
  [
    (0, "no", 1),
    (2, "no", 1),
    (70, "no", 1),
    (124, "no", 1),
    (0, "yes", 0),
    (1, "no", 0),
    (130, "no", 0),
    (255, "no", 0),
  ],
)
def test_a_tpu_is_deleted_when_its_run_has_ended(code, keep, deleted, tmp_path):
  machine = Machine(tmp_path, THERE, ends(code))
  result = machine.run("tpu_vm", KEEP=keep)
  assert result.returncode == code
  assert len(machine.called("delete")) == deleted
  assert ("is paid for until: launch/tpu_vm.sh stop" in result.stderr) != bool(deleted)
  # A run whose script is gone is ended by its host.
  after = "AFTER='gcloud compute tpus tpu-vm delete d1jax --zone=z1 --project=p1 --quiet'"
  assert (after in value(machine.called("ssh")[-1], "command")) == (keep == "no")


def test_a_tpu_that_cannot_be_deleted_is_named(tmp_path):
  machine = Machine(tmp_path, THERE, (("delete",), [("", 1)]))
  assert "is paid for until: launch/tpu_vm.sh stop" in machine.run("tpu_vm").stderr


@both
def test_a_tpu_that_is_there_is_used(name, tmp_path):
  machine = Machine(tmp_path, (("describe",), [(KINDS[name][1], 0)]))
  result = machine.run(name)
  assert result.returncode == 0
  assert actions(machine) == ["scp", "ssh", "ssh", "delete"]
  assert "launch: done" in result.stderr
  assert "checkpoints, metrics and reports: gs://bucket/run" in result.stderr


@pytest.mark.parametrize(
  ("name", "codes", "attempts"),
  [
    ("tpu_vm", (75, 75, 0), 3),
    ("queued", (75, 70), 2),
    ("tpu_vm", (2,), 1),
    ("tpu_vm", (130,), 1),
    ("queued", (75,), 4),
  ],
)
def test_training_is_tried_again_after_a_preemption_alone(name, codes, attempts, tmp_path):
  machine = Machine(tmp_path, (("describe",), [(KINDS[name][1], 0)]), ends(*codes))
  assert machine.run(name).returncode == codes[-1]
  commands = [value(call, "command") for call in machine.called("ssh") if TRAINING in value(call, "command")]
  assert len(commands) == attempts


@pytest.mark.parametrize(("name", "gone"), [("tpu_vm", "PREEMPTED"), ("queued", "SUSPENDED"), ("tpu_vm", "")])
def test_a_tpu_that_is_taken_away_is_asked_for_again(name, gone, tmp_path):
  ready = KINDS[name][1]
  # Ready; gone, after the connection broke and when it is tried again; deleted; created; ready.
  states = [(ready, 0), (gone, 0), (gone, 0), *([("", 1)] if gone else []), ("CREATING", 0), (ready, 0)]
  machine = Machine(tmp_path, (("describe",), states), ends(255, 0))
  assert machine.run(name).returncode == 0
  again = ["delete", "create"] if gone else ["create"]
  assert actions(machine) == ["scp", "ssh", "ssh", *again, "scp", "ssh", "ssh", "delete"]
  assert all(("--force" in call) == (name == "queued") for call in machine.called("delete"))


def test_a_broken_connection_to_a_tpu_that_is_there_is_not_tried_again(tmp_path):
  machine = Machine(tmp_path, THERE, ends(255, 0))
  result = machine.run("tpu_vm")
  assert result.returncode == 255
  assert actions(machine) == ["scp", "ssh", "ssh"]


def test_no_capacity_ends_a_first_start_and_not_a_run_that_was_preempted(tmp_path):
  machine = Machine(tmp_path, (("describe",), [("", 1)]), (("create",), [("", 1)]))
  assert machine.run("tpu_vm").returncode == 1
  assert actions(machine) == ["create"]
  (tmp_path / "2").mkdir()
  states = [("READY", 0), ("", 1), ("", 1), ("", 1), ("READY", 0)]
  machine = Machine(tmp_path / "2", (("describe",), states), (("create",), [("", 1), ("", 0)]), ends(255, 0))
  assert machine.run("tpu_vm").returncode == 0
  assert actions(machine) == ["scp", "ssh", "ssh", "create", "create", "scp", "ssh", "ssh", "delete"]


def test_a_request_that_failed_is_left_for_the_person(tmp_path):
  machine = Machine(tmp_path, (("describe",), [("WAITING_FOR_RESOURCES", 0), ("FAILED", 0)]))
  result = machine.run("queued")
  assert result.returncode == 2
  assert "which is WAITING_FOR_RESOURCES" in result.stderr
  assert "is FAILED; gcloud compute tpus queued-resources describe d1jax says why" in result.stderr
  assert not actions(machine)


@both
def test_stop_saves_and_deletes_even_if_no_host_answers(name, tmp_path):
  machine = Machine(tmp_path, (("ssh",), [("", 255)]))
  assert machine.run(name, "stop").returncode == 0
  assert actions(machine) == ["ssh", "delete"]
  assert value(machine.calls[0], "command").endswith("bash launch/attach.sh --stop")


def test_flags_reach_the_program_on_a_host_unchanged(tmp_path):
  machine = Machine(tmp_path, THERE)
  assert machine.run("tpu_vm", *HOSTILE, KEEP="yes").returncode == 0
  shutil.copytree(ROOT / "launch", tmp_path / "d1jax/launch")
  (tmp_path / "d1jax/.venv/bin").mkdir(parents=True)
  python(tmp_path / "d1jax/.venv/bin", "for word in arguments: say(ascii(word))")
  line = value(machine.called("ssh")[-1], "command")
  host = subprocess.run(
    ["bash", "-c", line], cwd=tmp_path, env=machine.environment(), capture_output=True, text=True, timeout=60
  )
  assert host.returncode == 0, host.stderr
  words = ["-m", "d1jax.main", *HOSTILE, "--config.workdir=gs://bucket/run"]
  assert [line.partition("] ")[2] for line in host.stdout.splitlines()] == [ascii(word) for word in words]


@pytest.mark.slow(reason="gcloud takes seconds a command")
@pytest.mark.skipif(not shutil.which("gcloud"), reason="no gcloud to ask whether it knows the flags")
@both
@pytest.mark.parametrize("action", [(), ("stop",)], ids=["start", "stop"])
def test_gcloud_knows_every_flag(name, action, tmp_path):
  (tmp_path / "keys.env").write_text("A=b\n")
  settings = {"SPOT": "no", "RESERVATION": "mine", "PUBLIC": "no", "SERVICE_ACCOUNT": "a@b.iam.gserviceaccount.com"}
  settings |= {"ENV_FILE": str(tmp_path / "keys.env"), "EXTRA": "--network=mine --tags=a"}
  for command in printed(Machine(tmp_path / "1").run(name, *action, "--dry-run", **settings)):
    environment = {"PATH": "/usr/bin:/bin", "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"), "HOME": str(tmp_path)}
    (tmp_path / "gcloud").mkdir(exist_ok=True)
    # Nobody is logged in: exit code 1, said only after the command line was read. 2 is a flag it does not know.
    real = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert real.returncode == 1, real.stderr
    assert "account" in real.stderr
