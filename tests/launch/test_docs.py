"""The page that walks through the scripts shows what they print."""

import re
import subprocess

import pytest

from tests.launch.scripts import CLOUDS, ROOT

PAGE = (ROOT / "docs/launch.md").read_text()
SHOWN = re.findall(r"^```console\n\$ (.*)\n((?:.*\n)*?)```$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("command", "output"), SHOWN, ids=[command for command, _ in SHOWN])
def test_a_command_prints_what_the_page_shows(command, output):
  assert command.endswith(" --dry-run")
  clean = {"PATH": "/usr/bin:/bin"}
  merged = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
  result = subprocess.run(["bash", "-c", command], cwd=ROOT, env=clean, timeout=60, **merged)
  assert result.stdout == output
  assert result.returncode == 0


@pytest.mark.parametrize("name", [*CLOUDS, "local"])
def test_every_script_is_shown(name):
  assert any(f"launch/{name}.sh" in command for command, _ in SHOWN)


def test_settings_that_the_page_names_exist():
  settings = (ROOT / "launch/env.sh").read_text()
  named = set(re.findall(r"\b([A-Z][A-Z_]{2,})(?==)", "\n".join(command for command, _ in SHOWN)))
  assert named
  for name in named | {"PREPARE", "RETRIES", "GRACE", "PROCESSES", "ACCELERATOR", "RUNTIME"}:
    assert f': "${{{name}:=' in settings


def test_links_lead_somewhere():
  anchors = {re.sub(r"[^a-z -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^## (.*)$", PAGE, re.M)}
  for target in re.findall(r"\]\(([^)]+)\)", PAGE):
    if target.startswith("#"):
      assert target[1:] in anchors
    elif not target.startswith("https://"):
      assert (ROOT / "docs" / target.partition("#")[0]).is_file()
