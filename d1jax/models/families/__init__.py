"""The supported model families, one file each, and the reader of a folder's config.json.

Every file in this folder is loaded. Its `FAMILY` (`d1jax.models.family`) holds everything specific to the family.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path

from d1jax.errors import reworded
from d1jax.files import read_json
from d1jax.models.family import Config, Family, count, shown
from d1jax.models.layers import TransformerSize

FAMILIES: dict[str, Family] = {
  family.model_type: family
  for family in (importlib.import_module(f"{__name__}.{found.name}").FAMILY for found in pkgutil.iter_modules(__path__))
}
"""The families by model_type."""

PRESETS: dict[str, TransformerSize] = {
  name: size for family in FAMILIES.values() for name, size in family.presets.items()
}
"""Sizes of networks by name. `vocab` is a minimum: it grows if the tokenizer needs more."""

ROWS = 128
"""A vocabulary that grows is rounded up to a multiple of this many rows."""


@dataclasses.dataclass(frozen=True)
class Description:
  """The content of a folder's config.json.

  Attributes:
    family: the family of the model.
    size: the sizes of the network; `vocab` counts the rows in the files.
    config: the whole file.
  """

  family: Family
  size: TransformerSize
  config: Config

  @property
  def shift(self) -> int:
    """How many positions before a token the hidden state stands that predicts it."""
    return self.family.shift

  @property
  def mask_id(self) -> int | None:
    """The id of the mask token; None for a causal model that has none yet."""
    return self.config.get("mask_token_id")

  @property
  def block(self) -> int | None:
    """The length of the blocks inside which attention goes both ways; None if config.json states none."""
    key = self.family.block_key
    return None if self.config.get(key) is None else count(self.config, key)


def describe(folder: Path) -> Description:
  """Reads a folder's config.json.

  Raises:
    ValueError: the file is missing or broken, or has a value that is not implemented; the message names it.
  """
  path = folder / "config.json"
  with reworded("", "; point to the folder of a downloaded model"):
    config = read_json(path, dict)
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
    found = Description(family, family.size(config), config)
    _ = found.block  # is checked
    return found
  except KeyError as error:
    raise ValueError(f"{path}: {error} is missing") from None
  except (TypeError, ValueError) as error:
    raise ValueError(f"{path}: {error}") from None


def check_claims(folder: Path, description: Description, shapes: Mapping[str, tuple[int, ...]]) -> None:
  """Compares the sizes in config.json with the largest sizes that the weight files can hold.

  It must run before the sizes are used for anything: for 10^9 layers, a list of tensor names alone would fill the
  memory before the first missing tensor was noticed. The shape of each tensor is checked later.
  `shapes` are those of the tensors in the files.

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
  """The sizes with a vocabulary of at least `rows`; if it grows, it becomes a multiple of `ROWS`."""
  if rows is None or rows <= size.vocab:
    return size
  return dataclasses.replace(size, vocab=-(-rows // ROWS) * ROWS)
