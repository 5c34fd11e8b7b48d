"""The families of models that can be read, a file each, and what the config.json of a folder says.

A file that is put into this folder is found. Its `FAMILY` (`d1jax.models.family`) says all that is particular to the
family.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path

from d1jax.files import FileError, read_json
from d1jax.models.family import Config, Family, shown
from d1jax.models.layers import TransformerSize

FAMILIES: dict[str, Family] = {
  family.model_type: family
  for family in (importlib.import_module(f"{__name__}.{found.name}").FAMILY for found in pkgutil.iter_modules(__path__))
}
"""By model_type."""

PRESETS: dict[str, TransformerSize] = {
  name: size for family in FAMILIES.values() for name, size in family.presets.items()
}
"""Sizes of networks by name. `vocab` is the least: a run takes more where its tokenizer needs it."""

ROWS = 128
"""A vocabulary that grows becomes a multiple of this many rows."""


@dataclasses.dataclass(frozen=True)
class Description:
  """What a folder's config.json says.

  Attributes:
    family: the kind of model.
    size: of the network; `vocab` counts the rows in the files.
    config: the whole file.
  """

  family: Family
  size: TransformerSize
  config: Config

  @property
  def shift(self) -> int:
    """How many positions before a token stands the state that predicts it."""
    return self.family.shift

  @property
  def mask_id(self) -> int | None:
    """The mask token, None in a causal model that has none yet."""
    return self.config.get("mask_token_id")


def describe(folder: Path) -> Description:
  """Reads a folder's config.json.

  Raises:
    ValueError: the file is missing or broken, or holds a value that this network does not implement; the message names
      it.
  """
  path = folder / "config.json"
  try:
    config = read_json(path, dict)
  except FileError as error:
    raise ValueError(f"{error}; point to the folder of a downloaded model") from None
  if "model_type" not in config:
    raise ValueError(f"{path} is not the configuration of a model (it has no model_type)")
  model_type = config["model_type"]
  family = FAMILIES.get(model_type.lower()) if isinstance(model_type, str) else None
  if family is None:
    known = ", ".join(FAMILIES)
    raise ValueError(f"{path}: model_type {shown.repr(model_type)} is not supported; known: {known}")
  try:
    if config.get("quantization_config"):
      raise ValueError(
        f"quantization_config={shown.repr(config['quantization_config'])} is not supported: fetch the unquantised"
        " model, or take the key out of config.json if the weights are not quantised"
      )
    return Description(family, family.size(config), config)
  except KeyError as error:
    raise ValueError(f"{path}: {error} is missing") from None
  except (TypeError, ValueError) as error:
    raise ValueError(f"{path}: {error}") from None


def check_claims(folder: Path, description: Description, shapes: Mapping[str, tuple[int, ...]]) -> None:
  """Compares the sizes that config.json claims with the most that the weights' files can hold.

  For the time before anything is made of the sizes, be it a list of names: a network of 10^9 layers would take all
  memory before the first of its tensors was found to be missing. Whether each tensor has its shape is checked later.

  Args:
    folder: whose config.json it is.
    description: what it says.
    shapes: of the tensors in the files.

  Raises:
    ValueError: no tensor has an axis as long as a size, or there are fewer tensors than layers.
  """
  stored = [axis for shape in shapes.values() if 0 not in shape for axis in shape]  # an empty tensor can claim any size
  longest = max(stored, default=0)
  for name, keys in description.family.size_keys.items():
    value = getattr(description.size, name) or 0
    most = len(shapes) if name == "layers" else longest
    if value > most:
      key = next((key for key in keys if description.config.get(key) == value), keys[-1])
      held = f"there are {most} tensors" if name == "layers" else f"the longest axis of a tensor has {most}"
      raise ValueError(
        f"{folder / 'config.json'}: {key}={shown.repr(value)} is more than the safetensors hold: {held};"
        " fetch the files of one and the same model"
      )


def with_rows(size: TransformerSize, rows: int | None) -> TransformerSize:
  """The size with a vocabulary of at least `rows`; one that grows, grows to a multiple of `ROWS`."""
  if rows is None or rows <= size.vocab:
    return size
  return dataclasses.replace(size, vocab=-(-rows // ROWS) * ROWS)
