"""What holds for every launch script: its form, its help, its dry run, what it refuses."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.scripts import CLOUDS, HOSTILE, ROOT, Machine, printed, python

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
STARTERS = (*CLOUDS, "local")
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def common(line: str, **settings: str) -> subprocess.CompletedProcess[str]:
  """A line of bash behind launch/common.sh."""
  command = ["bash", "-c", f"cd '{ROOT}' && . launch/common.sh && {line}"]
  return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_short_and_parse(path):
  lines = path.read_text().splitlines()
  assert len(lines) <= 200
  assert max(map(len, lines)) <= 120
  assert "disable" not in path.read_text(), "a suppressed warning"
  subprocess.run(["bash", "-n", path], check=True)
  assert os.access(path, os.X_OK) == lines[0].startswith("#!")


@pytest.mark.parametrize("name", [*STARTERS, "slurm_job", "attach", "install", "with_env"])
def test_the_linter_finds_nothing(name):
  assert SHELLCHECK, "pip install -r tests/requirements.txt"
  # With all that a starter sources; the helpers leave some of that unused.
  command = [SHELLCHECK, "-x", *(["-a"] if name in STARTERS else []), "-P", "SCRIPTDIR", f"launch/{name}.sh"]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert not result.stdout
  assert result.returncode == 0


@pytest.mark.parametrize("name", STARTERS)
def test_help_says_what_a_script_does_and_takes(name, tmp_path):
  machine = Machine(tmp_path)
  result = machine.run(name, "--help")
  assert result.returncode == 0
  assert result.stdout.startswith("Trains on ")
  assert f"launch/{name}.sh [--dry-run] [FLAG...]" in result.stdout
  assert (f"launch/{name}.sh stop" in result.stdout) == (name in CLOUDS)
  assert not machine.calls


@pytest.mark.parametrize(
  "words", [(name, *action) for name in CLOUDS for action in ((), ("logs",), ("stop",))] + [("local",)], ids=" ".join
)
def test_a_dry_run_prints_commands_and_runs_none(words, tmp_path):
  machine = Machine(tmp_path)
  by_flag = machine.run(*words, "--dry-run")
  by_variable = machine.run(*words, DRY_RUN="1")
  assert by_flag.stdout == by_variable.stdout
  assert printed(by_flag)
  assert not machine.calls
  assert set(os.listdir(tmp_path)) == {"answers", "bin"}
  if len(words) == 1:
    assert "checkpoints, metrics and reports: gs://bucket/run" in by_flag.stderr
    assert "nothing was started" in by_flag.stderr


@pytest.mark.parametrize("name", STARTERS)
def test_every_command_names_flags_and_work_directory(name, tmp_path):
  words = [name, "manifest"] if name == "gke" else [name]
  flags = lambda *given: " ".join(("-m d1jax.main", *given, "--config.workdir=gs://bucket/run"))
  result = Machine(tmp_path).run(*words, "--dry-run", "--config=configs/sft.py:llada_8b", "--config.seed=7")
  assert flags("--config=configs/sft.py:llada_8b", "--config.seed=7") in result.stdout.replace('", "', " ")
  assert "configs/grpo.py" not in result.stdout, "flags of the command line take the place of those in env.sh"
  again = Machine(tmp_path / "2").run(*words, "--dry-run").stdout
  assert flags("--config=configs/grpo.py") in again.replace('", "', " ")


@pytest.mark.parametrize(
  ("name", "settings", "reason"),
  [
    ("tpu_vm", {"PROJECT": ""}, "PROJECT is empty; set it in launch/env.sh"),
    ("queued", {"ZONE": ""}, "ZONE is empty"),
    ("gke", {"CLUSTER": ""}, "CLUSTER is empty"),
    (
      "tpu_vm",
      {"WORKDIR": "runs/here"},
      "WORKDIR is 'runs/here', which hosts do not share; set it to gs://BUCKET/FOLDER",
    ),
    ("skypilot", {"WORKDIR": "runs/here"}, "WORKDIR is 'runs/here'"),
    ("slurm", {"RUN": "My_Run"}, "RUN is 'My_Run'"),
    ("gke", {"RUN": "r" * 29}, "at most 28 lower-case letters"),
    ("tpu_vm", {"HOURS": "1.5"}, "HOURS is '1.5'; set it to a whole number of hours"),
    ("tpu_vm", {"ENV_FILE": "nowhere"}, "ENV_FILE is 'nowhere'; name a file of lines NAME=VALUE"),
    ("slurm", {"ENV_FILE": "launch/uv.txt"}, "launch/uv.txt line 3 is not NAME=VALUE"),
    ("skypilot", {"ENV_FILE": "tests/launch/__init__.py"}, "which git tracks, so that it would be packed"),
  ],
)
def test_wrong_settings_are_refused_before_anything_happens(name, settings, reason, tmp_path):
  machine = Machine(tmp_path)
  result = machine.run(name, **settings)
  assert result.returncode == 2
  assert reason in result.stderr
  assert not machine.calls


@pytest.mark.parametrize("words", [("start",), ("logs", "now"), ("--dry-run", "stop")])
def test_unknown_words_are_refused(words, tmp_path):
  machine = Machine(tmp_path)
  result = machine.run("tpu_vm", *words)
  assert result.returncode == 2
  assert f"takes no '{words[-1]}'" in result.stderr
  assert not machine.calls


def test_quoted_words_are_read_back_as_they_were():
  words = [*HOSTILE, "", " ", "\n", "-", "a=b", "~", "{a,b}", "ü"]
  result = subprocess.run(
    ["bash", "-c", f"cd '{ROOT}' && . launch/common.sh && eval \"printf '%s\\0' $(quote \"$@\")\"", "bash", *words],
    capture_output=True,
    text=True,
    check=True,
  )
  assert result.stdout.split("\0")[:-1] == words


@pytest.mark.parametrize(
  ("codes", "calls", "last"),
  [
    ("0", 1, 0),
    ("75 75 0", 3, 0),
    ("75 70 0", 2, 70),
    ("2", 1, 2),
    ("70", 1, 70),
    ("1", 1, 1),
    ("137", 1, 137),
    ("75 75 75 75 75 75", 4, 75),
  ],
)
def test_only_what_was_preempted_is_tried_again(codes, calls, last, tmp_path):
  command = (
    f'f() {{ echo >>"{tmp_path}/calls"; local c=({codes}); return "${{c[$(wc -l <"{tmp_path}/calls") - 1]}}"; }}'
  )
  result = common(f"{command}; retry f", RETRIES="3", RETRY_WAIT="0")
  assert result.returncode == last
  assert len((tmp_path / "calls").read_text().splitlines()) == calls
  assert result.stderr.count("preempted; attempt ") == calls - 1


@pytest.mark.parametrize("name", CLOUDS)
def test_what_is_missing_is_found_before_anything_is_created(name, tmp_path):
  checked = tmp_path / "checked"
  stand_in = python(tmp_path, f"open({str(checked)!r}, 'w').write(repr(arguments)); sys.exit(2)")
  machine = Machine(tmp_path / "machine")
  result = machine.run(name, "--config=configs/grpo.py:lora,gsm8k", PYTHON=str(stand_in), CHECK="yes")
  assert result.returncode == 2
  assert "nothing was created; CHECK=no starts all the same" in result.stderr
  assert not machine.calls
  expected = ["-m", "d1jax.main", "--config=configs/grpo.py:lora,gsm8k", "--config.workdir=gs://bucket/run", "--check"]
  assert checked.read_text() == repr(expected)
  shown = machine.run(name, "--dry-run", CHECK="yes").stdout.splitlines()[0]
  assert shown.startswith("env JAX_PLATFORMS=cpu .venv/bin/python -m d1jax.main ")
  assert shown.endswith(" --check")


def test_a_machine_without_d1jax_says_that_it_cannot_check(tmp_path):
  result = common("check", PYTHON="nowhere/python", WORKDIR="gs://b/r")
  assert result.returncode == 0
  assert "flags, model and data are not checked; `make setup` makes it" in result.stderr


def test_variables_reach_the_command_as_they_stand(tmp_path):
  (tmp_path / "env").write_text("# mine\n\nA=x y\nB=$(touch ran) `id` \"'\\\nC=\nD=last=1")
  command = ["bash", ROOT / "launch/with_env.sh", tmp_path / "env", "env", "-0"]
  found = subprocess.run(
    command, capture_output=True, text=True, check=True, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}
  )
  expected = {"A": "x y", "B": "$(touch ran) `id` \"'\\", "C": "", "D": "last=1"}
  got = dict(pair.split("=", 1) for pair in found.stdout.split("\0") if pair)
  assert {name: got[name] for name in expected} == expected
  assert not (tmp_path / "ran").exists()


def test_only_what_git_tracks_and_what_is_named_is_packed(tmp_path):
  tree = tmp_path / "tree"
  shutil.copytree(ROOT / "launch", tree / "launch")
  (tree / ".gitignore").write_text("*.bin\n")
  (tree / "gone.py").write_text("")
  git = ["git", "-C", str(tree), "-c", "user.name=n", "-c", "user.email=e"]
  subprocess.run([*git, "init", "-q"], check=True)
  subprocess.run([*git, "add", "."], check=True)
  (tree / "gone.py").unlink()
  for name in ("weights.bin", ".env", "hf_token.txt", "mine.py", "also.py"):
    (tree / name).write_text("")
  (tree / ".gitignore").write_text("*.bin\n# changed\n")
  line = f"cd '{tree}' && . launch/common.sh && pack '{tmp_path}/tree.tgz'"
  said = subprocess.run(
    ["bash", "-c", line], check=True, capture_output=True, text=True, env=os.environ | {"PACK": "mine.py also.py"}
  )
  assert "left out, since git does not track them: .env hf_token.txt; PACK names" in said.stderr
  names = subprocess.run(["tar", "-tzf", tmp_path / "tree.tgz"], capture_output=True, text=True, check=True).stdout
  assert set(names.splitlines()) == {
    ".gitignore",
    "mine.py",
    "also.py",
    *(f"launch/{path.name}" for path in (ROOT / "launch").iterdir()),
  }
