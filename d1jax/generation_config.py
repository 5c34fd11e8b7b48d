"""How a model's folder says that its completions are sampled: keys of generation_config.json, written and read here."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d1jax.diffusion.rollout import SamplerSpec
from d1jax.files import FileError, read_json

FILE = "generation_config.json"

LENGTHS = {"max_new_tokens": "completion_length", "block_length": "block_length", "steps": "diffusion_steps"}
"""The keys without which a file says nothing about sampling, by the field of the sampler; LLaDA's and Dream's names."""

OTHERS = ("remasking", "cfg_scale", "schedule", "threshold", "factor", "max_reveal")
"""Fields of the sampler that are keys of the same name, where they differ from the default."""

LONGEST = 1 << 16
"""The largest number of tokens or steps."""


def keys_of(sampler: SamplerSpec) -> dict[str, Any]:
  """The keys that say how a sampler completes, apart from its temperature and its cache."""
  plain = SamplerSpec(1, 1, 1)
  others = {name: getattr(sampler, name) for name in OTHERS if getattr(sampler, name) != getattr(plain, name)}
  return {key: getattr(sampler, field) for key, field in LENGTHS.items()} | others


def read_sampler(folder: Path) -> SamplerSpec | None:
  """The sampler that a folder's generation_config.json describes: greedy, with early exit and without a cache.

  Returns:
    The sampler; None if there is no such file, or if it lacks one of the keys `LENGTHS`, as files of others do.

  Raises:
    FileError: the file is broken, or the values do not go together.
  """
  path = folder / FILE
  if not path.is_symlink() and not path.exists():
    return None
  found: Mapping[str, Any] = read_json(path, dict)
  if not LENGTHS.keys() <= found.keys():
    return None
  values: dict[str, Any] = {}
  for key in LENGTHS:
    if type(found[key]) is not int or not 1 <= found[key] <= LONGEST:
      raise FileError(f"{path}: {key} is {found[key]!r}, expected a whole number from 1 to {LONGEST}")
    values[LENGTHS[key]] = found[key]
  try:
    plain = SamplerSpec(**values, temperature=0.0, early_exit=True)
    for name in set(OTHERS) & found.keys():
      kind = type(getattr(plain, name))
      if type(found[name]) is not kind and not (kind is float and type(found[name]) is int):
        raise ValueError(f"{name} is {found[name]!r}, expected the type {kind.__name__}")
      if kind is float and not math.isfinite(found[name]):
        raise ValueError(f"{name} is {found[name]!r}, expected a finite number")
      values[name] = kind(found[name])
    return SamplerSpec(**values, temperature=0.0, early_exit=True)
  except ValueError as error:
    raise FileError(f"{path}: {error}; correct it, or remove {', '.join(LENGTHS)} from the file") from None
