"""The command `d1jax`: `d1jax train grpo:tiny,countdown --grpo.steps=5` is written as flags of `d1jax.main`.

Nothing here imports JAX, so that `--help` and a mistyped command are answered at once.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from d1jax import columns, errors
from d1jax.version import __version__

with errors.environment():
  from d1jax import presets


class Command(NamedTuple):
  """What `d1jax NAME` does.

  Attributes:
    does: one line about the command.
    preset: its file in `configs/`.
    examples: arguments that may follow the name.
    fields: the fields that are set most often, and their meaning.
  """

  does: str
  preset: str
  examples: tuple[str, ...]
  fields: Mapping[str, str]


_RUN = {
  "workdir": "the run's folder; the same command goes on with what it finds there",
  "model.pretrained": "the folder of a downloaded model; None: a new model",
  "data.root": "the folder with data files; None: questions are made by rule",
  "trackers": "tensorboard, wandb, trackio or FILE.py, separated by commas",
  "seed": "of all that is drawn",
  "sft.steps": "optimiser steps of supervised fine-tuning; 0: none",
  "sft.learning_rate": "its highest learning rate",
}
_GRPO = {
  "grpo.steps": "iterations of diffu-GRPO: a rollout and num_iterations optimiser steps each",
  "grpo.learning_rate": "its highest learning rate",
  "grpo.prompts_per_iteration": "prompts of a rollout",
  "grpo.num_generations": "completions of a prompt",
  "rollout.completion_length": "tokens of a completion",
  "rollout.temperature": "of the draws",
  "lora.rank": "of adapters; 0: every weight is trained",
}
_WHO = {
  "checkpoint": "a run's folder, or the folder of one of its checkpoints",
  "pretrained": "instead: the folder of a model; d1jax:sudoku comes with d1jax",
}

COMMANDS: Mapping[str, Command] = {
  "train": Command(
    "Trains: supervised fine-tuning, then diffu-GRPO, then one look at the held-out split.",
    "grpo",
    ("grpo:tiny", "grpo:smoke --workdir=runs/try", "grpo:tiny,countdown --grpo.steps=500 --workdir=runs/countdown"),
    _RUN | _GRPO,
  ),
  "sft": Command(
    "Trains by supervised fine-tuning alone.",
    "sft",
    ("tiny", "lora --model.pretrained=FOLDER", "adapt --model.pretrained=FOLDER --sft.data=mine.jsonl"),
    _RUN | {"sft.data": "your own data (docs/adapt.md); None: the task's demonstrations"},
  ),
  "dpo": Command(
    "Trains on pairs of answers, the better one against the worse one: of a file, or of graded rollouts.",
    "dpo",
    ("tiny", "tiny --pairs.checkpoint=runs/sft", "lora --model.pretrained=FOLDER --pairs.file=PAIRS.jsonl"),
    _RUN
    | {
      "pairs.file": "JSON lines of prompt or messages, chosen, rejected; None: pairs are made from rollouts",
      "pairs.checkpoint": "the run that samples them; None: the policy at the start",
      "dpo.steps": "optimiser steps of preference tuning",
      "dpo.learning_rate": "its highest learning rate",
      "dpo.beta": "the weight of the preference score",
      "dpo.samples": "masks of an answer",
    },
  ),
  "distill": Command(
    "Samples a checkpoint, fine-tunes the base on its right answers, goes on with diffu-GRPO; in rounds.",
    "distill",
    (
      "tiny --checkpoint=runs/grpo --workdir=runs/distill",
      "tiny --checkpoint=runs/grpo --output=ANSWERS.jsonl",
      "lora,gsm8k --model.pretrained=FOLDER --checkpoint=runs/grpo",
    ),
    {
      "checkpoint": "a run's folder, which samples the first round, or the folder of one of its checkpoints",
      "pretrained": "instead: the folder of a model",
      "rounds": "each samples what the one before it ended with",
      "output": "a new file: answers are sampled into it, and nothing is trained",
      "distill.questions": "the first ones of the training split",
      "distill.samples": "answers to each of them",
      "distill.temperature": "of these answers",
      "distill.keep": "the shortest right answer of a question; or distinct: at most distill.most different ones",
      "workdir": "the rounds' folder; the same command goes on with what it finds there",
      "model.pretrained": "the base, which every round fine-tunes: a model's folder; None: a new model",
      "sft.steps": "optimiser steps of each fine-tuning",
      "grpo.steps": "iterations of each diffu-GRPO",
    },
  ),
  "eval": Command(
    "Evaluates a checkpoint, a model's folder or completions in a file: numbers, items, a page.",
    "eval",
    ("--checkpoint=runs/grpo", "gsm8k --pretrained=FOLDER --data_root=DATA"),
    _WHO
    | {
      "generations": "instead: completions to grade without a model, a file or a folder",
      "perplexity": "instead of questions: a file of text that the model is to predict",
      "split": "whose questions are asked",
      "questions": "at most so many of each task; None: all",
      "protocol": "how answers are graded: strict, or d1",
      "samples": "answers to each question",
      "compare": "the output of an earlier evaluation",
      "output": "the folder of the results; None: a new one in the run's folder",
    },
  ),
  "report": Command(
    "Draws the page of a run, or of two on the same axes: curves, samples, cost.",
    "report",
    ("--workdir=runs/grpo --output=report.html", "--workdir=runs/grpo --compare=runs/other --output=both.html"),
    {
      "workdir": "a run's folder, in which nothing is written",
      "compare": "another run's; None: the run is drawn alone",
      "output": "the page, a file that ends in .html",
    },
  ),
  "generate": Command(
    "Completes prompts: one that is given, or the lines of standard input; or talks with you.",
    "generate",
    (
      "--checkpoint=runs/grpo --task=sudoku --prompt=0300413012003420",
      "--pretrained=FOLDER --show_steps=True",
      "--pretrained=FOLDER --chat=True",
    ),
    _WHO
    | {
      "chat": "a conversation, in which an answer is shown as it is denoised",
      "prompt": "None: the lines of standard input",
      "task": "sudoku or countdown: the prompt is its question, and the answer is graded",
      "length": "tokens of the completion",
      "tokens_per_step": "tokens that a denoising step reveals",
      "temperature": "0 is greedy",
      "samples": "answers to each prompt",
      "show_steps": "shows the answer as it is revealed",
      "film": "the same as a picture: a .gif",
    },
  ),
  "serve": Command(
    "Serves a checkpoint or a model's folder to OpenAI's clients, with a chat as a page.",
    "serve",
    ("--checkpoint=runs/grpo", "--pretrained=FOLDER --port=8080 --api_key_file=KEY"),
    _WHO
    | {
      "name": "of the model, as clients say it; None: the folder's",
      "host": "0.0.0.0 listens for other machines too",
      "port": "0 takes any that is free",
      "api_key_file": "a file with the key that clients send; None: none is asked for",
      "slots": "answers at a time",
      "lengths": "of a prompt and its answer together, in tokens",
      "queue": "answers that wait; more are refused",
    },
  ),
  "export": Command(
    "Writes a run's result as a model's folder for PyTorch, or as a PEFT adapter.",
    "export",
    ("--checkpoint=runs/grpo --output=FOLDER",),
    {
      "checkpoint": _WHO["checkpoint"],
      "output": "a new folder",
      "form": "model, or adapter",
      "pretrained": "where the folder that the run started from is now; None: where it was",
      "push_to_hub": "OWNER/NAME on the Hugging Face hub, to which the folder is pushed too; HF_TOKEN must be set",
    },
  ),
  "aot": Command(
    "Compiles a run's programs for TPUs that are not at hand, and says whether they fit.",
    "aot",
    ("lora,gsm8k,v5e --topology=v5e:2x4",),
    {
      "topology": "a generation of TPUs, and the chips along each axis",
      "slices": "such slices, joined by the network of the data centre",
      "output": "a JSON file with the figures; None: they are only printed",
    },
  ),
}
_FIELD = re.compile(r"--(?!config\b|print_config$|check$)(?=\w)")


def usage() -> str:
  """What `d1jax --help` prints: the commands."""
  return "\n".join(
    [
      "usage: d1jax COMMAND [PRESET] [--FIELD=VALUE ...]",
      "",
      *columns.explained((name, command.does) for name, command in COMMANDS.items()),
      "",
      "d1jax COMMAND --help lists presets, their words and the fields that are set",
      "most; d1jax COMMAND PRESET --print_config lists all fields, with values and",
      "comments. python -m d1jax is the same command in a clone.",
      "d1jax --config=FILE.py:WORDS takes a configuration of your own.",
      "d1jax --version says which release this is.",
    ]
  )


def help_of(name: str, preset: str) -> str:
  """What `d1jax NAME PRESET --help` prints: words, fields with the values of the preset, examples."""
  command, config = COMMANDS[name], presets.load(preset)
  lines = [f"usage: d1jax {name} [PRESET] [--FIELD=VALUE ...]", "", *textwrap.wrap(command.does, columns.WIDTH), ""]
  kind = preset.partition(":")[0]
  known = {group: ", ".join(names) for group, names in presets.words(kind).items()}
  if known:
    lines += ["PRESET is words of these, separated by commas, with or without", f"{command.preset}: before them:"]
    lines += [*columns.explained(known.items()), ""]
  flat = config.to_dict()
  values = {}
  for field in command.fields:
    section, _, inner = field.rpartition(".")
    if not section or section in flat:
      values[field] = f"--{field}={flat[section][inner] if section else flat[inner]}"
  lines += [f"The fields that are set most, with the values of {preset}:"]
  lines += columns.explained((value, command.fields[field]) for field, value in values.items())
  every = (
    f"All fields: d1jax {name} {preset} --print_config, or {presets.shown()}{kind}.py. What may be empty takes None."
  )
  lines += ["", *textwrap.wrap(every, columns.WIDTH, break_on_hyphens=False), ""]
  return "\n".join([*lines, *(f"  d1jax {name} {example}" for example in command.examples)])


def about(mode: str) -> dict[str, str]:
  """What the fields of a mode mean that are set most, by dotted name."""
  return dict(next((command.fields for name, command in COMMANDS.items() if mode in (name, command.preset)), {}))


def _preset(name: str, given: str | None) -> str:
  """The preset that the first argument of a command names; words alone belong to the command's own preset."""
  own = COMMANDS[name].preset
  if given is None or given == own:
    return own
  kind, colon, _ = given.partition(":")
  if colon and kind != own:
    raise errors.RunError(f"d1jax {name} takes no preset {kind!r}; known: {own}, and words behind a colon")
  return given if colon else f"{own}:{given}"


def flags(arguments: Sequence[str]) -> list[str] | None:
  """Translates a command into flags of `d1jax.main`; prints help and returns None if the user asked for help.

  Args:
    arguments: the arguments after `d1jax`. If there are only flags, they are returned unchanged.

  Raises:
    RunError: there is no such command, preset or word; the message lists the known ones.
  """
  name, rest = (arguments[0], list(arguments[1:])) if arguments else ("--help", [])
  if name == "--version":
    print(f"d1jax {__version__}")
    return None
  if name in ("--help", "-h", "help"):
    print(usage())
    return None
  if name.startswith("-"):
    return list(arguments)
  if name not in COMMANDS:
    raise errors.RunError(f"unknown command {name!r}; known: {', '.join(COMMANDS)}")
  preset = _preset(name, rest.pop(0) if rest and not rest[0].startswith("-") else None)
  if "--help" in rest or "-h" in rest:
    print(help_of(name, preset))
    return None
  presets.load(preset)
  kind, colon, words = preset.partition(":")
  return [f"--config={presets.folder() / kind}.py{colon}{words}", *(_FIELD.sub("--config.", flag) for flag in rest)]
