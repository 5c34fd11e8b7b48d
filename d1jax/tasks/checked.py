"""The checks of what a task returns: records, prompts, texts, clusters and grades.

Each check returns the value as plain Python (numbers of numpy become numbers), or raises a ValueError whose message
continues the name of the call, such as `returned None, expected a Grade(components, metrics, answer)`.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from d1jax.tasks.base import Grade, Message, Record, Task, TaskError
from d1jax.tasks.common import ACCURACY

LARGEST = 1e15
"""The largest reward component: rewards are float32, and the squares of a group are added."""

LONGEST = 500_000
"""The most characters of a prompt or an answer; no model here reads a tenth of them."""

SHOWN = 80
"""Characters of a text or a record that a message shows."""


def grade(task: Task, text: str, record: Record, protocol: str = "strict") -> Grade:
  """Grade a completion, and check the grade, so that a reward that is not finite never reaches training.

  Raises:
    TaskError: the result is not a grade, or a value in it is not allowed; the message names task, value and text.
  """
  result = task.grade(text, record, protocol)
  try:
    return check_grade(result)
  except ValueError as error:
    raise TaskError(f"the task {task.name}: {called('grade', (text, record, protocol))} {error}") from None


def check_answer(method: str, arguments: Sequence[Any], value: object) -> Any:
  """Check what a method of a task returned."""
  if method == "records":
    return check_records(value)
  if method == "prompt":
    return check_prompt(value)
  if method == "cluster":
    return check_cluster(value)
  if method == "grade":
    return check_grade(value, ACCURACY["strict"] if arguments[-1] == "strict" else None)
  return check_text(value)


def check_grade(grade: object, accuracy: str | None = None) -> Grade:
  """Check that rewards are finite and metrics are shares.

  Args:
    grade: the grade.
    accuracy: the metric that must be present, with a positive denominator; validation reads it.
  """
  if not isinstance(grade, Grade):
    raise ValueError(f"returned {shortened(grade)}, expected a Grade(components, metrics, answer)")
  for part in ("components", "metrics"):
    named = getattr(grade, part)
    if not isinstance(named, Mapping) or not all(isinstance(name, str) for name in named):
      raise ValueError(f"gave the {part} {shortened(named)}, expected a dictionary of names")
    for name in named:  # they are printed, and name curves
      check_text(name, f"among the {part} the name")
  components = {}
  for name, value in grade.components.items():
    number = _number(value)
    if number is None or not abs(number) <= LARGEST:
      raise ValueError(
        f"gave the reward component {name!r} the value {shortened(value)},"
        f" expected a finite number of at most {LARGEST:g}"
      )
    components[name] = number
  metrics = {name: _pair(name, pair) for name, pair in grade.metrics.items()}
  if accuracy is not None and not metrics.get(accuracy, (0, 0))[1]:
    given = f"the pair {metrics[accuracy]} for" if accuracy in metrics else f"the metrics {sorted(metrics)} without"
    raise ValueError(
      f"gave {given} {accuracy!r}, which validation reads: expected (1, 1) for right and (0, 1) for wrong"
    )
  if grade.answer is not None and not isinstance(grade.answer, str):
    raise ValueError(f"gave the answer {shortened(grade.answer)}, expected a text or None")
  return Grade(components, metrics, grade.answer)


def check_records(value: Any) -> list[dict[str, Any]]:
  """Check that records are a list of dictionaries that JSON can hold."""
  is_list = hasattr(value, "__len__") and hasattr(value, "__getitem__")
  if not is_list or isinstance(value, str | bytes | Mapping):
    raise ValueError(f"returned {shortened(value)}, expected a list of dictionaries")
  records = list(value)
  for number, record in enumerate(records):
    if not isinstance(record, Mapping):
      raise ValueError(f"returned {shortened(record)} as record {number}, expected a dictionary")
  return [_plain(record, f"record {number}") for number, record in enumerate(records)]


def check_prompt(answer: object) -> tuple[list[Message], str]:
  """Check that a prompt is chat messages and the start of the answer."""
  if not isinstance(answer, tuple | list) or len(answer) != 2 or not isinstance(answer[0], tuple | list):
    raise ValueError(f"returned {shortened(answer)}, expected ([{{'role': 'user', 'content': ...}}], prefill)")
  for message in answer[0]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
      raise ValueError(f"returned the message {shortened(message)}, expected {{'role': 'user', 'content': ...}}")
    for key, value in message.items():
      check_text(key, "the message key")
      check_text(value, f"the message's {key}")
  return [dict(message) for message in answer[0]], check_text(answer[1], "the prefill")


def check_text(value: object, what: str = "") -> str:
  """Check that a text is one that a tokenizer can read."""
  returned = f"returned {what} {shortened(value)}".replace("  ", " ", 1)
  if not isinstance(value, str):
    raise ValueError(f"{returned}, expected a text")
  if len(value) > LONGEST:
    raise ValueError(f"{returned} of {len(value)} characters, expected {LONGEST} at most")
  if surrogate := re.search("[\ud800-\udfff]", value):
    raise ValueError(f"{returned} with {surrogate.group()!r}, a half of a character that UTF-8 does not have")
  return str.__str__(value)


def check_cluster(value: object) -> str:
  """Check the name of a cluster; numbers count as names."""
  if not isinstance(value, str | int):
    raise ValueError(f"returned {shortened(value)}, expected a text")
  return str(value)


def called(method: str, arguments: Sequence[Any]) -> str:
  """Write a call for a message, such as `grade(text='7', record={'digits': '01'}, protocol='strict')`."""
  names = list(inspect.signature(getattr(Task, method)).parameters)[1:]
  written = (f"{name}={shortened(value)}" for name, value in zip(names, arguments, strict=True))
  return f"{method}({', '.join(written)})"


def shortened(value: object) -> str:
  """Write a value in one line of at most `SHOWN` characters and an ellipsis."""
  try:
    text = repr(value[:SHOWN] + "..." if isinstance(value, str) and len(value) > SHOWN else value)
  except Exception as error:
    text = f"<{type(value).__name__}, whose repr fails: {type(error).__name__}>"
  text = " ".join(text.split())
  return text if len(text) <= SHOWN + 5 else text[:SHOWN] + "..."


def _number(value: Any) -> int | float | None:
  """A number of Python or, without a dimension, of an array library; None of anything else."""
  if getattr(value, "shape", None) == () and hasattr(value, "item"):
    value = value.item()
  return +value if isinstance(value, int | float) else None


def _pair(name: str, pair: object) -> tuple[int | float, int | float]:
  numbers = [_number(value) for value in pair] if isinstance(pair, tuple | list) else []
  top, bottom = numbers if len(numbers) == 2 else (None, None)
  if top is None or bottom is None or not 0 <= top <= bottom <= LARGEST:
    raise ValueError(
      f"gave the metric {name!r} the value {shortened(pair)}, expected (numerator, denominator) with 0 <= numerator <="
      " denominator"
    )
  return top, bottom


def _plain(value: Any, place: str) -> Any:
  """The value as dictionaries, lists, tuples, texts, numbers, truth values and None."""
  if value is None or isinstance(value, bool):
    return value
  if isinstance(value, str):
    return str.__str__(value)
  number = _number(value)
  if number is not None:
    return number
  if isinstance(value, tuple | list):
    items = [_plain(item, place) for item in value]
    return tuple(items) if isinstance(value, tuple) else items
  if not isinstance(value, Mapping):
    raise ValueError(f"returned {shortened(value)} in {place}, expected what JSON can hold")
  for key in value:
    if not isinstance(key, str):
      raise ValueError(f"returned the key {shortened(key)} in {place}, expected texts as keys")
  return {str.__str__(key): _plain(item, place) for key, item in value.items()}
