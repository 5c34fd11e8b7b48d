"""Fields that few people set: they are not in the files of `configs/`, and have the default values given here.

`--config.grpo.save_every=10` sets one like any other field. The configuration that a run records holds all of them.
"""

import ast
import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

STAGES = ("sft", "dpo", "grpo")


class Field(NamedTuple):
  """A field that exists in a configuration once it is set.

  Attributes:
    default: its value if it is not set.
    about: its meaning.
  """

  default: Any
  about: str


_STAGE: Mapping[str, Field] = {
  "optimizer": Field("adamw", "or muon, which needs fewer steps where a model learns from random weights"),
  "b1": Field(0.9, "decay of AdamW's first moment"),
  "ema_decay": Field(None, "of an average of the weights, which is validated, evaluated and exported; None: none"),
  "save_every": Field(None, "iterations between checkpoints; None: every validation saves one"),
  "patience": Field(None, "validations in a row without a better score that end the stage; None: all steps are done"),
  "seconds": Field(None, "of iterations, validations and saving, after which the stage ends; None: all steps are done"),
  "max_skipped_steps": Field(0, "iterations in a row whose loss may be not finite; one more ends the run"),
}

OPTIONAL: Mapping[str, Field] = {
  "report.compare": Field(None, "another run's folder, which WORKDIR/report.html draws beside this one; None: none"),
  "profile_steps": Field(None, "FIRST:LAST iterations, counted from 1, to trace into WORKDIR/profile; None: none"),
  "distributed.coordinator": Field(None, "HOST:PORT of process 0; None: found on Cloud TPUs, GKE, Slurm, Open MPI"),
  "distributed.processes": Field(None, "how many processes there are; None: found in the same way"),
  "distributed.process": Field(None, "the number of this one; None: found in the same way"),
  "distributed.timeout": Field(300, "seconds without a sign of life of a process until the others give up"),
  "model.overrides.embed": Field(None, "the width of a model without a folder; None: the preset's"),
  "model.overrides.heads": Field(None, "its heads"),
  "model.overrides.mlp": Field(None, "the width of its feed-forward layers"),
  "model.overrides.layers": Field(None, "its layers"),
  "model.overrides.rope_theta": Field(None, "the base of its rotary positions"),
  "model.block": Field(None, "tokens of a block of block-causal attention; None: config.json's, or full attention"),
  "model.unroll": Field(1, "layers that are compiled one after the other, instead of as a loop"),
  "lora.rslora": Field(False, "scales adapters by alpha / sqrt(rank) instead of alpha / rank"),
  "tokenizer.model_type": Field("char", "of the tokenizer that is trained without a folder: char, unigram, bpe"),
  "tokenizer.vocab_size": Field(512, "its largest vocabulary"),
  "tokenizer.symbols": Field((), "texts that are one token each, such as tags"),
  "rollout.refresh_every": Field(None, "steps between refreshes of the cache; None: one a block"),
  "rollout.look_behind": Field(16, "tokens before the block that the cache `window` computes anew"),
  "rollout.look_ahead": Field(16, "tokens behind the block that it computes anew"),
  "rollout.threshold": Field(0.9, "the confidence from which the schedule `threshold` unmasks a token"),
  "rollout.factor": Field(1.0, "of the schedule `factor`"),
  "rollout.max_reveal": Field(4, "tokens a step under those two, at most"),
  "sft.held_out": Field(0.05, "share of `sft.data` that validates; from 1 on, the number of questions"),
  "sft.samples": Field(
    0, "held-out prompts of `sft.data` that a validation completes, shows, writes to WORKDIR/samples"
  ),
  "sft.truncate": Field(False, "cuts answers beyond the largest bucket; otherwise they are left out"),
  "sft.packed": Field(False, "lets several demonstrations share a row, as long as the largest two buckets together"),
  "sft.ends": Field(0, "end-of-sequence tokens behind a packed answer of full attention, at most; they are learned"),
  "sft.mask_ratio": Field((0.001, 1.0), "range of the probability t that a completion token is masked"),
  "sft.weighting": Field("inverse", "of masked tokens: inverse, 1 / t; flat, the mean over a row's masked tokens"),
  "sft.complementary": Field(False, "gives each row twice; the second copy masks what the first one does not"),
  "sft.grow": Field((), "block lengths of the first parts of the steps, in equal parts; the last has the model's"),
  "sft.mask_noise_steps": Field(0, "first steps with noise on the mask's embedding, which falls to none"),
  "grpo.score_reference": Field(False, "scores the reference where beta is 0 too, to log the KL to it"),
  "grpo.importance_cap": Field(None, "of weights p_train / p_sample on recorded states; None: no weights"),
  "grpo.off_policy_steps": Field(0, "updates that the weights of a rollout miss; 0: each rollout has the newest"),
  "grpo.partial_age": Field(0, "iterations that a completion may begin before its own one, in free slots; 0: none"),
  "grpo.behaviour_cap": Field(5.0, "of weights p / p_behaviour in rollouts of older weights"),
  "grpo.rollout_slots": Field(None, "rows of a part of a rollout that are computed at a time; None: all"),
  "grpo.curriculum": Field(False, "draws prompts in proportion to 1 - their success rate, not once an epoch"),
  "grpo.length_reward": Field(0.0, "weight of Kimi k1.5's reward of short answers; 0: none"),
  "grpo.length_warmup": Field(0, "first iterations without it"),
  "grpo.length_curriculum": Field(
    (), "completion lengths of rollouts, the last rollout.completion_length; (): that alone"
  ),
  "grpo.length_threshold": Field(0.1, "share of answers without an end above which the next length is taken"),
  "grpo.dump_every": Field(0, "iterations between dumped rollouts; 0: none"),
  "grpo.drift_every": Field(50, "iterations between looks at what the rollouts' cache changes; 0: none"),
  "grpo.drift_limit": Field(None, "nats a token beyond which the cache goes off; None: the drift is only logged"),
  **{f"{stage}.{name}": field for stage in STAGES for name, field in _STAGE.items()},
}
"""The fields by dotted name. If a configuration lacks the section (`sft`, `rollout`), it lacks the field too."""

OPEN = ("rules", "rollout_rules", "rollout_mesh", "task.options", "task.mix", "grpo.reward_weights")
"""Sections with fields of any name: axes, options of a task, tasks, components of a reward. One flag may set several
fields: `--config.grpo.reward_weights="{'correct': 1.0, 'format': 0.2}"`, or `correct=1.0,format=0.2`."""
_WHERE = {"": STAGES, "report": STAGES, "distributed": (*STAGES, "eval")}
"""The modes whose configurations have a section; `""` stands for fields outside of sections."""


def _section(config: ConfigDict, name: str) -> ConfigDict | None:
  """The section of a field; None if the configuration does not have it."""
  first, *rest = name.split(".")[:-1] or [""]
  if first in _WHERE:
    if config.get("mode") not in _WHERE[first]:
      return None
  elif ("model" if first == "tokenizer" else first) not in config:
    return None
  if not first:
    return config
  section = config
  for part in (first, *rest):
    if part not in section:
      section[part] = ConfigDict()
    section = section[part]
  return section


def complete(config: ConfigDict) -> None:
  """Sets every field that is not set yet to its default."""
  with config.unlocked():
    for name, field in OPTIONAL.items():
      section = _section(config, name)
      if section is not None and name.rpartition(".")[2] not in section:
        section[name.rpartition(".")[2]] = field.default


def is_open(name: str) -> bool:
  """Whether a field is a section of `OPEN`, or is inside of one."""
  return any(f"{name}.".startswith(section + ".") for section in OPEN)


def take_flags(arguments: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
  """Splits a command line: (name, text) of arguments that set fields of this file or of `OPEN`, and all others."""
  found, others, rest = [], [], iter(arguments)
  for argument in rest:
    flag, equals, text = argument.partition("=")
    name = flag.lstrip("-").removeprefix("config.")
    if (
      not flag.startswith("-") or not flag.lstrip("-").startswith("config.") or not (name in OPTIONAL or is_open(name))
    ):
      others.append(argument)
    else:
      found.append((name, text if equals else next(rest, "")))
  return found, others


def _value(name: str, text: str) -> Any:
  """Converts a text into a value of the type of the field's default.

  Raises:
    ValueError: the text stands for another type.
  """
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  default = OPTIONAL[name].default if name in OPTIONAL else None
  if isinstance(default, float) and type(value) is int:
    value = float(value)
  if default is not None and type(value) is not type(default):
    raise ValueError(f"{name}={text!r} must be of the type {type(default).__name__}, as its default {default!r} is")
  return value


def _single(name: str, text: str) -> list[tuple[str, str]]:
  """Splits a flag of an open section into flags of single fields."""
  if name not in OPEN:
    return [(name, text)]
  try:
    several = {str(field): repr(value) for field, value in ast.literal_eval(text).items()} if text else {}
  except (ValueError, SyntaxError, AttributeError):
    parts = [part.partition("=") for part in text.split(",")]
    if not all(field.strip() and value.strip() for field, _, value in parts):
      raise ValueError(f"{name}={text!r}: write NAME=VALUE, separated by commas, or a dictionary") from None
    several = {field.strip(): value.strip() for field, _, value in parts}
  return [(f"{name}.{field}", value) for field, value in several.items()]


def choose(config: ConfigDict, flags: Sequence[tuple[str, str]]) -> None:
  """Sets fields.

  Raises:
    ValueError: the configuration lacks the section, or a value has another type.
  """
  with config.unlocked():
    for name, text in [one for flag in flags for one in _single(*flag)]:
      if is_open(name):
        section = functools.reduce(lambda inner, part: inner[part], name.split(".")[:-1], config)
      else:
        section = _section(config, name)
      if section is None and name == "model.block" and "bare" in config:
        section = config.bare.model  # of the folder that an evaluation or a generation samples with
      if section is None:
        raise ValueError(f"this configuration has no field {name}")
      section[name.rpartition(".")[2]] = _value(name, text)


def take_none(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
  """Splits a command line: the names of fields that are set to None, `--config.NAME=None`, and all other arguments."""
  found, others = [], []
  for argument in arguments:
    flag, _, text = argument.partition("=")
    if text == "None" and flag.startswith("-") and flag.lstrip("-").startswith("config."):
      found.append(flag.lstrip("-").removeprefix("config."))
    else:
      others.append(argument)
  return found, others


def clear(config: ConfigDict, names: Sequence[str], optional: Sequence[str]) -> None:
  """Sets fields to None.

  `optional` are the fields that may be None. Those that are None already may be, too.

  Raises:
    ValueError: a field does not exist, or cannot be None.
  """
  for name in names:
    section = _inside(config, name)
    last = name.rpartition(".")[2]
    if section is None or last not in section:
      raise ValueError(unknown(config, name))
    if name not in optional and section[last] is not None:
      raise ValueError(f"{name} cannot be None; it is {section[last]!r}, leave the flag out to keep it")
    with config.unlocked():
      section[last] = None


def _inside(config: ConfigDict, name: str) -> ConfigDict | None:
  """The section that a field's dotted name leads to; None if there is none."""
  section: Any = config
  for part in name.split(".")[:-1]:
    section = section.get(part) if isinstance(section, ConfigDict) else None
  return section if isinstance(section, ConfigDict) else None


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields the dotted name and the value of each field."""
  for name, value in config.items():
    if isinstance(value, ConfigDict) and len(value):
      yield from leaves(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def unknown(config: ConfigDict, name: str) -> str:
  """The message about a field that does not exist, with those of all sections that may be meant."""
  known = [field for field, _ in leaves(config)]
  ends: dict[str, list[str]] = {}
  for field in known:
    if not field.startswith("bare."):
      ends.setdefault(field.rpartition(".")[2], []).append(field)
  last = name.rpartition(".")[2]
  near = ends.get(last, [])
  if not near:
    near = difflib.get_close_matches(name, known, 1, 0.8)
    near += [field for end in difflib.get_close_matches(last, ends, 1, 0.75) for field in ends[end]]
  if near:
    return f"unknown field {name!r}; did you mean {' or '.join([*dict.fromkeys(near)][:3])}?"
  section, path = _inside(config, name), name.rpartition(".")[0]
  if section is None:
    section, path = config, ""
  return f"unknown field {name!r}; known: {', '.join(f'{path}.{field}'.lstrip('.') for field in section)}"
