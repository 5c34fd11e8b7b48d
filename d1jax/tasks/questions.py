"""Question sets: which rows are for training, validation and test, and in which order."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from d1jax.tasks import common, held_out, tables
from d1jax.tasks.base import DataError, Record

EVERYTHING = 1_000_000
"""A size beyond every file: take all rows."""

DEFAULT_SIZES = {"demonstrations": EVERYTHING, "train": EVERYTHING, "validation": 400, "test": EVERYTHING}

_VALIDATION = 20  # One question in 20.

_log = logging.getLogger(__name__)


def digest(question: str) -> bytes:
  """Hash a question; the hash alone decides its split and its place there."""
  return hashlib.sha256(question.encode()).digest()


def is_validation(question: str) -> bool:
  """Tell whether a question of the training files is for validation; one in twenty is."""
  return int.from_bytes(digest(question)[:8], "big") % _VALIDATION == 0


def read(
  task: str,
  root: str | None,
  split: str,
  count: int,
  *,
  files: Sequence[str],
  key: str,
  parse: Callable[[str, Any], Record | None],
) -> Sequence[Record]:
  """Read the first `count` records of a split, each question once.

  `test` is the last of the files, in its order. The others are the training files; `validation` is the part that
  `is_validation` names, `train` and `demonstrations` are both the rest, all in the order of their hashes, so that the
  first records are a fair sample although the files may be sorted by subject. They hold no question of the test file,
  if there is one, and none that `held_out` lists. Questions are the same if `held_out.normalize` makes them so.

  Args:
    task: the name for messages and in the list of held-out questions.
    root: a data folder or `tables.HUB`; None is a ValueError.
    split: one of `common.SPLITS`.
    count: the largest number of records; fewer are no error, but none at all is a DataError.
    files: names that `tables.read` knows: the training file, further ones that may be missing, the test file.
    key: the field of a record that holds the question.
    parse: makes a record of a row (place, row), or None to leave it out.
  """
  common.check_choice("split", split, common.SPLITS)
  wanted = files[-1] if split == "test" else files[0]
  if root is None:
    raise ValueError(
      f"{task} root is None, but its questions are read from a file; set root (config.data.root) to the folder that "
      f"holds {wanted}, or to {tables.HUB!r} to download them"
    )
  if not count:
    return ()

  def rows_of(name: str) -> list[Record | None]:
    return [parse(place, row) for place, row in tables.read(root, name, "")]

  def question(record: Record) -> str:
    return held_out.normalize(record[key])

  rest = [] if split == "test" else [name for name in files[1:-1] if tables.exists(root, name)]
  rows = [row for name in (wanted, *rest) for row in rows_of(name)]
  usable = [row for row in rows if row is not None]
  distinct: dict[str, Record] = {}
  for row in usable:
    distinct.setdefault(question(row), row)
  test_questions: set[str] = set()
  if split != "test":
    test_questions = {text for text in distinct if held_out.fingerprint(text) in held_out.listed(task)}
    if tables.exists(root, files[-1]):
      test_questions |= {question(row) for row in rows_of(files[-1]) if row is not None}
  records = [row for text, row in distinct.items() if text not in test_questions]
  if len(records) < len(rows):
    _log.warning(
      "%s: left out %d rows without an answer, %d repeated ones and %d test questions",
      wanted,
      len(rows) - len(usable),
      len(usable) - len(distinct),
      len(distinct) - len(records),
    )
  if split != "test":
    records = [row for row in records if is_validation(row[key]) == (split == "validation")]
    records.sort(key=lambda row: digest(row[key]))
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
