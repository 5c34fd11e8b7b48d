"""Grades completions in files, without a model: `--config.generations=PATH`.

Three layouts are read, also gzipped: d1's JSON (`{"generations": [{"question", "generations", "ground_truth"}, ...],
"gen_length", ...}`; a folder with one such file per process counts as one file), the same rows as JSON lines, and the
JSON lines of evaluations, `{"record": {...}, "text": "..."}` (optionally with `seed`, `sample`, `length`,
`temperature`).
"""

import collections
import contextlib
import dataclasses
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from d1jax import tasks
from d1jax.errors import reworded
from d1jax.evaluation import output
from d1jax.evaluation.evaluator import grade_text
from d1jax.evaluation.items import Item, append, question_id
from d1jax.files import LARGEST, FileError, decode, parse_json
from d1jax.run.workdir import folder as folder_of
from d1jax.tasks import DataError, Record, Task, TaskError, d1_evaluation
from d1jax.tasks.common import PREFILL

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
STOPS = ("<|endoftext|>", "<|eot_id|>", "<|im_end|>", "</s>")
"""The stop tokens of LLaDA, Dream and Llama as text; `strict` does not read beyond the first one."""

STYLE = "d1_eval"
"""The prompt style of d1's files, and of the constant answer that is compared with them."""

LONGEST_LINE = 64 << 20
"""The largest size in bytes of a line, and of a whole file in d1's layout."""

MOST_LINES = 10_000_000

MOST = 2**53
"""The largest length, seed and sample number; other programs may not read larger numbers of JSON exactly."""

_BLOCK = 1 << 20
_FIRST_STOP = re.compile("|".join(map(re.escape, STOPS)))
_SPECIAL = re.compile(r"<\|[a-z_]+\|>")


@dataclasses.dataclass(frozen=True)
class Generation:
  """One completion of a file.

  Attributes:
    setup: the model and its settings, which must be equal for completions that are counted together.
    record: the question.
    raw: the text in the file, including special tokens.
    shown: the prefill, and the text up to the first stop without special tokens.
    length: completion tokens; 0 if unknown.
    temperature: the sampling temperature.
    seed: the seed of the draws.
    sample: the number of this sample of its question.
    place: file and line, for messages.
  """

  setup: str
  record: Record
  raw: str
  shown: str
  length: int = 0
  temperature: float = 0.0
  seed: int = 0
  sample: int = 0
  place: str = ""


def run(config: ConfigDict) -> dict[str, Any]:
  """Grades the completions of `config.generations`; prints a table, then one JSON line.

  Raises:
    ValueError: the path has no completions, or they belong to different tasks; the message names file and line.
  """
  names = [*config.tasks, *([config.module] if config.module else [])]
  if len(names) != 1:
    raise ValueError(
      f"{len(names)} tasks are named, but completions in files are graded by one:"
      " say --config=configs/eval.py:tiny,gsm8k"
    )
  task = tasks.build(names[0], module=config.module)
  path = Path(config.generations)
  found = [g for g in read(path, task.name) if not config.lengths or g.length in config.lengths]
  if not found:
    raise DataError(f"{path}: no completion of length {', '.join(map(str, config.lengths))}")
  arms: dict[str, list[Generation]] = {}
  for generation in found:
    length = f"_{generation.length}" if generation.length else ""
    arms.setdefault(f"{task.name}{length}_t{generation.temperature:g}", []).append(generation)
  arms = {name: arm[: config.questions] for name, arm in arms.items()}
  digest = hashlib.sha256(json.dumps([[g.record, g.raw] for g in found]).encode()).hexdigest()
  identity = {
    "subject": str(path),
    "completions_sha256": digest,
    "questions": {
      name: {"n": len(arm), "records_sha256": tasks.split_hash([g.record for g in arm])} for name, arm in arms.items()
    },
    "config": {"tasks": [task.name], "protocol": config.protocol, "lengths": list(config.lengths)},
  }
  folder = output.claim(folder_of(config.output) if config.output else None, Path("runs") / "eval", identity)
  rows = []
  for name, arm in arms.items():
    setups = sorted({g.setup for g in arm})
    if len(setups) > 1:
      raise DataError(f"{path}: completions of several models are mixed ({'; '.join(setups)}); name one file")
    output.items_path(folder, name).unlink(missing_ok=True)
    append(output.items_path(folder, name), _items(task, arm, config.protocol))
    records = [g.record for g in arm]
    first = arm[0]
    rows.append(
      output.Row(name, task, records, STYLE, None, first.length, first.temperature, output.read_items(folder, name))
    )
  return output.finish(config, folder, identity, rows)


def read(path: Path, task: str) -> list[Generation]:
  """The completions of a file, or of all files of a folder in the order of their names."""
  if not path.exists():
    raise DataError(f"{path}: not found; name a file of completions, or a folder of them")
  files = [path]
  if path.is_dir():
    files = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES))
  found = [generation for file in files for generation in _read_file(file, task)]
  if not found:
    raise DataError(f"{path}: holds no completions; expected files that end in {', '.join(SUFFIXES)}")
  return found


def cut(text: str) -> str:
  """The text before the first stop token, without special tokens."""
  stop = _FIRST_STOP.search(text)
  return _SPECIAL.sub("", text[: stop.start()] if stop else text)


def _read_file(path: Path, task: str) -> Iterator[Generation]:
  lines = _lines(path)
  first = next(lines, None)
  if first is None:
    return
  number, line = first
  try:
    row: Any = parse_json(line, f"{path} line {number}", finite=True)
  except FileError as error:
    row = _whole(path, line, lines, error)
  if isinstance(row, dict) and isinstance(row.get("generations"), list):
    for number, _ in lines:
      raise DataError(f"{path} line {number}: there is something behind d1's list of generations; cut it off")
    setup = {name: value for name, value in row.items() if name not in ("generations", "metrics")}
    length = row.get("gen_length", 0)
    if not _is_count(length):
      raise DataError(f"{path}: gen_length is {length!r:.40}, expected the number of tokens of a completion")
    for index, one in enumerate(row["generations"]):
      yield _generation(f"{path} generation {index}", one, task, json.dumps(setup, sort_keys=True), length)
    return
  yield _generation(f"{path} line {number}", row, task, "", 0)
  for number, line in lines:
    place = f"{path} line {number}"
    yield _generation(place, parse_json(line, place, finite=True), task, "", 0)


def _whole(path: Path, line: str, lines: Iterator[tuple[int, str]], error: FileError) -> Any:
  """The value of a file that is one JSON text over several lines, so that its first line alone is not JSON."""
  parts, size = [line], 0
  for _, part in lines:
    parts.append(part)
    size += len(part)
    if size > LONGEST_LINE:
      raise error
  try:
    return parse_json("\n".join(parts), path, finite=True)
  except FileError as other:
    raise (error if ".jsonl" in path.suffixes else other) from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
  """Yields (number, line) for each line of a file that is not blank; a gzipped file is unpacked on the way.

  Raises:
    DataError: the file does not exist, cannot be unpacked, or is too large.
  """
  if not path.is_file():
    raise DataError(f"{path}: is no regular file; name a file of completions, or a folder of them")
  number, size = 0, 0
  parts: list[bytes] = []  # pieces of a line that is not complete yet
  with contextlib.ExitStack() as stack:
    try:
      file: Any = stack.enter_context(path.open("rb"))
      if path.suffix == ".gz":
        file = stack.enter_context(gzip.GzipFile(fileobj=file))
    except OSError as error:
      raise DataError(f"{path}: cannot be read ({error}); fetch or write it again") from None
    while True:
      try:
        block = file.read(_BLOCK)
      except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); fetch or write it again") from None
      parts.append(block)
      whole: list[bytes] = []
      if b"\n" in block or not block:
        *whole, rest = (b"".join(parts) + (b"" if block else b"\n")).split(b"\n")
        parts = [rest]
      for line in whole:
        number += 1
        if line.strip():
          yield number, decode(line, f"{path} line {number}")
      size += len(block)
      if size > LARGEST or sum(map(len, parts)) > LONGEST_LINE or number > MOST_LINES:
        raise DataError(
          f"{path}: holds more than {LARGEST >> 20} MiB, a line of more than {LONGEST_LINE >> 20} MiB, or more than"
          f" {MOST_LINES:,} lines; split it"
        )
      if not block:
        return


def _is_count(value: object) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def _generation(place: str, row: Any, task: str, setup: str, length: int) -> Generation:
  """Checks one row, and reads it in the layout that its fields show."""
  if isinstance(row, dict) and isinstance(row.get("generations"), str):
    with reworded(f"{place}: ", kind=DataError):
      record = d1_evaluation.record(task, row)
    raw = row["generations"]
    return Generation(setup, record, raw, PREFILL + cut(raw), length, place=place)
  if not isinstance(row, dict) or not isinstance(row.get("record"), dict) or not isinstance(row.get("text"), str):
    raise DataError(
      f"{place}: expected the fields question, generations and ground_truth (d1's), or record and text; got"
      f" {json.dumps(row)[:60]}"
    )
  if row.get("task", task) != task:
    raise DataError(f"{place}: is a completion of the task {row['task']!r}, expected {task!r}")
  for name in ("length", "seed", "sample"):
    if not _is_count(row.get(name, 0)):
      raise DataError(f"{place}: {name} is {row[name]!r:.40}, expected a number from 0 to {MOST}")
  temperature = row.get("temperature", 0.0)
  if isinstance(temperature, bool) or not isinstance(temperature, int | float) or temperature < 0:
    raise DataError(f"{place}: temperature is {temperature!r:.40}, expected a number of at least 0")
  return Generation(
    setup=setup,
    record=row["record"],
    raw=row["text"],
    shown=cut(row["text"]),
    length=row.get("length", length),
    temperature=float(temperature),
    seed=row.get("seed", 0),
    sample=row.get("sample", 0),
    place=place,
  )


def _items(task: Task, arm: Sequence[Generation], protocol: str) -> Iterator[Item]:
  # A repeated question is another sample if the file says so, and another item otherwise.
  places: dict[tuple[str, int], int] = {}
  seen: collections.Counter[tuple[str, int, int]] = collections.Counter()
  for generation in arm:
    record = generation.record
    question = question_id(record)
    draw = (question, generation.seed, generation.sample)
    index = places.setdefault((question, seen[draw]), len(places))
    seen[draw] += 1
    try:
      output.check_accuracy(task, record, STYLE, protocol)  # this checks more of a record than grading an empty text
      found = grade_text(task, record, generation.shown, generation.raw, protocol)
      cluster = task.cluster(record)
    except TaskError as error:  # the error is the task's, not the record's
      raise TaskError(f"{generation.place}: {error}") from None
    except (LookupError, TypeError, AttributeError, ValueError) as error:
      shown = json.dumps(record)[:80]
      raise DataError(f"{generation.place}: {shown} is no record of {task.name} ({error!r})") from None
    yield Item(
      task=task.name,
      length=generation.length,
      temperature=generation.temperature,
      seed=generation.seed,
      sample=generation.sample,
      index=index,
      question=question,
      cluster=cluster,
      record=record,
      text=generation.raw,
      answer=found.answer,
      reward=found.reward,
      metrics=found.metrics,
    )
