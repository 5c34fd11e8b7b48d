"""One graded completion as a line of JSON: evaluations write these lines and compute their numbers from them."""

import dataclasses
import hashlib
import json
import logging
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from d1jax.files import FileError, decode, parse_json, read_bytes
from d1jax.run.workdir import Folder, write_atomically

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
  """One graded completion.

  Attributes:
    task: the task's name.
    length: the number of generated completion tokens; 0 if unknown.
    temperature: the sampling temperature; 0 is greedy.
    seed: the seed of the draws.
    sample: the number of this sample of its question and seed, counted from 0.
    index: the question's index in its split.
    question: a hash of the record, by which evaluations are paired.
    cluster: the cluster; items of the same cluster are not independent.
    record: the question and its right answer.
    text: the graded text.
    answer: the answer that the grader found in it, in a normal form; None without an answer.
    reward: the sum of the grade's components.
    metrics: named (numerator, denominator) pairs; a denominator of 0 leaves the item out.
    tokens: effective tokens, up to and including the first stop id; None if unknown.
    forward_passes: the network's forward passes for this completion's batch.
    seconds: this completion's share of its batch's time.
  """

  task: str
  length: int
  temperature: float
  seed: int
  sample: int
  index: int
  question: str
  cluster: str
  record: Mapping[str, Any]
  text: str
  answer: str | None
  reward: float
  metrics: Mapping[str, tuple[float, float]]
  tokens: int | None = None
  forward_passes: int | None = None
  seconds: float | None = None

  def line(self) -> str:
    """The item as one line of JSON without a line break (in ASCII, so that lone surrogates survive)."""
    return json.dumps(dataclasses.asdict(self))


def question_id(record: Mapping[str, Any]) -> str:
  """A hash of a record, which does not depend on the order of questions."""
  return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


_FORMS = {float: int | float, float | None: int | float | None}
"""The JSON types of types, where they are others."""
_KINDS: Mapping[str, Any] = {
  name: _FORMS.get(kind, dict if typing.get_origin(kind) is Mapping else kind)
  for name, kind in typing.get_type_hints(Item).items()
}
"""The JSON types of an item's fields."""


def parse(line: str) -> Item:
  """Reads a line that `Item.line` wrote.

  Raises:
    FileError: the line is not an item.
  """
  fields = parse_json(line, "an item", dict)
  required = {field.name for field in dataclasses.fields(Item) if field.default is dataclasses.MISSING}
  wrong = [name for name, value in fields.items() if name not in _KINDS or not isinstance(value, _KINDS[name])]
  if wrong or not required <= fields.keys() or not all(map(_is_pair, fields["metrics"].values())):
    raise FileError(f"no item: {line[:60]}")
  fields["metrics"] = {name: (pair[0], pair[1]) for name, pair in fields["metrics"].items()}
  return Item(**fields)


def _is_pair(value: Any) -> bool:
  return isinstance(value, list) and len(value) == 2 and all(isinstance(x, int | float) for x in value)


def _sorted_out(path: Folder) -> tuple[list[Item], list[bytes], list[bytes]]:
  """The items of a file, their lines, and the damaged lines; a last line that a kill cut off is left out."""
  found: list[Item] = []
  lines: list[bytes] = []
  damaged: list[bytes] = []
  for line in read_bytes(path).split(b"\n")[:-1]:
    try:
      found.append(parse(decode(line, path)))
      lines.append(line)
    except FileError:
      damaged += [line] if line.strip() else []
  return found, lines, damaged


def read(path: Folder) -> list[Item]:
  """The items of a file; damaged lines are left out."""
  return _sorted_out(path)[0]


def mend(path: Folder) -> None:
  """Removes damaged lines from a file, so that items can be added; they are kept in a file beside it."""
  _, lines, damaged = _sorted_out(path)
  if damaged:
    beside = path.with_name(path.name + ".damaged")
    _extend(beside, damaged)
    log.warning("%s: %d lines are no items, were moved to %s, and are completed again", path, len(damaged), beside.name)
  content = b"".join(line + b"\n" for line in lines)
  if content != read_bytes(path):
    write_atomically(path, content)


def append(path: Folder, items: Iterable[Item]) -> None:
  """Adds items to a file, which is made if it is missing."""
  path.parent.mkdir(parents=True, exist_ok=True)
  _extend(path, [item.line().encode("ascii") for item in items])


def _extend(path: Folder, lines: Sequence[bytes]) -> None:
  """Adds lines to a file; in a bucket, the whole file is written again."""
  content = b"".join(line + b"\n" for line in lines)
  if isinstance(path, Path):
    with path.open("ab") as file:
      file.write(content)
  else:
    path.write_bytes((path.read_bytes() if path.exists() else b"") + content)
