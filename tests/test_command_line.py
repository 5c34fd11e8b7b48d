"""What is typed behind `python -m d1jax.main`: fields, None, `--help`, `--print_config`, and what a mistake is told."""

import re
import shlex
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from d1jax import commands, errors, main
from tests import jobs


def config_of(*arguments: str) -> ConfigDict:
  """The configuration of a command line."""
  argv, values = ["main", *arguments], flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "", flag_values=values)
  assert main.read(argv, values) == ["main"]
  return values["config"].value


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
  monkeypatch.chdir(jobs.ROOT)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ("--config.grpo.stpes=5", r"unknown field 'grpo\.stpes'; did you mean grpo\.steps or sft\.steps\?"),
    ("--config.steps=5", r"unknown field 'steps'; did you mean grpo\.steps or sft\.steps\?"),
    ("--config.learing_rate=1", r"unknown field 'learing_rate'; did you mean .*grpo\.learning_rate"),
    ("--config.seed=1 --config.sft.num_generations=1", r"'sft\.num_generations'; did you mean grpo\.num_generations\?"),
    ("--config.lora.rnak=None", r"unknown field 'lora\.rnak'; did you mean lora\.rank\?"),
    ("--config.xyz=1", "unknown field 'xyz'; known: cpu_devices, data, "),
    ("--config.lora.xyz=1", r"unknown field 'lora\.xyz'; known: lora\.alpha, lora\.dropout, "),
    ("--workdir=x", r"unknown flag --workdir; fields are set with --config\.workdir=VALUE"),
    ("--nothing=x", "unknown flag: Unknown command line flag 'nothing'"),
    ("--config.seed=one", r"wrong flag: flag --config\.seed=one: invalid literal"),
    ("--config.grpo.steps=None", r"wrong flag: grpo\.steps cannot be None; it is 8, leave the flag out to keep it"),
  ],
)
def test_a_mistake_is_a_line_that_names_what_may_be_meant(arguments, message):
  with pytest.raises(errors.RunError, match=message) as caught:
    config_of("--config=configs/grpo.py:smoke", *arguments.split())
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--config=configs/nothing.py", r"--config=configs/nothing\.py: no such file; the configurations are in configs/"),
    ("--config=configs/generate.py:sudoku", "preset generate takes no words, but has 'sudoku' behind the colon"),
    ("--config=configs/grpo.py:tinny", "unknown preset word 'tinny'; known: tiny, smoke"),
    ("--print_config", r"no configuration to print; try --config=configs/grpo\.py --print_config"),
  ],
)
def test_a_file_that_cannot_be_meant_is_a_line(flag, message):
  with pytest.raises(errors.RunError, match=message):
    config_of(flag)


@pytest.mark.parametrize("field", ["sft.logits_tile", "sft.data", "data.root", "model.pretrained", "grpo.loss.epsilon"])
def test_a_field_that_may_be_empty_takes_none(field):
  config = config_of(
    "--config=configs/sft.py:lora" if field == "sft.data" else "--config=configs/grpo.py", f"--config.{field}=None"
  )
  for part in field.split("."):
    config = config[part]
  assert config is None


@pytest.mark.parametrize(
  "preset",
  [
    "grpo:smoke",
    "grpo:lora,gsm8k,v5e",
    "grpo:sudoku,countdown",
    "sft:lora",
    "eval",
    "generate",
    "serve",
    "export",
    "aot",
  ],
)
def test_what_print_config_prints_is_a_command_line_of_the_same_configuration(preset, capsys):
  name, _, words = preset.partition(":")
  config = f"--config=configs/{name}.py" + (f":{words}" if words else "")
  with pytest.raises(SystemExit) as ended:
    config_of(config, "--config.cpu_devices=7", "--print_config")
  assert ended.value.code is None
  out = capsys.readouterr().out
  assert max(map(len, out.splitlines())) <= 160
  typed = shlex.split(out, comments=True)
  assert all(flag.startswith("--config.") for flag in typed)
  expected = config_of(config, "--config.cpu_devices=7")
  assert config_of(config, *typed).to_dict() == expected.to_dict()


def test_print_config_says_what_fields_mean(capsys):
  with pytest.raises(SystemExit):
    config_of("--config=configs/grpo.py", "--print_config")
  out = capsys.readouterr().out
  for line in (
    "  # micro-batches per optimiser step",  # beside the field in its file
    "# Adapters; rank 0 trains every weight instead.\n--config.lora.alpha=",  # above the section
    "--config.model.unroll=3  # layers that are compiled one after the other, instead of as a loop",  # run/fields.py
    "--config.grpo.learning_rate=0.0006  # its highest learning rate",  # commands.py
  ):
    assert line in out


def test_help_is_that_of_the_command(capsys):
  for arguments, expected in (
    (["--help"], commands.usage()),
    (["--config=configs/grpo.py:smoke", "--help"], commands.help_of("train", "grpo:smoke")),
    (["--config=configs/serve.py", "-h"], commands.help_of("serve", "serve")),
  ):
    with pytest.raises(SystemExit) as ended:
      config_of(*arguments)
    assert (ended.value.code, capsys.readouterr().out) == (None, expected + "\n")


def test_without_an_environment_it_is_a_line_with_the_remedy(monkeypatch):
  """In a process of its own: a Python that has nothing but itself."""
  for module in ("d1jax.main", "d1jax"):
    done = subprocess.run([sys.executable, "-S", "-E", "-m", module, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
      r"d1jax: \w+ is not installed in \S+: run make setup, then source \.venv/bin/activate .*\n", done.stderr
    )
