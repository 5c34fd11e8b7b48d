"""Several tasks as one: each record is answered by its own task."""

import math
from collections.abc import Mapping, Sequence

from d1jax.tasks import common
from d1jax.tasks.base import Grade, Message, Record, Task


class Mixture:
  """A task made of tasks; records are `{"task": "sudoku", ...}`, else as their own task has them.

  A split contains the splits of the tasks, one after the other. The weights decide how often training draws from each
  (`parts`); supervised fine-tuning and evaluations take every record once.

  Attributes:
    name: the names of the tasks, sorted and joined by `+`.
    splits: as of every task.
    tasks: by name, sorted.
    weights: by name, sorted.
  """

  def __init__(self, tasks: Mapping[str, Task], weights: Mapping[str, float]):
    """Mixes tasks.

    Args:
      tasks: by name.
      weights: by the same names, positive; only their ratios matter.

    Raises:
      ValueError: a task without a weight, a weight without a task, or one that is not positive.
    """
    for name in weights:
      common.check_choice("task in the mix's weights", name, list(tasks))
    for name in tasks:
      weight = weights.get(name)
      if not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(f"the weight of {name} in the mix is {weight!r}; give a positive number")
    names = sorted(tasks)
    self.name = "+".join(names)
    self.splits: Sequence[str] = common.SPLITS
    self.tasks = {name: tasks[name] for name in names}
    self.weights = {name: float(weights[name]) for name in names}

  def records(self, split: str) -> Sequence[Record]:
    """Return the records of one split of every task, each with the name of its task."""
    return tuple({"task": name, **record} for name, task in self.tasks.items() for record in task.records(split))

  def parts(self, records: Sequence[Record]) -> list[tuple[list[int], float]]:
    """Return the places of each task's records, and its weight.

    Raises:
      ValueError: a task has none.
    """
    parts = []
    for name, weight in self.weights.items():
      places = [i for i, record in enumerate(records) if record["task"] == name]
      if not places:
        raise ValueError(f"no record of {name} is left; raise the prompt buckets, or take it out of the mix")
      parts.append((places, weight))
    return parts

  def prompt(self, record: Record, style: str) -> tuple[list[Message], str]:
    """Return the messages and the prefill of the record's task."""
    return self._task(record).prompt(record, style)

  def demonstration(self, record: Record, style: str) -> str:
    """Write a correct completion, as the record's task does."""
    return self._task(record).demonstration(record, style)

  def baseline(self, record: Record, style: str) -> str:
    """Write the completion of a model that knows nothing, as the record's task does."""
    return self._task(record).baseline(record, style)

  def cluster(self, record: Record) -> str:
    """Name the cluster within the record's task."""
    return f"{record['task']}/{self._task(record).cluster(record)}"

  def grade(self, text: str, record: Record, protocol: str = "strict") -> Grade:
    """Grade by the record's task; every metric comes twice, as `solved` and as `sudoku/solved`."""
    grade = self._task(record).grade(text, record, protocol)
    by_task = {f"{record['task']}/{name}": pair for name, pair in grade.metrics.items()}
    return Grade(grade.components, {**grade.metrics, **by_task}, grade.answer)

  def _task(self, record: Record) -> Task:
    return self.tasks[record["task"]]
