"""The description of a model family, and the readers of config.json that families share.

A family is one file of `d1jax/models/families`; its `FAMILY` holds everything specific to it.
"""

import dataclasses
import math
import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from d1jax.models.layers import TransformerSize
from d1jax.models.names import Scheme

Config = Mapping[str, Any]

shown = reprlib.Repr()
shown.maxstring = shown.maxother = 80
"""Formats a value of a file for a message; long or deep values are shortened."""


@dataclasses.dataclass(frozen=True)
class Family:
  """A kind of model, and the format of its folders.

  Attributes:
    model_type: its name in config.json, in lower case.
    shift: how many positions before a token the hidden state stands that predicts it: 0 (LLaDA) or 1.
    read: reads the sizes from a config.json whose `defaults` are filled in and whose `fixed` options are checked.
    size_keys: the keys of config.json for each field of `TransformerSize`; the first key with a value counts.
    tied_key: the key that tells whether the head is the embedding.
    schemes: the tensor names that its files may have; a folder's scheme is the one that contains its embedding.
    defaults: the values of keys that config.json lacks, from the model's configuration class.
    fixed: options with the only value that the network implements; config.json may leave them out.
    presets: sizes of well-known models by their names in `config.model.size`.
    block_key: the key for the length of the blocks inside which attention goes both ways. A folder that has it is
      block-causal; it is written for every block-causal export.
    block_causal: whether all models of the family are block-causal, so that a block length must be known.
    masked: whether all models of the family were trained with a mask token, so that its id must be known; otherwise a
      folder that names no mask gets a new one.
  """

  model_type: str
  shift: int
  read: Callable[[Config], TransformerSize]
  size_keys: Mapping[str, tuple[str, ...]]
  tied_key: str
  schemes: tuple[Scheme, ...]
  defaults: Config
  fixed: Config
  presets: Mapping[str, TransformerSize] = dataclasses.field(default_factory=dict)
  block_key: str = "block_size"
  block_causal: bool = False
  masked: bool = False

  def size(self, config: Config) -> TransformerSize:
    """The sizes in a config.json.

    Raises:
      KeyError: a key is missing.
      ValueError: a value is wrong, or is not implemented; the message names it.
    """
    config = {**self.defaults, **config}
    for name, expected in self.fixed.items():
      value = config.get(name, expected)
      if value != expected and not (value is None and not expected):
        raise ValueError(f"{name}={shown.repr(value)} is not supported, only {expected!r}")
    return self.read(config)

  def scheme_of(self, tensors: Collection[str]) -> Scheme:
    """The scheme of these tensor names; the first scheme if they fit none."""
    return next((scheme for scheme in self.schemes if scheme[("embedding",)] in tensors), self.schemes[0])


def sizes(config: Config, size_keys: Mapping[str, tuple[str, ...]], **others: Any) -> TransformerSize:
  """The sizes under `size_keys`, and `others`, which are known already."""
  stated = lambda keys: next((key for key in keys if config.get(key) is not None), keys[-1])
  counts = {name: count(config, stated(keys)) for name, keys in size_keys.items() if name not in others}
  return TransformerSize(**{**counts, **others})


def positive(config: Config, name: str) -> float:
  """A number above zero."""
  value = config[name]
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if not is_number or not math.isfinite(value) or value <= 0:
    raise ValueError(f"{name}={shown.repr(value)} is not a positive number")
  return float(value)


def count(config: Config, name: str) -> int:
  """A whole number above zero."""
  if not isinstance(config[name], int) or positive(config, name) < 1:
    raise ValueError(f"{name}={shown.repr(config[name])} is not a positive whole number")
  return int(config[name])


def flag(config: Config, name: str) -> bool:
  """A boolean; null means false."""
  value = config[name] or False
  if not isinstance(value, bool):
    raise ValueError(f"{name}={shown.repr(value)} is neither true nor false")
  return value
