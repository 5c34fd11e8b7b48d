"""The safetensors of a folder: one `model.safetensors`, or shards that `model.safetensors.index.json` lists."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from d1jax.errors import reworded
from d1jax.files import FileError, decode, parse_json, read_json
from d1jax.models import names

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS: Mapping[str, tuple[type, int, int]] = {
  "F32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
  "BF16": (np.uint16, 0x7FFF, 0x7F80),
  "F16": (np.uint16, 0x7FFF, 0x7C00),
}
"""The supported dtypes: the type of their bits, the mask without the sign, and infinity's bits (NaNs exceed it)."""
LONGEST_HEADER = 100_000_000
"""The largest header, in bytes, that the library safetensors reads."""


class TensorFiles:
  """The tensors of a folder by name; values are read one slice at a time, and no file stays open.

  Buffers (`names.is_buffer`) are left out: files of old models hold some, and no network needs them.

  Attributes:
    shapes: the shape of each tensor.
    dtypes: the dtype of each tensor by its name in the files, e.g. `BF16`.
  """

  def __init__(self, folder: Path, index: str = INDEX, single: str = SINGLE):
    """Reads the headers of all files.

    Raises:
      ValueError: a file is missing, truncated or not a safetensors file, index and files disagree, or the index names a
        file outside of the folder; the message names it.
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
          if names.is_buffer(name):
            continue
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
    """A slice of a tensor in its stored dtype and layout.

    Raises:
      ValueError: the file has been damaged since, or the slice holds a NaN or an infinity.
    """
    path = self._files[name]
    with _opened(path) as file:
      part = file.get_slice(name)[index]
    kind, magnitude, infinity = FLOATS[self.dtypes[name]]
    if part.size and np.bitwise_and(part.view(kind), kind(magnitude)).max() >= infinity:
      raise ValueError(f"{path}: tensor {name} holds NaN or infinity, and no text could come of it; fetch it again")
    return part


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes a file that PyTorch can read, with the usual permissions of a new file; the library would make it readable
  only by its owner, whatever the umask.
  """
  path.touch()
  mode = path.stat().st_mode
  save_file(dict(tensors), path, metadata={"format": "pt"})
  path.chmod(mode)


def _weight_map(path: Path) -> Mapping[str, str]:
  with reworded("", "; fetch it again"):
    found = read_json(path, dict).get("weight_map")
  if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
    raise ValueError(f"{path}: weight_map does not map tensors to files; fetch it again")
  for tensor, name in found.items():
    if name.startswith("/") or ".." in PurePosixPath(name).parts or "\0" in name:
      raise ValueError(f"{path}: {name!r}, the file of tensor {tensor}, is outside of the folder; fetch it again")
    try:
      os.fsencode(name)
    except UnicodeEncodeError:
      raise ValueError(
        f"{path}: {name!r}, the file of tensor {tensor}, cannot be a file's name; fetch it again"
      ) from None
  return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
  """Opens a regular file. Others are errors: a pipe would block, and a device might never end."""
  try:
    if path.exists() and not path.is_file():
      raise ValueError(f"{path} cannot be read (it is no regular file); fetch it again")
    with safe_open(path, "numpy") as file:
      yield file
  except FileNotFoundError:
    raise ValueError(f"{path} is missing, though the index lists it; fetch it again") from None
  except (SafetensorError, OSError) as error:
    raise ValueError(f"{path} cannot be read ({_damage(path) or error}); fetch it again") from None


def _damage(path: Path) -> str | None:
  """Names the first tensor that a truncated file lacks."""
  try:
    size = path.stat().st_size
    with path.open("rb") as file:
      length = int.from_bytes(file.read(8), "little")
      if length > size - 8:
        return f"its header is cut: {length:,} bytes in a file of {size:,}"
      header = parse_json(decode(file.read(min(length, LONGEST_HEADER)), "its header"), "its header", dict)
    ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
    cut = [name for name, end in ends.items() if end > size - 8 - length]
  except FileError as error:
    return str(error)
  except (OSError, LookupError, TypeError, AttributeError):
    return None
  return f"tensor {cut[0]} is truncated" if cut else None
