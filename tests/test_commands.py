"""The command `d1jax`: what is typed, as flags of `d1jax.main`; and the presets by name."""

import importlib
import re
import sys

import pytest

import d1jax
from d1jax import __main__, commands, errors, presets
from tests import jobs

GRPO = f"--config={jobs.ROOT / 'configs' / 'grpo.py'}"


@pytest.mark.parametrize(
  ("typed", "flags"),
  [
    ("train", [GRPO]),
    ("train grpo", [GRPO]),
    ("train grpo:tiny,countdown --config.grpo.steps=5", [f"{GRPO}:tiny,countdown", "--config.grpo.steps=5"]),
    ("train smoke --grpo.steps=5 --workdir x", [f"{GRPO}:smoke", "--config.grpo.steps=5", "--config.workdir", "x"]),
    ("train smoke --print_config", [f"{GRPO}:smoke", "--print_config"]),
    ("train --grpo.loss=sandwich", [GRPO, "--config.grpo.loss=sandwich"]),
    ("generate --checkpoint=runs/x", [GRPO.replace("grpo.py", "generate.py"), "--config.checkpoint=runs/x"]),
    ("--config=configs/grpo.py:smoke --config.seed=1", ["--config=configs/grpo.py:smoke", "--config.seed=1"]),
  ],
)  # fmt: skip
def test_a_command_is_flags(typed, flags):
  assert commands.flags(typed.split()) == flags


@pytest.mark.parametrize(
  ("typed", "message"),
  [
    ("trian", "unknown command 'trian'; known: train, sft, dpo, distill, eval, report, generate, serve, export, aot"),
    ("train tinny", "unknown preset word 'tinny'; known: tiny, smoke, "),
    ("train sft:tiny", "d1jax train takes no preset 'sft'; known: grpo, and words behind a colon"),
    ("export tiny", "preset export takes no words, but has 'tiny' behind the colon: leave it out"),
  ],
)
def test_what_is_unknown_is_a_line_with_what_is_known(typed, message, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["d1jax", *typed.split()])
  with pytest.raises(SystemExit) as caught:
    __main__.main()
  assert caught.value.code == 2
  out, said = capsys.readouterr()
  assert out == ""
  assert said.startswith(f"d1jax: {message}")
  assert len(said.splitlines()) == 1


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_names_words_fields_and_commands_that_work(name, capsys):
  assert commands.flags([name, "--help"]) is None
  said = capsys.readouterr().out
  command = commands.COMMANDS[name]
  assert command.does in " ".join(said.split())
  for field in command.fields:
    assert re.search(rf"^  --{re.escape(field)}=\S", said, re.MULTILINE), field
  for word in sum(presets.words(command.preset).values(), ()):
    assert re.search(rf"\b{word}\b", said), word
  assert max(map(len, said.splitlines())) <= 80
  for example in command.examples:
    assert f"  d1jax {name} {example}\n" in said
    assert commands.flags([name, *example.split()])


def test_help_shows_the_values_of_a_preset(capsys):
  assert commands.flags(["train", "llada_8b,gsm8k", "--help"]) is None
  assert "--lora.rank=128 " in capsys.readouterr().out


def test_without_a_command_it_says_which_there_are(capsys):
  for typed in ([], ["--help"], ["help"]):
    assert commands.flags(typed) is None
    listed = re.findall(r"^  (\w+) +\S", capsys.readouterr().out, re.MULTILINE)
    assert listed == [*commands.COMMANDS]
  assert commands.flags(["--version"]) is None
  assert capsys.readouterr().out == f"d1jax {d1jax.__version__}\n"


def test_the_presets_of_a_clone_are_its_configs(monkeypatch):
  monkeypatch.chdir(jobs.ROOT)
  assert presets.shown() == "configs/"
  assert presets.load("grpo:smoke,countdown").to_dict() == jobs.load("grpo", "smoke,countdown").to_dict()


def test_presets_take_other_values():
  config = presets.load("grpo:tiny", {"grpo.steps": 5, "workdir": "runs/x", "grpo.beta": 0.1, "grpo.loss": "sandwich"})
  assert (config.grpo.steps, config.workdir) == (5, "runs/x")
  assert (config.grpo.loss.name, config.grpo.loss.beta) == ("sandwich", 0.1)


@pytest.mark.parametrize(
  ("preset", "overrides", "message"),
  [
    (
      "nothing",
      {},
      "unknown preset 'nothing'; known: aot, distill, dpo, eval, export, generate, grpo, report, serve, sft",
    ),
    ("grpo:tinny", {}, "unknown preset word 'tinny'"),
    ("grpo", {"grpo.stpes": 5}, "unknown field 'grpo.stpes'; did you mean grpo.steps"),
    ("grpo", {"gpro.steps": 5}, "unknown field 'gpro.steps'; did you mean grpo?"),
    ("grpo", {"xyz": 5}, "unknown field 'xyz'; known: cpu_devices, data, "),
    ("grpo", {"grpo.steps": "five"}, "grpo.steps='five' has another type"),
    ("grpo", {"grpo.loss": "none"}, "unknown grpo.loss 'none'; choose one of"),
    ("generate", {}, "config.mode is 'generate'; d1jax.train takes grpo, dpo and sft"),
  ],
)
def test_training_from_python_says_what_is_wrong(preset, overrides, message):
  with pytest.raises(errors.RunError, match=message):
    d1jax.train(preset, overrides)


def test_training_from_python_runs_the_recipe_on_a_configuration_of_its_own(monkeypatch):
  seen = []
  monkeypatch.setattr("d1jax.recipe.run", lambda config: seen.append(config) or {"after": {}})
  given = jobs.load("grpo", "smoke")
  assert d1jax.train(given, {"grpo.steps": 5}) == {"after": {}}
  assert d1jax.train("sft:smoke") == {"after": {}}
  assert [config.mode for config in seen] == ["grpo", "sft"]
  assert (given.grpo.steps, seen[0].grpo.steps) == (8, 5)
  assert seen[0].is_locked


def test_a_package_that_is_missing_is_named_with_its_extra():
  with (
    pytest.raises(errors.RunError, match=r'no_such is not installed: pip install "d1jax\[train\]" brings it;'),
    errors.extra("train"),
  ):
    importlib.import_module("no_such.module")
