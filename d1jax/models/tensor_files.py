"""The safetensors of a folder: one `model.safetensors`, or shards behind `model.safetensors.index.json`."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = ("F32", "BF16", "F16")


class TensorFiles:
  """The tensors of a folder by name; values are read a slice at a time, and no file stays open.

  Attributes:
    shapes: of each tensor.
    dtypes: as the files name them, e.g. `BF16`.
  """

  def __init__(self, folder: Path, index: str = INDEX, single: str = SINGLE):
    """Reads the headers of all files.

    Raises:
      ValueError: a file is missing, truncated or no safetensors file, or index and files disagree; named.
    """
    self._files: dict[str, Path] = {}
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.dtypes: dict[str, str] = {}
    if (folder / index).exists():
      listed = _weight_map(folder / index)
      files = sorted({folder / name for name in listed.values()})
    elif (folder / single).exists():
      listed, files = None, [folder / single]
    else:
      raise ValueError(f"{folder} holds neither {single} nor {index}: point to the folder of a downloaded model")
    for path in files:
      with _opened(path) as file:
        for name in list(file.keys()):
          if name in self._files:
            raise ValueError(f"{path}: tensor {name} is in {self._files[name]}, too; fetch both again")
          self._files[name] = path
          part = file.get_slice(name)
          self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), part.get_dtype()
          if self.dtypes[name] not in FLOATS:
            raise ValueError(f"{path}: tensor {name} is {self.dtypes[name]}; only {', '.join(FLOATS)} can be read")
    for name, file_name in (listed or {}).items():
      if self._files.get(name) != folder / file_name:
        raise ValueError(f"{folder / file_name}: tensor {name} is missing, though {index} lists it there")
    for name in self._files.keys() - (listed or self._files).keys():
      raise ValueError(f"{self._files[name]}: tensor {name} is not listed in {index}")

  def file_of(self, name: str) -> Path:
    """The file that holds a tensor."""
    return self._files[name]

  def read(self, name: str, *index: slice) -> np.ndarray:
    """A slice of a tensor, as it is stored."""
    with _opened(self._files[name]) as file:
      return file.get_slice(name)[index]


def _weight_map(path: Path) -> Mapping[str, str]:
  try:
    found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} is not an index of safetensors ({error!r}); fetch it again") from None
  if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
    raise ValueError(f"{path}: weight_map does not map tensors to files; fetch it again")
  return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
  try:
    with safe_open(path, "numpy") as file:
      yield file
  except FileNotFoundError:
    raise ValueError(f"{path} is missing, though the index lists it; fetch it again") from None
  except (SafetensorError, OSError) as error:
    raise ValueError(f"{path} cannot be read ({_damage(path) or error}); fetch it again") from None


def _damage(path: Path) -> str | None:
  """Names the first tensor that a truncated file lacks."""
  try:
    with path.open("rb") as file:
      length = int.from_bytes(file.read(8), "little")
      if length > os.path.getsize(path):
        return "its header is cut"
      header = json.loads(file.read(length))
    end = os.path.getsize(path) - 8 - length
    cut = [n for n, entry in header.items() if n != "__metadata__" and entry["data_offsets"][1] > end]
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return None
  return f"tensor {cut[0]} is truncated" if cut else None
