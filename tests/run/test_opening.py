"""The first lines of a run, and what they say of an accelerator that JAX does not see."""

import logging
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import d1jax
from d1jax.parallel import chips
from d1jax.run import opening
from tests import jobs

PCI = "sys/bus/pci/devices/0000:00:01.0"


def machine(root: Path, files: dict[str, str]) -> Path:
  """A file system with these files."""
  for name, content in files.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(content)
  return root


@pytest.mark.parametrize(
  ("files", "found"),
  [
    ({}, None),
    ({"dev/nvidia0": ""}, "cuda13"),
    ({"dev/nvidiactl": "", "dev/accel": ""}, None),
    ({"dev/accel0": ""}, "tpu"),
    ({f"{PCI}/vendor": "0x10de\n", f"{PCI}/class": "0x030200\n"}, "cuda13"),
    ({f"{PCI}/vendor": "0x10de\n", f"{PCI}/class": "0x040300\n"}, None),
    ({f"{PCI}/vendor": "0x10de\n"}, None),
    ({f"{PCI}/vendor": "0x1ae0\n", f"{PCI}/device": "0x0063\n"}, "tpu"),
    ({f"{PCI}/vendor": "0x1ae0\n", f"{PCI}/device": "0x0042\n"}, None),
  ],
  ids=[
    "none",
    "GPU",
    "driver alone",
    "TPU",
    "GPU on the bus",
    "its sound",
    "no class",
    "TPU on the bus",
    "a network card",
  ],
)
def test_an_accelerator_is_found_by_its_files(tmp_path, files, found):
  assert chips.attached(machine(tmp_path, files)) == found


@pytest.mark.parametrize(
  ("platforms", "found", "warned"), [("", "tpu", True), ("cpu", "tpu", False), ("", None, False)]
)
def test_the_first_lines_name_devices_versions_parameters_and_the_folder(
  platforms, found, warned, monkeypatch, capsys, caplog
):
  monkeypatch.setenv("JAX_PLATFORMS", platforms)
  monkeypatch.setattr(chips, "attached", lambda: found)
  model = d1jax.from_pretrained(jobs.START, jnp.float32)
  with caplog.at_level(logging.WARNING):
    opening.say(model, Path("runs/mine"))
  first, second = capsys.readouterr().out.splitlines()
  assert re.fullmatch(rf"d1jax {d1jax.__version__}, jax {jax.__version__}, Python 3\.\d+\.\d+, on 1 x cpu", first)
  assert re.fullmatch(r"runs/mine: 0\.\dM parameters", second)
  said = "this machine has a TPU, but JAX sees only the CPU: stop, run make setup JAX=tpu, and start again"
  assert any(said in record.message for record in caplog.records) is warned


def test_what_takes_long_is_said_before_and_timed_after(capsys):
  with opening.timed("compiling"):
    assert capsys.readouterr().out == "compiling ..."
  assert capsys.readouterr().out == " 0 s\n"
  with pytest.raises(ZeroDivisionError), opening.timed("dividing"):
    _ = 1 / 0
  assert capsys.readouterr().out == "dividing ... stopped\n"
