"""Several processes on this machine: all run, and all end as one."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.launch.scripts import HOSTILE, ROOT, Machine, python, wait_until

FLAG = "--config.distributed."
# A process knows its number, and how many times it was started before.
WHO = f"""
import pathlib
told = dict(word.removeprefix("{FLAG}").split("=") for word in arguments if word.startswith("{FLAG}"))
me = told.get("process", "0")
folder = pathlib.Path(sys.argv[0]).parent
(folder / f"pid-{{me}}").write_text(str(os.getpid()))
with open(folder / f"starts-{{me}}", "a") as file:
  file.write("x")
start = len((folder / f"starts-{{me}}").read_text())
"""


def launch(folder: Path, body: str, *flags: str, **settings: str) -> subprocess.Popen[str]:
  """`launch/local.sh` with a program in place of Python."""
  program = python(folder, WHO + body)
  settings = {"PYTHON": str(program), "GRACE": "1", "WORKDIR": "runs/w"} | settings
  environment = Machine(folder / "machine").environment(**settings)
  environment.pop("JAX_PLATFORMS", None)
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return subprocess.Popen(["launch/local.sh", *flags], cwd=ROOT, env=environment, start_new_session=True, **pipes)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


def starts(folder: Path, process: int) -> int:
  path = folder / f"starts-{process}"
  return len(path.read_text()) if path.exists() else 0


def gone(folder: Path, process: int) -> bool:
  """Whether a process is no more."""
  return not Path(f"/proc/{(folder / f'pid-{process}').read_text()}").exists()


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_are_told_of_each_other(processes, tmp_path):
  body = "for word in arguments: say(ascii(word))\nsay(os.environ.get('JAX_PLATFORMS'))"
  code, out, err = finish(launch(tmp_path, body, *HOSTILE, PROCESSES=str(processes)))
  assert code == 0
  (port,) = set(re.findall(r"coordinator=127\.0\.0\.1:(\d+)", out))
  for number in range(processes):
    told = [f"{FLAG}coordinator=127.0.0.1:{port}", f"{FLAG}processes={processes}", f"{FLAG}process={number}"]
    words = [ascii(word) for word in ("-m", "d1jax.main", *HOSTILE, "--config.workdir=runs/w", *told)]
    lines = [line for line in out.splitlines() if line.startswith(f"[{number}] ")]
    assert lines == [f"[{number}] {text}" for text in (*words, "cpu")]
  assert "launch: done" in err
  assert "checkpoints, metrics and reports: runs/w" in err


def test_one_process_runs_as_if_started_by_hand(tmp_path):
  body = "say(' '.join(arguments))\nsay(os.environ.get('JAX_PLATFORMS'))"
  code, out, _ = finish(launch(tmp_path, body, PROCESSES="1"))
  assert code == 0
  assert out.splitlines() == ["[0] -m d1jax.main --config=configs/grpo.py --config.workdir=runs/w", "[0] None"]


def test_logs_come_while_processes_run_and_to_the_last_line(tmp_path):
  body = "say('hello')\nwhile not (folder / 'enough').exists(): time.sleep(0.02)\nsys.stdout.write('no newline')"
  process = launch(tmp_path, body)
  assert process.stdout is not None
  assert {process.stdout.readline() for _ in range(2)} == {"[0] hello\n", "[1] hello\n"}
  (tmp_path / "enough").touch()
  code, out, _ = finish(process)
  assert code == 0
  assert sorted(out.splitlines()) == ["[0] no newline", "[1] no newline"]


def test_preempted_processes_are_started_again_together(tmp_path):
  code, _, err = finish(launch(tmp_path, "sys.exit(75 if start < 3 else 0)"))
  assert code == 0
  assert (starts(tmp_path, 0), starts(tmp_path, 1)) == (3, 3)
  assert err.count("preempted; attempt") == 2


@pytest.mark.parametrize(
  ("codes", "worst"),
  [((70, 0), 70), ((0, 2), 2), ((75, 70), 70), ((70, 75), 70), ((0, 0), 0)],
)
def test_the_worst_exit_code_is_passed_on_and_not_tried_again(codes, worst, tmp_path):
  code, _, err = finish(launch(tmp_path, f"sys.exit({codes}[int(me)])"))
  assert code == worst
  assert (starts(tmp_path, 0), starts(tmp_path, 1)) == (1, 1)
  for process, own in enumerate(codes):
    assert (f"process {process} ended with exit code {own}" in err) == (own != 0)


# Process 0 answers SIGTERM, or does not.
@pytest.mark.parametrize("answers", [True, False])
def test_a_process_that_is_killed_ends_the_others(answers, tmp_path):
  stop = f"signal.signal(signal.SIGTERM, (lambda *_: sys.exit(75)) if {answers} else signal.SIG_IGN)\n"
  process = launch(tmp_path, stop + "say('here')\ntime.sleep(300)", PROCESSES="3")
  assert process.stdout is not None
  for _ in range(3):
    process.stdout.readline()
  os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
  code, _, err = finish(process)
  assert code == 137
  assert "process 1 ended with exit code 137" in err
  assert "ending the others: 0 2" in err
  assert f"process 0 ended with exit code {75 if answers else 137}" in err
  assert [starts(tmp_path, number) for number in range(3)] == [1, 1, 1]


def test_others_have_time_to_end_by_themselves(tmp_path):
  body = "if me == '0':\n  time.sleep(2)\n  say('written')\nsys.exit(75)"
  code, out, err = finish(launch(tmp_path, body, RETRIES="0", GRACE="30"))
  assert code == 75
  assert "[0] written" in out
  assert "ending the others" not in err


def test_a_process_that_is_done_does_not_hurry_the_others(tmp_path):
  code, out, err = finish(launch(tmp_path, "if me == '0':\n  time.sleep(2.5)\n  say('written')"))
  assert code == 0
  assert "[0] written" in out
  assert "ending" not in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_lets_all_save_and_ends_the_run(number, code, tmp_path):
  handlers = "for n, c in ((15, 75), (2, 130)): signal.signal(n, lambda *_, c=c: (say('saved'), sys.exit(c)))\n"
  process = launch(tmp_path, handlers + "say('here')\ntime.sleep(300)")
  assert process.stdout is not None
  for _ in range(2):
    process.stdout.readline()
  process.send_signal(number)
  ended, out, err = finish(process)
  assert ended == code
  assert sorted(out.splitlines()) == ["[0] saved", "[1] saved"]
  assert "attempt" not in err
  assert (starts(tmp_path, 0), starts(tmp_path, 1)) == (1, 1)


def test_what_a_process_leaves_behind_is_ended(tmp_path):
  body = "child = os.fork()\nif child == 0:\n  (folder / 'pid-9').write_text(str(os.getpid()))\n  time.sleep(300)\n"
  body += "while not (folder / 'pid-9').exists(): time.sleep(0.02)\nsys.exit(70)"
  assert finish(launch(tmp_path, body, PROCESSES="1"))[0] == 70
  wait_until(lambda: gone(tmp_path, 9))
