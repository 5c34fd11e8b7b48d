"""The image: the linter finds nothing, and no file of a clone reaches it that is not listed."""

import fnmatch
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.launch.scripts import ROOT

HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def test_the_linter_finds_nothing():
  assert HADOLINT, "pip install -r tests/requirements.txt"
  result = subprocess.run([HADOLINT, "--format=json", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
  assert (result.returncode, json.loads(result.stdout)) == (0, []), result.stderr


def test_what_is_copied_is_there_and_is_not_ignored():
  rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
  assert rules[0] == "*"
  listed = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
  copied = [
    word
    for line in (ROOT / "Dockerfile").read_text().splitlines()
    if line.startswith("COPY ")
    for word in line.split()[1:-1]
    if word != "."
  ]
  assert copied
  for name in (*copied, "d1jax/models/families/llada.py", "configs/grpo.py", "launch/with_env.sh"):
    assert (ROOT / name).is_file()
    assert any(fnmatch.fnmatch(name, rule.replace("**/", "")) for rule in listed), name
  for name in (".env", "hf_token.txt", "runs/d1/results.json", ".git/config", "launch/mine.env"):
    assert not any(fnmatch.fnmatch(name, rule.replace("**/", "")) for rule in listed), name


def test_the_installer_is_pinned_by_hashes():
  text = (ROOT / "launch/uv.txt").read_text()
  assert text.count("==") == 1
  assert text.count("--hash=sha256:") == 3
  script = (ROOT / "launch/install.sh").read_text()
  assert "--require-hashes -r launch/uv.txt" in script
  assert "curl" not in script
