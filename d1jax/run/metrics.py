"""The records of a run, which a resume and readers need, and the progress line for the user."""

import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tqdm

from d1jax.errors import input_checked
from d1jax.files import FileError, decode, parse_json, read_bytes
from d1jax.parallel import multihost
from d1jax.run.workdir import Folder, write_atomically

log = logging.getLogger(__name__)

STAGES = ("sft", "dpo", "grpo")
UPLOAD_SECONDS = 60
"""The seconds between uploads of the records to a bucket, which stores only whole files."""


@input_checked()
def read_records(path: Folder) -> list[dict[str, Any]]:
  """The records of a JSON-lines file; damaged lines are skipped, and an absent file has no records."""
  return _sorted_out(path)[0] if path.exists() else []


def warn_of_lost(path: Folder, reached: Mapping[str, int]) -> None:
  """Warns in one line if a resumed run lacks records of iterations that its checkpoints have.

  Args:
    path: the JSON-lines file; it may be absent.
    reached: the iteration of the newest checkpoint of each stage.

  Raises:
    RunError: the path is not a regular file.
  """
  found = {(record["stage"], record["iteration"]) for record in read_records(path)}
  lost = {stage: sum((stage, i + 1) not in found for i in range(last)) for stage, last in reached.items()}
  said = [f"{number} of the {reached[stage]} of {stage}" for stage, number in lost.items() if number]
  if said:
    log.warning(
      "%s lacks records that were written: %s. Training goes on; learning curves, costs, alarms and what"
      " grpo.drift_limit decided go on without them, unless you put the file back and run the same command again",
      path,
      " and ".join(said),
    )


def _sorted_out(path: Folder) -> tuple[list[dict[str, Any]], list[bytes]]:
  """The records, and the damaged lines; a last line that a kill cut off is left out of both."""
  records, damaged = [], []
  try:
    *whole, rest = read_bytes(path).split(b"\n")
  except FileError as error:
    raise FileError(f"{error}: move it away, then run the same command again") from error
  for line in (*whole, rest):
    if line.strip():
      try:
        records.append(_record(decode(line, path), path))
      except FileError:
        damaged += [] if line is rest else [line]
  return records, damaged


def _record(line: str, path: Folder) -> dict[str, Any]:
  """The record of a line; a FileError if it is not a record."""
  found = parse_json(line.strip(), path, dict)
  values = [value for name, value in found.items() if name not in ("stage", "iteration", "alarms")]
  is_whole = isinstance(found.get("iteration"), int) and found.get("stage") in STAGES
  if not is_whole or not all(isinstance(value, int | float) for value in values):
    raise FileError(f"{path} holds a line that is no record")
  return found


class MetricsWriter:
  """A `Tracker` that appends one record per iteration to `metrics.jsonl`; it writes only on process 0."""

  def __init__(self, workdir: Folder, stage: str, start: int):
    """Opens the file. Records of this stage after iteration `start` are dropped, since the run makes them again."""
    self._stage = stage
    self._writes = multihost.is_main()
    if not self._writes:
      return
    path = workdir / "metrics.jsonl"
    with input_checked():
      records, damaged = _sorted_out(path) if path.exists() else ([], [])
      if damaged:
        beside = path.with_name(path.name + ".damaged")
        write_atomically(
          beside, b"".join([read_bytes(beside) if beside.exists() else b"", *(x + b"\n" for x in damaged)])
        )
        log.warning("%s: %d lines are no records and were moved to %s", path, len(damaged), beside.name)
    kept = [r for r in records if r["stage"] != stage or r["iteration"] <= start]
    text = "".join(json.dumps(r) + "\n" for r in kept)
    write_atomically(path, text.encode())
    self._file = path.open("a", encoding="utf-8") if isinstance(path, Path) else _Object(path, text)

  def log(self, step: int, values: Mapping[str, float | list[str]]) -> None:
    """Writes the record of an iteration."""
    if self._writes:
      self._file.write(json.dumps({"stage": self._stage, "iteration": step, **values}) + "\n")
      self._file.flush()

  def keep(self) -> None:
    """Makes sure that a resumed run will find all records."""
    if self._writes and isinstance(self._file, _Object):
      self._file.close()

  def close(self) -> None:
    """Closes the file."""
    if self._writes:
      self._file.close()


def duration(seconds: float) -> str:
  """A time as a person says it: `44 s`, `12 min`, `3.4 h`."""
  if seconds < 120:
    return f"{seconds:.0f} s"
  return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Progress:
  """A progress bar on a terminal, plain lines otherwise, and a line for each validation; only on process 0."""

  def __init__(self, stage: str, total: int, start: int, *, lines: int = 20):
    """Begins at an iteration.

    `start` of the `total` iterations of the stage are done; `lines` plain lines are printed if the output is no
    terminal.
    """
    self._stage, self._total, self._later = stage, total, 0.0
    self._every = max(total // lines, 1)
    self._first: tuple[float, int] | None = None  # when the first iteration ended: those before it compile
    self._prints = multihost.is_main()
    self._bar: Any = None
    if self._prints and sys.stderr.isatty():
      self._bar = tqdm.tqdm(total=total, initial=start, desc=stage, unit="it", dynamic_ncols=True)

  def expect(self, seconds: float) -> None:
    """Says how long the run will take after this stage, for the eta of the run; until then there is none."""
    self._later = seconds

  def update(self, iteration: int, shown: Mapping[str, float | str], lines: Sequence[str] = ()) -> None:
    """Shows that an iteration is done, with a few values; `validation` and the lines stand below one another."""
    if not self._prints:
      return
    values = {name: f"{x:.3g}" if isinstance(x, float) else x for name, x in shown.items()}
    if "validation" in values:
      self._say(f"{self._stage} {iteration}/{self._total}  validation {values.pop('validation')}")
    for line in lines:
      self._say(line)
    text = "  ".join(f"{name} {value}" for name, value in values.items())
    if self._bar is not None:
      whole = f"  eta of the run {self._eta(iteration, self._later)}" if self._later else ""
      self._bar.set_postfix_str(text + whole, refresh=False)
      self._bar.update(iteration - self._bar.n)
    elif iteration % self._every == 0 or iteration == self._total:
      eta = self._eta(iteration, 0.0) + (f", of the run {self._eta(iteration, self._later)}" if self._later else "")
      print(f"{self._stage} {iteration}/{self._total}  {text}  eta {eta}", flush=True)
    if self._first is None:
      self._first = time.monotonic(), iteration

  def _eta(self, iteration: int, later: float) -> str:
    """The time until the end of the stage and of what comes later, at the average pace so far."""
    if self._first is None or iteration == self._first[1]:
      return "?"
    began, first = self._first
    each = (time.monotonic() - began) / (iteration - first)
    return duration((self._total - iteration) * each + later)

  def _say(self, line: str) -> None:
    if self._bar is None:
      print(line, flush=True)
    else:
      self._bar.write(line)

  def close(self) -> None:
    """Ends the bar."""
    if self._bar is not None:
      self._bar.close()


class _Object:
  """A growing text file in a bucket: each upload writes the whole file again."""

  def __init__(self, path: Folder, text: str):
    self._path, self._text, self._written = path, text, time.monotonic()

  def write(self, text: str) -> None:
    """Adds to the text."""
    self._text += text

  def flush(self) -> None:
    """Uploads the text if the last upload was long ago."""
    if time.monotonic() - self._written > UPLOAD_SECONDS:
      self.close()

  def close(self) -> None:
    """Uploads the text."""
    write_atomically(self._path, self._text.encode())
    self._written = time.monotonic()
