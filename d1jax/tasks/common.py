"""What the tasks share: names of splits, styles and protocols, checks of fields, answer tags, strict line files."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from d1jax import files
from d1jax.errors import reworded
from d1jax.tasks.base import DataError, Record

SPLITS: Sequence[str] = ("demonstrations", "train", "validation", "test")
"""The splits of every task; a split's place here is the number that seeds its draws."""

STYLES: Sequence[str] = ("d1", "d1_eval", "terse")
"""The prompt styles of every task: d1's training prompts, d1's evaluation prompts, a few tokens for small models."""

PROTOCOLS: Sequence[str] = ("strict", "d1")
"""The grading protocols of every task: `strict` is right, `d1` pays what d1's RL rewards pay, quirks included."""

ACCURACY: Mapping[str, str] = {"strict": "solved", "d1": "d1_accuracy"}
"""The metric that is a protocol's accuracy; `d1_accuracy`, by d1's evaluation parser, exists under `d1` alone."""

PREFILL = "<reasoning>"
"""How d1's evaluation starts every answer."""

SYSTEM_PROMPT = "\nRespond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n"
"""d1's RL instruction, which it puts at the start of the user turn."""

_Row = TypeVar("_Row")
_OPEN, _CLOSE = "<answer>", "</answer>"
_TAGS = ("<reasoning>", "</reasoning>", _OPEN, _CLOSE)


def check_choice(kind: str, value: object, known: Sequence[str]) -> None:
  """Raise a ValueError that lists the known names unless `value` is one of them."""
  if value not in known:
    raise ValueError(f"unknown {kind} {value!r}; choose one of: {', '.join(known)}")


def check_integer(name: str, value: object, low: int) -> None:
  """Raise a ValueError unless `value` is an int (not a bool) of at least `low`."""
  if not isinstance(value, int) or isinstance(value, bool) or value < low:
    raise ValueError(f"{name} is {value!r}; give an integer of at least {low}")


def check_share(name: str, value: object) -> None:
  """Raise ValueError unless the value is a number from 0 to 1."""
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
    raise ValueError(f"{name} is {value!r}; give a number from 0 to 1")


def check_range(name: str, value: Sequence[int], low: int, high: int | None) -> tuple[int, int]:
  """Return the closed range `value` as a pair, or raise a ValueError that says its limits."""
  pair = tuple(value) if isinstance(value, list | tuple) else ()
  limit = "" if high is None else f" <= {high}"
  is_valid = (
    len(pair) == 2
    and all(isinstance(end, int) and not isinstance(end, bool) for end in pair)
    and low <= pair[0] <= pair[1]
    and (high is None or pair[1] <= high)
  )
  if not is_valid:
    raise ValueError(f"{name} is {value!r}; give two integers (first, last) with {low} <= first <= last{limit}")
  return pair[0], pair[1]


def check_sizes(task: str, sizes: Mapping[str, int], defaults: Mapping[str, int]) -> dict[str, int]:
  """Complete `sizes` by the defaults; unknown splits and negative sizes are ValueErrors."""
  for split, count in sizes.items():
    check_choice(f"split in {task} sizes", split, SPLITS)
    check_integer(f"{task} sizes[{split!r}]", count, 0)
  return {**defaults, **sizes}


def check_root(task: str, root: object, otherwise: str = ", or None to generate") -> None:
  """Raise a ValueError unless `root` is None or a path; `otherwise` ends the remedy."""
  if root is not None and not isinstance(root, str | os.PathLike):
    raise ValueError(f"{task} root is {root!r}; give the data folder's path{otherwise}")


def tagged(reasoning: str, answer: str, style: str = "d1") -> str:
  """Write a completion in the format that d1's prompts ask for; in the style `d1_eval`, what follows the prefill."""
  text = f"{PREFILL}\n{reasoning}\n</reasoning>\n{_OPEN}\n{answer}\n{_CLOSE}"
  return text.removeprefix(PREFILL) if style == "d1_eval" else text


def final_answer(text: str) -> str:
  """Return the inside of the last `<answer>...</answer>` block, or the whole text without one.

  Of nested opening tags the innermost counts; a block that is never closed does not count. Linear time.
  """
  last_close = text.rfind(_CLOSE)
  start = text.rfind(_OPEN, 0, max(last_close, 0))
  if start < 0:
    return text
  start += len(_OPEN)
  return text[start : text.index(_CLOSE, start)]


def last_block(text: str) -> str | None:
  """Return the inside of the last `<answer>...</answer>` block, or None without one.

  Blocks are found from left to right, as by a lazy regular expression: of nested opening tags the
  outermost counts, unlike in `final_answer`. Linear time.
  """
  inside, start = None, text.find(_OPEN)
  while start >= 0:
    start += len(_OPEN)
    end = text.find(_CLOSE, start)
    if end < 0:
      break
    inside = text[start:end]
    start = text.find(_OPEN, end)
  return inside


def format_score(text: str) -> float:
  """Score the format that d1's prompts ask for, from 0.0 to 1.0, whatever the lengths and line breaks.

  An eighth for each of the four tags that occurs exactly once; a half when the text, blanks at its ends aside, is one
  reasoning block and then one answer block.
  """
  text = text.strip()
  once = [text.count(tag) == 1 for tag in _TAGS]
  score = 0.125 * sum(once)
  if all(once) and text.startswith(_TAGS[0]) and text.endswith(_CLOSE):
    end, start = text.index(_TAGS[1]) + len(_TAGS[1]), text.index(_OPEN)
    if end <= start and not text[end:start].strip():
      score += 0.5
  return score


def read_lines(
  root: str, name: str, otherwise: str = ", or set root to None to generate the problems"
) -> list[tuple[int, str]]:
  """Read the lines of `root/name` that are not blank, with their numbers; none is a DataError.

  A byte-order mark and carriage returns at the ends of lines are no part of them. `otherwise` ends the remedy for a
  missing file.
  """
  path = Path(root) / name
  if not path.exists():
    raise DataError(f"{name}: not found in {str(root)!r}; point root at the folder that holds it{otherwise}")
  with reworded("", "; save it as UTF-8 text, or fetch it again", DataError):
    text = files.read_text(path)
  lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
  if not lines:
    raise DataError(f"{name}: the file is empty; fetch it again")
  return lines


def check_fields(place: str, row: object, fields: Mapping[str, str]) -> dict[str, Any]:
  """Return a row that is an object with at least the given fields, or raise a DataError.

  Args:
    place: the file and line that the error names.
    row: what was read there.
    fields: required names, each with what a row shows there, such as `{"nums": "[...]"}`.
  """
  if not isinstance(row, dict) or not fields.keys() <= row.keys():
    expected = ", ".join(f'"{name}": {value}' for name, value in fields.items())
    raise DataError(f"{place}: expected {{{expected}}}, got {str(row)[:60]!r}")
  return row


def split_hash(records: Sequence[Record]) -> str:
  """Hash the content of a split: the sha256, in hex, of its records as canonical JSON, one per line.

  The order of the records matters, the order of a record's fields does not.
  """
  digest = hashlib.sha256()
  for record in records:
    digest.update(json.dumps(dict(record), sort_keys=True, separators=(",", ":")).encode() + b"\n")
  return digest.hexdigest()


def take_rows(name: str, split: str, rows: Sequence[_Row], count: int) -> Sequence[_Row]:
  """Take the first `count` rows of a file's split; a DataError if there are none at all."""
  if count and not rows:
    raise DataError(f"{name}: no usable row belongs to the split {split!r}; add rows, or set sizes[{split!r}] to 0")
  return rows[:count]
