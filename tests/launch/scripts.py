"""Runs the launch scripts on a machine with none of the tools they call: fakes stand in, and write down each call."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
CLOUDS = ("tpu_vm", "queued", "gke", "slurm", "skypilot")
TOOLS = ("gcloud", "gcluster", "kubectl", "sbatch", "srun", "scontrol", "scancel", "sky")
SETTINGS = {
  "PROJECT": "p1",
  "ZONE": "z1",
  "CLUSTER": "c1",
  "IMAGE": "registry/image:1",
  "CHECK": "no",
  "WORKDIR": "gs://bucket/run",
  "RETRIES": "3",
  "RETRY_WAIT": "0",
}
# What a shell would change if it were quoted wrongly.
HOSTILE = (
  "--config=configs/grpo.py:tiny,sudoku",
  "--config.a=two  words",
  "--config.b='\"$HOME`id`*\\;&|#",
  "--config.c=(1, 2)",
)

# A tool that writes down its arguments. The answers are rules, the first whose words are all among the arguments holds;
# each call takes the rule's next (output, exit code), the last one stays.
FAKE = f"""#!{sys.executable} -SE
import json, os, pathlib, sys
folder, words = pathlib.Path(os.environ["FAKES"]), [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open(folder / "calls", "a") as file:
  file.write(json.dumps(words) + "\\n")
for index, (wanted, answers) in enumerate(json.loads((folder / "answers").read_text())):
  if all(any(want in word for word in words) for want in wanted):
    seen = folder / f"seen-{{index}}"
    count = len(seen.read_text()) if seen.exists() else 0
    seen.write_text("x" * (count + 1))
    output, code = answers[min(count, len(answers) - 1)]
    print(output)
    sys.exit(code)
"""


class Machine:
  """A folder with fake tools on the path.

  Args:
    folder: an empty folder, or none yet.
    answers: rules of `FAKE`: (words of a call, its (output, exit code) one call after the other).
  """

  def __init__(self, folder: Path, *answers: tuple[tuple[str, ...], list[tuple[str, int]]]) -> None:
    self.folder = folder
    (folder / "bin").mkdir(parents=True)
    (folder / "answers").write_text(json.dumps(answers))
    for tool in TOOLS:
      path = folder / "bin" / tool
      path.write_text(FAKE)
      path.chmod(0o755)

  def run(self, script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """`launch/SCRIPT.sh ARGUMENT...` with a temporary folder of its own."""
    command = [f"launch/{script}.sh", *arguments]
    return subprocess.run(
      command, cwd=ROOT, env=self.environment(**settings), capture_output=True, text=True, timeout=60
    )

  def environment(self, **settings: str) -> dict[str, str]:
    path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return kept | {"PATH": path, "FAKES": str(self.folder), "TMPDIR": str(self.folder)} | SETTINGS | settings

  @property
  def calls(self) -> list[list[str]]:
    """The calls of tools so far, in order."""
    path = self.folder / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def called(self, *words: str) -> list[list[str]]:
    """The calls that hold all these words."""
    return [call for call in self.calls if set(words) <= set(call)]


def printed(result: subprocess.CompletedProcess[str]) -> list[list[str]]:
  """The commands of a dry run, as words."""
  assert result.returncode == 0, result.stderr
  return [shlex.split(line) for line in result.stdout.splitlines()]


def value(call: list[str], flag: str) -> str:
  """The value of `--FLAG=VALUE` in a call."""
  return next(word.partition("=")[2] for word in call if word.startswith(f"--{flag}="))


def python(folder: Path, body: str) -> Path:
  """A program to stand in for Python, written in Python; `arguments` are its own, `say` prints a line at once."""
  path = folder / "python"
  start = "import os, signal, sys, time\narguments = sys.argv[1:]\nsay = lambda text: print(text, flush=True)\n"
  path.write_text(f"#!{sys.executable} -SE\n{start}{body}")
  path.chmod(0o755)
  return path


def wait_until(condition: Callable[[], bool], timeout: float = 20) -> None:
  """Returns once the condition holds."""
  end = time.monotonic() + timeout
  while not condition():
    assert time.monotonic() < end, "it never came to pass"
    time.sleep(0.02)
