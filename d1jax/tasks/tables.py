"""Rows of data files: JSON lines or Parquet under a root, a clone of a data set's repository, or the hub itself.

JSON lines need nothing. Everything else is read by the package `datasets`, which is imported only then; it downloads
nothing, since `hub` does.
"""

import importlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from d1jax import errors, files, hub
from d1jax.tasks import common
from d1jax.tasks.base import DataError

HUB = "hub"
"""The root that stands for the Hugging Face hub: data sets are downloaded by their names."""

PUBLISHED: Mapping[str, tuple[str, str | None, str]] = {
  "gsm8k/train.jsonl": ("openai/gsm8k", "main", "train"),
  "gsm8k/test.jsonl": ("openai/gsm8k", "main", "test"),
  "math/train.jsonl": ("ankner/math-500", None, "train"),
  "math/test.jsonl": ("HuggingFaceH4/MATH-500", None, "test"),
  "countdown/train.jsonl": ("Jiayi-Pan/Countdown-Tasks-3to4", None, "train"),
}
"""Where d1 takes a file's rows from: (repository on the hub, configuration, split)."""


def exists(root: str, name: str) -> bool:
  """Tell whether `read` would find rows for a file."""
  return _find(root, name) is not None


def read(
  root: str, name: str, otherwise: str = ", or set root to None to generate the problems"
) -> Iterator[tuple[str, Any]]:
  """Read the rows of a file, each with the place that an error names, such as `gsm8k/train.jsonl line 3`.

  Looked for in this order: the file `name`; the same with the ending `.parquet`; the folder of the repository that
  `PUBLISHED` names (a clone or a snapshot). Under the root `HUB` that repository is downloaded. All are below `root`.

  Args:
    root: a folder, or `HUB`.
    name: the file's name, with the ending `.jsonl`.
    otherwise: ends the remedy for a missing file.

  Raises:
    DataError: there is no such file, `datasets` is needed and missing, or the rows cannot be read.
  """
  source = _find(root, name)
  if source is None:
    repository = f", nor {Path(name).with_suffix('.parquet')}"
    remedy = "point root at the folder that holds it"
    if name in PUBLISHED:
      repository += f", nor the repository {PUBLISHED[name][0]}"
      remedy += f", or set root to {HUB!r} to download it"
    raise DataError(f"{name}: not found in {str(root)!r}{repository}; {remedy}{otherwise}")
  if source == Path(root) / name:
    for number, line in common.read_lines(root, name, otherwise):
      yield f"{name} line {number}", _parse(f"{name} line {number}", line)
  elif isinstance(source, Path) and source.suffix == ".parquet":
    relative = source.relative_to(root).as_posix()
    yield from load(relative, "parquet", data_files=str(source), split="train")
  else:
    repository, configuration, split = PUBLISHED[name]
    shown = f"{repository} {split}"
    try:
      folder = source if isinstance(source, Path) else hub.folder(f"{hub.PREFIX}{source}", "dataset")
    except hub.HubError as error:
      raise DataError(f"{shown}: {error}, or point root at a copy") from None
    yield from load(shown, str(folder), configuration, split=split)


def _find(root: str, name: str) -> Path | str | None:
  """Return the file or folder that has the rows, or the repository's name for the hub; None if there is nothing."""
  repository = PUBLISHED[name][0] if name in PUBLISHED else None
  if os.fspath(root) == HUB:
    return repository
  path = Path(root) / name
  places = [path, path.with_suffix(".parquet"), *([Path(root) / repository] if repository else [])]
  return next((place for place in places if place.exists()), None)


def _parse(place: str, line: str) -> Any:
  try:
    return files.parse_json(line, place)
  except files.FileError:
    raise DataError(f"{place}: {line[:40]!r} is not JSON, expected one object a line") from None


def load(shown: str, *arguments: str | None, **options: str) -> Iterator[tuple[str, Any]]:
  """Read the rows that `datasets.load_dataset` finds, each with its place, such as `openai/gsm8k train row 3`.

  `shown` is what errors call the data set.

  Raises:
    DataError: the package `datasets` is missing, or the rows cannot be read.
  """
  try:
    datasets = importlib.import_module("datasets")
  except ImportError:
    raise DataError(f"{shown}: {errors.missing('datasets', 'data')}") from None
  try:
    rows = datasets.load_dataset(*arguments, **options).to_list()
  except Exception as error:
    # Whatever the reader of somebody else's format raises, it is the data or the network.
    reason = " ".join(str(error).split())[:200]
    raise DataError(
      f"{shown}: cannot be read ({type(error).__name__}: {reason}); fetch it again, or point root at a copy"
    ) from None
  for number, row in enumerate(rows, start=1):
    yield f"{shown} row {number}", row
