"""The inputs of a run, its model and its task: what is missing of both is one message, before anything is computed."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from ml_collections import ConfigDict

from d1jax import hub, tasks
from d1jax.errors import RunError
from d1jax.models import families
from d1jax.parallel import multihost
from d1jax.source import Source, download, fetch, inspect, locate
from d1jax.tasks import Task, tables

NO_TASK = "none"
"""The name of the task of a run that fine-tunes on data, and grades nothing."""


class NoTask:
  """Stands for the task of a run without one, which only fine-tunes; and of a checkpoint, whose task may be a Python
  file of somebody else: its code is not run.
  """

  name, splits = NO_TASK, ()

  def _refuse(self, *arguments: Any) -> Any:
    raise RuntimeError(f"the experiment was built without its task, which was asked for {arguments!r}")

  records = prompt = demonstration = baseline = cluster = grade = _refuse


def data_root(name: str | None, *, cached: bool = False) -> str | None:
  """The data folder of a name: a path, or `hf:owner/name`, a data set of the hub, which is downloaded.

  The name `hub`, which stands for the published data sets of the tasks, stays as it is (`tables.read`).

  Args:
    name: None: no folder.
    cached: whether the hub is not asked, because a checkpoint chose the name.
  """
  is_remote = name is not None and name.startswith(hub.PREFIX)
  return str(fetch(cast(str, name), "dataset", cached=cached)) if is_remote else name


def build_task(config: ConfigDict) -> Task:
  """The task that the configuration names, or its mix of tasks; a task that refuses everything if it names none."""
  section, weights = config.task, config.task.mix.to_dict()
  if section.name == NO_TASK and section.module is None and not weights:
    return cast(Task, NoTask())
  sizes, options = section.sizes.to_dict(), section.options.to_dict()
  root = data_root(config.data.root)
  if not weights:
    return tasks.build(section.name, seed=config.seed, root=root, sizes=sizes, module=section.module, **options)
  mixed = tasks.build_mix(weights, seed=config.seed, root=root, sizes=sizes, options=options)
  if section.name != mixed.name or section.module is not None:
    raise ValueError(
      f"task.mix is of {mixed.name}, but task.name={section.name} and task.module={section.module}: a mix has the"
      " sorted names of its tasks, joined by +, and no module"
    )
  return mixed


def _located(config: ConfigDict, *, trains: bool) -> Source | hub.Snapshot | None:
  """The model's folder, or the snapshot of the hub that must be downloaded; None if its weights are drawn."""
  if not config.model.pretrained:
    if trains and config.model.size in families.PRESETS and config.model.size not in ("tiny", "small"):
      raise ValueError(
        f"model.size={config.model.size} has no weights: name a folder with --config.model.pretrained=FOLDER, or a"
        " model of the hub, such as GSAI-ML/LLaDA-8B-Instruct"
      )
    return None
  found = locate(config.model.pretrained)
  return inspect(found) if isinstance(found, Path) else found


def downloaded(found: hub.Snapshot) -> Source:
  """A model of the hub, in its cache; prints the commit, by which the same model is found again."""
  if multihost.is_main():
    print(f"reading {found.repository}@{found.commit} of the hub", file=sys.stderr)
  return inspect(download(found))


def _with_questions(config: ConfigDict) -> Task:
  """The task, after the files of its questions and of the demonstrations were read."""
  task = build_task(config)
  root = data_root(config.data.root)
  if config.sft.steps and config.sft.data and (root != tables.HUB or Path(config.sft.data).is_absolute()):
    path = Path(root or "") / config.sft.data
    if not path.exists():
      raise ValueError(f"sft.data: {path} is missing; set data.root to the folder that holds {config.sft.data}")
  for split in () if isinstance(task, tasks.Custom | NoTask) else ("test", "train"):
    task.records(split)
  return task


def find_inputs(
  config: ConfigDict, *, with_task: bool = True, trains: bool = False, reads: bool = False
) -> tuple[Task | None, Source | hub.Snapshot | None]:
  """The task and the model of a configuration; whatever is missing of both is one error.

  A model of the hub is only looked up: 15 GiB are not downloaded for a run whose data are missing.

  Args:
    config: a complete configuration.
    with_task: False leaves the task out.
    trains: whether a run needs weights and questions, so that these must be there.
    reads: whether the questions are read in any case; a run reads them later.

  Raises:
    ValueError: something is missing or wrong; the message has a part for each.
  """
  failures: list[Exception] = []

  def tried(find: Callable[[], Any]) -> Any:
    try:
      return find()
    except (ValueError, RunError) as error:
      failures.append(error)

  located = tried(lambda: _located(config, trains=trains))
  # The questions of a run are read later, unless its weights are missing or are to be downloaded first.
  reads = reads or (trains and (bool(failures) or isinstance(located, hub.Snapshot)))
  task = tried(lambda: _with_questions(config) if reads else build_task(config)) if with_task else None
  if len(failures) > 1:
    raise ValueError("; and ".join(" ".join(str(error).split()) for error in failures)) from failures[0]
  if failures:
    raise failures[0]
  return task, located
