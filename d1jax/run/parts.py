"""Estimator, loss and advantage in a configuration: `config.grpo.loss = {"name": "clipped_token", "epsilon": 0.5}`.

Each part of a method is a section with a name and options. The name is one of a table in `d1jax.rl`, or a user's own
Python file, `mine.py`, which defines `loss` (or `estimator`, or `advantage`). Such a file runs with the rights of the
run, and only where the method is built for training: readers of a run do not build a method.
"""

import ast
import contextlib
import functools
import inspect
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from d1jax.errors import input_checked
from d1jax.rl.advantage import ADVANTAGES
from d1jax.rl.estimators import ESTIMATORS, Estimator
from d1jax.rl.losses import LOSSES, Loss
from d1jax.tasks.custom_process import described, load, place

TABLES: Mapping[str, Mapping[str, Any]] = {"estimator": ESTIMATORS, "loss": LOSSES, "advantage": ADVANTAGES}
MOVED: Mapping[str, str] = {
  **dict.fromkeys(("samples", "nodes", "segments", "masking", "antithetic", "exponent", "top_entropy"), "estimator"),
  **dict.fromkeys(("epsilon", "epsilon_high", "upper_share", "beta", "kl", "kl_against"), "loss"),
}
"""Options that were fields of `config.grpo` before, and the part to which they belong now."""
OF_THE_RUN = ("p_mask_prompt", "tile")
"""Options that all estimators share; they are fields of `config.grpo`."""
TYPES = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a text"}
KINDS = {"estimator": "a function or an Estimator", "loss": "a subclass of Loss", "advantage": "a function"}
_FLAG = re.compile(rf"--?config\.grpo\.({'|'.join((*TABLES, *MOVED))})((?:\.\w+)?)(?:=(.*))?", re.DOTALL)


@contextlib.contextmanager
def naming(kind: str, name: str) -> Iterator[None]:
  """Adds the name of the part to an error, and for a user's file the line."""
  try:
    yield
  except Exception as error:
    is_file = name.endswith(".py")
    if not is_file and not isinstance(error, ValueError):
      raise
    text = str(error) if isinstance(error, ValueError) else described(error)
    raise ValueError(f"grpo.{kind}={place(name, error) if is_file else name}: {text}") from error


def _find(kind: str, name: str) -> Any:
  """The class or function that makes the part from its options."""
  if not name.endswith(".py"):
    if name not in TABLES[kind]:
      raise ValueError(
        f"unknown grpo.{kind} {name!r}; choose one of: {', '.join(TABLES[kind])}; or name a Python file that defines"
        f" {kind}, such as mine.py"
      )
    return TABLES[kind][name]
  found = getattr(load(name, kind), kind, None)
  if not callable(found) or (kind == "loss" and not (isinstance(found, type) and issubclass(found, Loss))):
    raise ValueError(f"{name}: `{kind}` is {found!r}, but the file must define it as {KINDS[kind]}")
  return Estimator(found) if kind == "estimator" and not isinstance(found, Estimator) else found


def _parameters(kind: str, part: Any) -> dict[str, inspect.Parameter]:
  """The options of a part."""
  parameters = inspect.signature(part.function if kind == "estimator" else part).parameters
  return {
    name: each
    for name, each in parameters.items()
    if (kind == "loss" or each.kind is each.KEYWORD_ONLY) and name not in OF_THE_RUN
  }


def _check_type(field: str, value: Any, annotation: Any) -> None:
  allowed = typing.get_args(annotation) or (annotation,)
  simple = [each for each in allowed if each in TYPES]
  is_right = (
    type(value) in simple or (float in simple and type(value) is int) or (value is None and type(None) in allowed)
  )
  if simple and (not is_right or (isinstance(value, float) and not math.isfinite(value))):
    expected = " or ".join([TYPES[each] for each in simple] + ["None"] * (type(None) in allowed))
    raise ValueError(f"{field}={value!r} must be {expected}")


def _full(kind: str, part: Any, section: Mapping[str, Any]) -> dict[str, Any]:
  """The section, completed with the defaults of its part."""
  known, name = _parameters(kind, part), section["name"]
  for option in section.keys() - known.keys() - {"name"}:
    having = ", ".join(known) or "none"
    raise ValueError(
      f"grpo.{kind}.{option}={section[option]} is no option of grpo.{kind}={name}, which has {having}: leave it out"
    )
  found = {"name": name}
  for option, parameter in known.items():
    if option not in section and parameter.default is parameter.empty:
      raise ValueError(f"grpo.{kind}={name} needs the option {option}: give --config.grpo.{kind}.{option}=VALUE")
    found[option] = section.get(option, parameter.default)
    _check_type(f"grpo.{kind}.{option}", found[option], parameter.annotation)
  return found


def build(kind: str, section: ConfigDict, **of_the_run: Any) -> Any:
  """The part that a section names: an `Estimator`, a `Loss`, or an `Advantage`.

  Args:
    kind: a key of `TABLES`.
    section: a section of `config.grpo`.
    of_the_run: the values of `OF_THE_RUN`; None stands for the estimator's default.

  Raises:
    ValueError: the part does not exist, lacks an option or does not accept one; the message names it and the remedy.
  """
  name = section.name
  part = _find(kind, name)
  options = _full(kind, part, section.to_dict())
  del options["name"]
  with naming(kind, name):
    if kind == "estimator":
      shared = {option: x for option, x in of_the_run.items() if x is not None and option in part.options}
      return part.bind(**options, **shared)
    if kind == "advantage":
      return functools.partial(part, **options) if options else part
    return part(**options)


@input_checked()
def complete(config: ConfigDict) -> None:
  """Writes all options of the parts into `config.grpo`, if there is one, so that a run records them.

  Raises:
    RunError: a part does not exist, lacks an option or does not accept one.
  """
  for kind in TABLES if "grpo" in config else ():
    section = config.grpo[kind]
    if not isinstance(section, ConfigDict):
      raise ValueError(
        f"config.grpo.{kind}={section!r} is a section now: let it be dict(name={section!r}), and its options"
      )
    with config.unlocked():
      config.grpo[kind] = ConfigDict(_full(kind, _find(kind, section.name), section.to_dict()))


def take_flags(arguments: Sequence[str]) -> tuple[list[tuple[str, str, str]], list[str]]:
  """Splits a command line: (kind, option, text) of arguments that set parts, and all others.

  The option is empty if the argument names the part. Old names of options still work: `--config.grpo.epsilon=0.2`.
  """
  found, others, rest = [], [], iter(arguments)
  for argument in rest:
    match = _FLAG.fullmatch(argument)
    if match is None or (match[1] in MOVED and match[2]):
      others.append(argument)
      continue
    text = next(rest, "") if match[3] is None else match[3]
    option = match[1] if match[1] in MOVED else match[2].removeprefix(".")
    found.append((MOVED.get(match[1], match[1]), "" if option in ("name", "module") else option, text))
  return found, others


def choose(section: ConfigDict, flags: Sequence[tuple[str, str, str]]) -> None:
  """Sets parts of `config.grpo`, and their options.

  If the new part is one of a table, it keeps the options that both parts have; a part of a file has its own defaults.
  `section` is `config.grpo`, and `flags` the result of `take_flags`.

  Raises:
    ValueError: a part does not exist.
  """
  with section.unlocked():
    for kind, option, name in flags:
      if not option and name != section[kind].name:
        kept = () if name.endswith(".py") else _parameters(kind, _find(kind, name))
        options = {option: value for option, value in section[kind].items() if option in kept}
        section[kind] = ConfigDict({"name": name} | options)
    for kind, option, text in flags:
      if option:
        try:
          value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
          value = text
        with section.ignore_type():
          section[kind][option] = value


def renewed(config: dict[str, Any]) -> dict[str, Any]:
  """Converts the configuration of a run to the form of this release; no user's file is run.

  In runs of 0.1, parts are names, and their options are fields of `config.grpo`. Options that a part did not have when
  the run began get their defaults.
  """
  if not isinstance(config.get("grpo"), dict) or not TABLES.keys() <= config["grpo"].keys():
    return config
  grpo = {field: value for field, value in config["grpo"].items() if field not in MOVED}
  for kind, table in TABLES.items():
    told = grpo[kind]
    if isinstance(told, str):
      was = {option: config["grpo"].get(option) for option, of in MOVED.items() if of == kind}
      told = {"name": told} | {option: value for option, value in was.items() if value is not None}
    known = _parameters(kind, table[told["name"]]) if told["name"] in table else {}
    grpo[kind] = {option: x.default for option, x in known.items() if x.default is not x.empty} | told
  if isinstance(grpo.get("reward_weights"), str):
    weights = [part.partition("=") for part in grpo["reward_weights"].split(",") if part]
    grpo["reward_weights"] = {name.strip(): float(weight) for name, _, weight in weights}
  return config | {"grpo": grpo}
