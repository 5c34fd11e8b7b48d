"""Reads files that may be damaged, hostile or missing: every error is one line that names the file.

Everything that comes from outside (a model folder, data, a run of somebody else, or a run after a crash) is read
through this module. The caller then checks the content.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

LARGEST = 1 << 30
"""The largest file, in bytes, that is read whole."""
MOST_DIGITS = 40
"""Digits of the longest whole number; any such number is also a finite float."""
_CHUNK = 1 << 20

T = TypeVar("T")


class FileError(ValueError):
  """A file cannot be read, or its content is wrong; the message is one line that names the file."""


def read_bytes(path: Any, largest: int = LARGEST) -> bytes:
  """A regular file's bytes.

  Args:
    path: a `pathlib.Path`, or an `epath.Path` if the file may lie in a bucket.
    largest: the largest size in bytes.

  Raises:
    FileError: it is not a regular file (but a folder, a pipe or a device), cannot be read, or is too large.
  """
  try:
    if not path.is_file():
      kind = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "is missing"
      raise FileError(f"{path} {kind}, expected a file")
    with path.open("rb") as file:
      content = bytearray()  # a read of `largest` bytes at once would allocate them, however small the file is
      while len(content) <= largest and (chunk := file.read(_CHUNK)):
        content += chunk
  except OSError as error:
    raise FileError(f"{path} cannot be read ({error.strerror or type(error).__name__})") from error
  if len(content) > largest:
    raise FileError(f"{path} is larger than {largest:,} bytes")
  return bytes(content)


def read_text(path: Any, largest: int = LARGEST) -> str:
  """A UTF-8 file's text, without its byte-order mark; line ends stay as they are.

  Raises:
    FileError: see `read_bytes`; or the content is not UTF-8.
  """
  return decode(read_bytes(path, largest), path)


def decode(content: bytes, name: Any) -> str:
  """The text of UTF-8 bytes, without a byte-order mark.

  Raises:
    FileError: the bytes are not UTF-8; `name` is what the message calls them.
  """
  try:
    return content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise FileError(f"{name} is not UTF-8 (byte {error.start}: {error.reason})") from error


def parse_json(text: str, name: Any, expected: type[T] | None = None, *, finite: bool = False) -> T:
  """The value of a JSON text.

  Args:
    text: the text.
    name: what messages call the text, e.g. `FILE line 3`.
    expected: the Python type that the value must have (dict, list); None for any.
    finite: whether NaN and Infinity are errors; JSON does not allow them, but Python reads them.

  Raises:
    FileError: the text is not JSON, is nested too deeply, has a number of more than `MOST_DIGITS` digits, or its value
      has another type.
  """

  def whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
      raise FileError(f"{name} holds a number of {len(digits)} digits")
    return int(digits)

  def real(digits: str) -> float:
    value = float(digits)
    if finite and not math.isfinite(value):
      raise FileError(f"{name} holds the number {digits[:MOST_DIGITS]}, which is not finite")
    return value

  def constant(word: str) -> float:
    return real(word)

  try:
    value = json.loads(text, parse_int=whole, parse_float=real, parse_constant=constant)
  except FileError:
    raise
  except RecursionError:
    _refuse(name, "is nested too deep")
  except ValueError as error:
    raise FileError(f"{name} is not JSON ({error})") from error
  if expected is not None and not isinstance(value, expected):
    kinds: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}
    _refuse(name, f"is not {kinds.get(expected, expected.__name__)}: {json.dumps(value)[:60]}")
  return value


def read_json(path: Any, expected: type[T] | None = None, *, largest: int = LARGEST) -> T:
  """The value of a JSON file; for arguments and errors see `read_bytes`, `decode` and `parse_json`."""
  return parse_json(read_text(path, largest), path, expected)


def json_lines(text: str, name: Any) -> Iterator[tuple[int, str, Any]]:
  """Yields (line number, line, value) for each line of a JSON-lines text that is not blank.

  The value of a line that is not JSON is a `FileError`, which the caller may raise or count. Lines end only at a line
  feed, since JSON strings may hold all other line ends of Unicode.
  """
  for number, line in enumerate(text.split("\n"), 1):
    if line.strip():
      try:
        yield number, line, parse_json(line, f"{name} line {number}")
      except FileError as error:
        yield number, line, error


def write_check(folder: Path) -> None:
  """Raises a FileError if a folder cannot be made because it, or one of its parents, exists and is not a folder."""
  for place in (folder, *folder.parents):
    if place.is_symlink() and not place.exists():
      raise FileError(f"{place} is a link to nothing")
    if place.exists():
      if not place.is_dir():
        raise FileError(f"{place} is a file, expected a folder")
      return


def _refuse(name: Any, why: str) -> NoReturn:
  raise FileError(f"{name} {why}")
