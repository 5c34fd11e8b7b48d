"""The presets of `configs/` by name, `grpo:tiny,countdown`, and training from Python: `d1jax.train`.

In a clone the files are in the folder `configs` beside the package, in an installed package in `d1jax/configs`.
"""

import contextlib
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from d1jax import errors
from d1jax.run import fields


def folder() -> Path:
  """The folder of the presets' files."""
  inside = Path(__file__).with_name("configs")
  return inside if inside.is_dir() else inside.parents[1] / "configs"


def shown() -> str:
  """The folder relative to the current one, for messages: `configs/` in a clone."""
  there, here = folder().resolve(), Path.cwd()
  return f"{there.relative_to(here) if there.is_relative_to(here) else there}/"


def _loaded(name: str) -> dict[str, Any]:
  """The names that the file of a preset defines."""
  known = sorted(path.stem for path in folder().glob("*.py") if path.stem != "methods")
  if name not in known:
    raise errors.RunError(f"unknown preset {name!r}; known: {', '.join(known)}, and words behind a colon")
  return runpy.run_path(str(folder() / f"{name}.py"))


def words(name: str) -> Mapping[str, Sequence[str]]:
  """The words that a preset takes after a colon, by the kind of choice; empty if it takes none."""
  return _loaded(name).get("WORDS", {})


def check_words(name: str, chosen: str) -> None:
  """Raises a RunError if a preset gets words, but takes none."""
  if chosen and "WORDS" not in _loaded(name):
    raise errors.RunError(f"preset {name} takes no words, but has {chosen!r} behind the colon: leave it out")


def load(preset: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
  """The configuration of a preset.

  Args:
    preset: the name of a file in `configs/`, and its words after a colon: `grpo:tiny,countdown`.
    overrides: new values of fields by dotted name: `{"grpo.steps": 5}`.

  Raises:
    RunError: a preset, word or field does not exist, or a value has another type; the message names it and the known
      ones.
  """
  name, _, chosen = preset.partition(":")
  check_words(name, chosen)
  found = _loaded(name)
  with errors.input_checked():
    config: ConfigDict = found["get_config"](*([chosen] if chosen else []))
  return _changed(config, overrides or {})


def _changed(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
  """The configuration with new values; fields that do not exist cannot be added."""
  fields.complete(config)
  config.lock()
  if overrides:
    from d1jax.run import parts

    chosen = []
    with errors.input_checked():
      for field, value in overrides.items():
        flags, _ = parts.take_flags([f"--config.{field}={value}"])
        if fields.is_open(field):
          fields.choose(config, [(field, str(value))])
        elif flags and "grpo" in config:
          chosen += flags
        else:
          _set(config, field, value)
      if chosen:
        parts.choose(config.grpo, chosen)
  return config


def _set(config: ConfigDict, field: str, value: Any) -> None:
  """Sets a field or a whole section, by its dotted name."""
  section, last = config, field
  while "." in last and isinstance(section.get(last.partition(".")[0]), ConfigDict):
    name, _, last = last.partition(".")
    section = section[name]
  if last not in section:
    raise ValueError(fields.unknown(config, field))
  try:
    with config.unlocked():
      section[last] = ConfigDict(value) if isinstance(value, Mapping) else value
  except TypeError as error:
    raise ValueError(f"{field}={value!r} has another type: {errors.line_of(error)}") from error


def train(config: ConfigDict | str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """Trains like `d1jax train`: runs or resumes the job in its work directory, and prints its table.

  `d1jax.train("grpo:tiny,countdown", {"grpo.steps": 5, "workdir": "runs/mine"})`. Call it before you make the first
  array: once JAX has its devices, the CPU is not split into `cpu_devices`. With several processes, call
  `jax.distributed.initialize` first.

  Args:
    config: a configuration of `configs/grpo.py`, `configs/dpo.py` or `configs/sft.py`, which is not changed; or the
      name of a preset.
    overrides: new values of fields by dotted name.

  Returns:
    The content of `results.json` in the work directory; `after` has the numbers of the held-out split.

  Raises:
    RunError: the settings are wrong, or the run was stopped; the message says how to continue.
  """
  if isinstance(config, str):
    config = load(config, overrides)
  else:
    config = _changed(config.copy_and_resolve_references(), overrides or {})
  if config.mode not in ("grpo", "dpo", "sft"):
    raise errors.RunError(f"config.mode is {config.mode!r}; d1jax.train takes grpo, dpo and sft")
  with errors.extra("train"):
    from d1jax import recipe
  from d1jax.parallel import multihost

  with contextlib.suppress(RuntimeError):  # JAX raises it if it already has its devices
    multihost.prepare(config.cpu_devices)
  return recipe.run(config)
