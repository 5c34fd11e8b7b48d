"""One graded completion as a line of JSON: what an evaluation writes, and what its numbers are computed from."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
  """One graded completion.

  Attributes:
    task: the task's name.
    length: completion tokens that were generated; 0 where that is not known.
    temperature: of the draws, 0 is greedy.
    seed: of the draws.
    sample: which of the samples of this question under this seed, counted from 0.
    index: the question's place in its split.
    question: a hash of the record, by which evaluations are paired.
    cluster: items that share one are not independent.
    record: what was asked and what is right.
    text: the completion as it was graded.
    answer: what the grader read from it, in a normal form; None without an answer.
    reward: the sum of the grade's components.
    metrics: named (numerator, denominator) pairs; a denominator of 0 leaves the item out.
    tokens: effective tokens, up to and including the first stop id; None where that is not known.
    forward_passes: of the network for this completion's batch.
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
    """The item as one line of JSON (ASCII: lone surrogates survive), without a line break."""
    return json.dumps(dataclasses.asdict(self))


def question_id(record: Mapping[str, Any]) -> str:
  """A hash of a record: the same wherever and in whatever order it is asked."""
  return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def parse(line: str) -> Item:
  """The item of a line that `Item.line` wrote."""
  fields = json.loads(line)
  fields["metrics"] = {name: (pair[0], pair[1]) for name, pair in fields["metrics"].items()}
  return Item(**fields)


def read(path: Path) -> list[Item]:
  """The items of a file; a last line that a kill cut off is left out."""
  lines = path.read_text(encoding="ascii").split("\n")
  return [parse(line) for line in lines[:-1]]


def mend(path: Path) -> None:
  """Takes off a last line that a kill cut off, so that others can follow."""
  content = path.read_bytes()
  if not content.endswith(b"\n"):
    with path.open("r+b") as file:
      file.truncate(content.rfind(b"\n") + 1)


def append(path: Path, items: Iterable[Item]) -> None:
  """Adds items to a file, creating it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("a", encoding="ascii") as file:
    file.write("".join(item.line() + "\n" for item in items))
