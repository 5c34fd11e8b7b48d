"""The output folder of an evaluation, and its printed table.

```
FOLDER/
  evaluation.json    the identity: model, settings and questions
  items/ARM.jsonl    one line per graded completion
  results.json       the identity and all numbers
  report.html        the same as a page, with plots and samples
```
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from d1jax.diffusion.rollout import SamplerSpec
from d1jax.errors import RunError, input_checked
from d1jax.evaluation import html, items, summary
from d1jax.evaluation.evaluator import baseline
from d1jax.evaluation.items import Item
from d1jax.files import FileError, read_json, write_check
from d1jax.run import workdir as workdirs
from d1jax.run.workdir import Folder, revision, unwritable, versions, write_atomically, write_json
from d1jax.tasks import Record, Task
from d1jax.tasks.common import ACCURACY


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of the table.

  Attributes:
    name: the name of its file of items.
    task: the task, which grades.
    records: the questions.
    style: the prompt style.
    sampler: the sampler; None if unknown.
    length: completion tokens; 0 if unknown.
    temperature: the sampling temperature.
    items: the graded completions.
  """

  name: str
  task: Task
  records: Sequence[Record]
  style: str
  sampler: SamplerSpec | None
  length: int
  temperature: float
  items: Sequence[Item]


@input_checked()
def claim(folder: Folder | None, home: Folder, identity: Mapping[str, Any]) -> Folder:
  """Claims the output folder for this evaluation, unless it already belongs to it, and returns its path.

  Raises:
    RunError: the folder holds another evaluation, or one that cannot be identified.
  """
  content = json.dumps(identity, sort_keys=True)
  folder = folder or home / hashlib.sha256(content.encode()).hexdigest()[:12]
  if isinstance(folder, Path):
    write_check(folder)
  known = _identity_of(folder, identity)
  if known is None:
    try:
      folder.mkdir(parents=True, exist_ok=True)
      write_json(folder / "evaluation.json", identity)
    except OSError as error:
      raise unwritable(folder, error) or error from None
  elif known != json.loads(content):
    raise RunError(f"{folder} holds another evaluation; name a new folder with --config.output=...")
  for path in (folder / "items").glob("*.jsonl"):
    items.mend(path)
  return folder


def _identity_of(folder: Folder, names: Iterable[str]) -> dict[str, Any] | None:
  """The identity in a folder, from evaluation.json or its copy in results.json; None if no evaluation has begun.

  Raises:
    RunError: it holds items of an evaluation that cannot be identified.
  """
  wrong: str | None = None
  try:
    if (folder / "evaluation.json").exists():
      return read_json(folder / "evaluation.json", dict)
  except FileError as error:
    wrong = str(error)
  begun = (folder / "items").is_dir() and any((folder / "items").glob("*.jsonl"))
  if begun:
    try:
      results = read_json(folder / "results.json", dict)
    except FileError:
      results = {}
    if not all(name in results for name in names):
      wrong = wrong or f"{folder / 'evaluation.json'} is missing"
      raise RunError(f"{wrong}, and nothing tells whose items are there; name a new folder with --config.output=...")
  if wrong and (folder / "evaluation.json").is_dir():
    raise RunError(f"{wrong}; name a new folder with --config.output=...")
  if not begun:
    return None
  known = {name: results[name] for name in names}
  write_json(folder / "evaluation.json", known)
  return known


def check_accuracy(task: Task, record: Record, style: str, protocol: str) -> None:
  """Raises a ValueError if a task lacks the protocol, or has no accuracy in it."""
  grade = task.grade(task.baseline(record, style), record, protocol)
  if ACCURACY[protocol] not in grade.metrics:
    raise ValueError(
      f"the task {task.name} has no metric {ACCURACY[protocol]!r}, the accuracy under the protocol {protocol}; it has"
      f" {', '.join(grade.metrics)}"
    )


def items_path(folder: Folder, arm: str) -> Folder:
  """The file of one arm's items."""
  return folder / "items" / f"{arm}.jsonl"


@input_checked()
def read_items(folder: Folder, arm: str) -> list[Item]:
  """The items of one arm in the order of the questions; empty if the arm has not begun."""
  path = items_path(folder, arm)
  found = items.read(path) if path.exists() else []
  return sorted(found, key=lambda item: (item.seed, item.sample, item.index))


def finish(config: ConfigDict, folder: Folder, identity: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
  """Computes all numbers, writes `results.json` and `report.html`, and prints the table and one JSON line per row."""
  accuracy = ACCURACY[config.protocol]
  arms: list[dict[str, Any]] = []
  for row in rows:
    constant = baseline(row.task, row.records, row.style, config.protocol).share(accuracy)
    with input_checked():
      numbers = summary.summarise(row.items, accuracy)
    arms.append(
      {
        "name": row.name,
        "task": row.task.name,
        "length": row.length,
        "temperature": row.temperature,
        "sampler": None if row.sampler is None else dataclasses.asdict(row.sampler),
        "summary": numbers,
        "baseline": {"value": constant.value, "interval": [constant.low, constant.high]},
      }
    )
  results = {
    **identity,
    "protocol": config.protocol,
    **({} if config.generations else {"split": config.split}),
    "arms": arms,
    "compare": _compare(config, rows, accuracy),
    "versions": versions(),
    "revision": revision(),
  }
  write_json(folder / "results.json", results)
  page = html.render(results, [item for row in rows for item in row.items])
  write_atomically(folder / "report.html", page.encode())
  print(f"{identity['subject']}, protocol {config.protocol}:\n\n{summary.table(arms)}\n")
  for name, pair in (results["compare"] or {}).get("arms", {}).items():
    low, high = (f"{100 * end:+.1f}" for end in pair["interval"])
    print(
      f"{name} against {config.compare}: {100 * pair['difference']:+.1f} points [{low}, {high}],"
      f" McNemar's p {pair['p']:.2g}, {pair['n']} pairs in {pair['clusters']} clusters"
    )
  print(f"Items, numbers and a page to read: {folder}")
  for row, arm in zip(rows, arms, strict=True):
    share = arm["summary"]["accuracy"]
    line = {
      "task": row.task.name,
      "protocol": config.protocol,
      "accuracy": None if share is None else round(100 * share, 2),
      "n": sum(item.metrics[accuracy][1] > 0 for item in row.items),
    }
    more = {"length": row.length, "temperature": row.temperature} if len(rows) > 1 else {}
    print(json.dumps(line | more))
  return results


def compared_with(config: ConfigDict) -> dict[str, Any] | None:
  """The results of the earlier evaluation with which this one is compared, if any.

  Raises:
    RunError: there are no results, or they have another protocol.
  """
  if not config.compare:
    return None
  known = workdirs.folder(config.compare) / "results.json"
  if not known.exists():
    raise RunError(
      f"config.compare={config.compare} holds no finished evaluation (results.json); name its output folder"
    )
  with input_checked():
    old = read_json(known, dict)
    for name in ("protocol", "subject"):
      if not isinstance(old.get(name), str):
        raise FileError(f"{known} is no result of an evaluation: it does not say its {name}")
  if old["protocol"] != config.protocol:
    raise RunError(
      f"{config.compare} was graded under the protocol {old['protocol']}, this evaluation under {config.protocol}"
    )
  return old


def _compare(config: ConfigDict, rows: Sequence[Row], accuracy: str) -> dict[str, Any] | None:
  """Compares every arm with the arm of the same name in an earlier evaluation, which is the first of each pair."""
  old = compared_with(config)
  if old is None:
    return None
  with input_checked():
    earlier = workdirs.folder(config.compare)
    pairs = {row.name: summary.compare(read_items(earlier, row.name), row.items, accuracy) for row in rows}
  return {"with": old["subject"], "params_fingerprint": old.get("params_fingerprint"), "arms": pairs}
