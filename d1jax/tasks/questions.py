"""Question sets in line files: which rows are for training, validation and test, and in which order."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from d1jax.tasks import common
from d1jax.tasks.base import DataError, Record

EVERYTHING = 1_000_000
"""A size beyond every file: take all rows."""

DEFAULT_SIZES = {"demonstrations": EVERYTHING, "train": EVERYTHING, "validation": 400, "test": EVERYTHING}

_VALIDATION = 20  # One question in so many.

_log = logging.getLogger(__name__)


def digest(question: str) -> bytes:
  """Hash a question; the hash alone decides its split and its place there."""
  return hashlib.sha256(question.encode()).digest()


def is_validation(question: str) -> bool:
  """Tell whether a question of the training files is for validation, as one in twenty is."""
  return int.from_bytes(digest(question)[:8], "big") % _VALIDATION == 0


def read(
  task: str,
  root: str | None,
  split: str,
  count: int,
  *,
  files: Sequence[str],
  key: str,
  parse: Callable[[str, str], Record | None],
) -> Sequence[Record]:
  """Read the first `count` records of a split, each question once.

  `test` is the last of the files, in its order. The others are the training files; `validation` is the part that
  `is_validation` names, `train` and `demonstrations` are both the rest, all in the order of their hashes, so that the
  first records are a fair sample although the files may be sorted by subject.

  Args:
    task: the name for messages.
    root: the data folder; None is a ValueError.
    split: one of `common.SPLITS`.
    count: at most so many records; fewer are no error, none are a DataError.
    files: names under `root`: the training file, further ones that may be missing, the test file.
    key: the field of a record that holds the question.
    parse: makes a record of a line (place, line), or None to leave it out.
  """
  common.check_choice("split", split, common.SPLITS)
  wanted = files[-1] if split == "test" else files[0]
  if root is None:
    raise ValueError(
      f"{task} root is None, but its questions are read from a file; "
      f"set root (config.data.root) to the folder that holds {wanted}"
    )
  if not count:
    return ()
  rest = () if split == "test" else [name for name in files[1:-1] if (Path(root) / name).is_file()]
  rows: list[Record] = []
  lines = 0
  for name in (wanted, *rest):
    for number, line in enumerate(common.read_lines(root, name, ""), start=1):
      lines += 1
      row = parse(f"{name} line {number}", line)
      rows += [] if row is None else [row]
  distinct: dict[str, Record] = {}
  for row in rows:
    distinct.setdefault(row[key], row)
  if len(distinct) < lines:
    _log.warning(
      "%s: left out %d rows without an answer and %d repeated ones",
      wanted,
      lines - len(rows),
      len(rows) - len(distinct),
    )
  if split == "test":
    records = list(distinct.values())
  else:
    kept = [question for question in distinct if is_validation(question) == (split == "validation")]
    records = [distinct[question] for question in sorted(kept, key=digest)]
  return tuple(common.take_rows(wanted, split, records, count))


def check_texts(place: str, row: Mapping[str, object], names: Sequence[str], blank: Sequence[str] = ()) -> None:
  """Raise a DataError unless the named fields are texts that can be encoded; those in `blank` may be blank."""
  for name in names:
    value = row[name]
    if not isinstance(value, str):
      raise DataError(f"{place}: {name} is {str(value)[:40]!r}, expected a text")
    if not value.strip() and name not in blank:
      raise DataError(f"{place}: {name} is blank; fill it in or take the row out")
    try:
      value.encode()
    except UnicodeEncodeError as error:
      raise DataError(f"{place}: {name} has half a surrogate pair at character {error.start}; mend the text") from None
