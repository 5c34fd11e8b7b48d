r"""Demonstrations for supervised fine-tuning, from JSON-lines files in the schemas of s1K, GSM8K and MATH.

A file has one schema, which follows from the fields of its first line; further fields are ignored, unless they hold
reasoning traces, which would be dropped:

- s1K: `question`, `thinking_trajectories` (a list, its first entry is used), `attempt`;
- s1K-1.1: `question`, `deepseek_thinking_trajectory`, `deepseek_attempt`;
- MATH: `problem`, `solution`, `answer`;
- s1K without traces: `question`, `solution`, whose last `\boxed{...}` is the answer;
- GSM8K: `question`, `answer` with its calculator marks `<<...>>` and a last line `#### gold`.
"""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from d1jax import files

SYSTEM_PROMPT = (
  "\nRespond in the following format:\n<reasoning>\nYour reasoning here\n</reasoning>\n<answer>\n...\n</answer>\n"
)
"""d1's instruction for fine-tuning, to the letter; its RL prompt differs."""

_log = logging.getLogger(__name__)
_BOXED = re.compile(r"\\boxed\s*\{")
_CALCULATOR = re.compile(r"<<[^<>]*>>")


class Demonstration(NamedTuple):
  """A solved problem: the question, the way to the answer, the answer as it is to be written."""

  question: str
  reasoning: str
  answer: str


class _Schema(NamedTuple):
  """A kind of row: any of `markers` identifies it, all of `fields` are required; `convert` returns None to skip a row.

  `others` are fields with traces of other models, which are not read.
  """

  name: str
  markers: tuple[str, ...]
  fields: tuple[str, ...]
  convert: Callable[[Mapping[str, Any]], Demonstration | None]
  others: tuple[str, ...] = ()


def text_field(name: str, value: object, *, may_be_blank: bool = False) -> str:
  """A field of a row that has to be text.

  Raises:
    ValueError: it is not; the message says how to correct the row.
  """
  if not isinstance(value, str):
    raise ValueError(f"{name} is a JSON {type(value).__name__}, expected a string; correct the row")
  if not value.strip() and not may_be_blank:
    raise ValueError(f"{name} is blank; fill it in, or remove the row")
  if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
    raise ValueError(f"{name} holds half of a surrogate pair, which is not a character; correct the row")
  return value


def _last_boxed(solution: str) -> str | None:
  r"""The last `\boxed{...}` with its matching brace; `\{` and `\}` are characters, an empty box is none."""
  starts = list(_BOXED.finditer(solution))
  if not starts:
    return None
  depth, at = 1, starts[-1].end()
  while at < len(solution):
    if solution[at] == "\\":
      at += 1
    elif solution[at] in "{}":
      depth += 1 if solution[at] == "{" else -1
      if not depth:
        inside = solution[starts[-1].end() : at]
        return f"\\boxed{{{inside}}}" if inside.strip() else None
    at += 1
  return None


def _s1k(row: Mapping[str, Any]) -> Demonstration:
  traces = row["thinking_trajectories"]
  if not isinstance(traces, list) or not traces:
    raise ValueError(f"thinking_trajectories is {str(traces)[:40]!r}, expected a list with a trace; correct the row")
  reasoning = text_field("thinking_trajectories[0]", traces[0])
  return Demonstration(text_field("question", row["question"]), reasoning, text_field("attempt", row["attempt"]))


def _s1k_deepseek(row: Mapping[str, Any]) -> Demonstration:
  reasoning = text_field("deepseek_thinking_trajectory", row["deepseek_thinking_trajectory"])
  return Demonstration(
    text_field("question", row["question"]), reasoning, text_field("deepseek_attempt", row["deepseek_attempt"])
  )


def _math(row: Mapping[str, Any]) -> Demonstration | None:
  problem, solution = text_field("problem", row["problem"]), text_field("solution", row["solution"])
  answer = text_field("answer", row["answer"], may_be_blank=True)  # two rows of MATH have `\boxed{}`
  return Demonstration(problem, solution, f"\\boxed{{{answer}}}") if answer.strip() else None


def _solved(row: Mapping[str, Any]) -> Demonstration | None:
  question, solution = text_field("question", row["question"]), text_field("solution", row["solution"])
  answer = _last_boxed(solution)
  return None if answer is None else Demonstration(question, solution, answer)


def _gsm8k(row: Mapping[str, Any]) -> Demonstration:
  parts = text_field("answer", row["answer"]).split("####")
  if len(parts) != 2:
    raise ValueError(f"answer has {len(parts) - 1} '####', expected one before the gold; correct the row")
  reasoning = text_field("answer before '####'", _CALCULATOR.sub("", parts[0])).strip()
  return Demonstration(
    text_field("question", row["question"]), reasoning, text_field("answer behind '####'", parts[1]).strip()
  )


_SCHEMAS = (
  _Schema("s1K", ("thinking_trajectories", "attempt"), ("question", "thinking_trajectories", "attempt"), _s1k),
  _Schema(
    "s1K-1.1",
    ("deepseek_thinking_trajectory", "deepseek_attempt"),
    ("question", "deepseek_thinking_trajectory", "deepseek_attempt"),
    _s1k_deepseek,
    others=("gemini_thinking_trajectory",),
  ),
  _Schema("MATH", ("problem",), ("problem", "solution", "answer"), _math),
  _Schema("s1K without traces", ("solution",), ("question", "solution"), _solved),
  _Schema("GSM8K", ("answer",), ("question", "answer"), _gsm8k),
)


_TRACES = (
  *("thinking_trajectories", "deepseek_thinking_trajectory", "gemini_thinking_trajectory", "generations", "messages"),
  *("conversations", "reasoning", "reasoning_content", "deepseek_reasoning", "r1_solution", "generated_solution"),
)
"""Columns of public data sets (s1K, OpenR1, OpenThoughts, NuminaMath) that hold reasoning beside a short solution."""


def _schema_of(row: Mapping[str, Any]) -> _Schema:
  known = "; ".join(f"{schema.name}: {', '.join(schema.fields)}" for schema in _SCHEMAS)
  for schema in _SCHEMAS:
    if any(marker in row for marker in schema.markers):
      traces = [name for name in _TRACES if row.get(name) and name not in (*schema.fields, *schema.others)]
      if traces:
        raise ValueError(
          f"has the field {traces[0]!r}, whose reasoning {schema.name} would drop; rename the fields ({known}), or"
          f" remove {traces[0]!r} to train on {schema.fields[1]!r}"
        )
      return schema
  raise ValueError(f"fields {', '.join(map(repr, row)) or 'none'} fit no known schema; rename them ({known})")


def _converted(path: object, text: str) -> Iterator[Demonstration | None]:
  schema = None
  for number, _, row in files.json_lines(text, path):
    if isinstance(row, files.FileError):
      raise ValueError(f"{row}; write one object a line")
    try:
      if not isinstance(row, dict):
        raise ValueError(f"is a JSON {type(row).__name__}, expected an object; write one object a line")
      schema = schema or _schema_of(row)
      missing = [field for field in schema.fields if field not in row]
      if missing:
        raise ValueError(f"field {missing[0]!r} is missing, which {schema.name} has; add it, or remove the row")
      yield schema.convert(row)
    except ValueError as error:
      raise ValueError(f"{path} line {number}: {error}") from None


def read(path: str | os.PathLike[str]) -> list[Demonstration]:
  r"""Reads the demonstrations of a JSON-lines file, in its order.

  Text is kept to the letter, but for GSM8K: its calculator marks go, and the white space around reasoning and gold.
  Rows without a final answer, which real files have, are left out, and one warning counts them: an s1K row without
  traces whose solution has no `\boxed{...}`, a MATH row with an empty `answer`.

  Args:
    path: a UTF-8 file, one JSON object a line, in one of the schemas above; blank lines are skipped.

  Raises:
    ValueError: the file is absent, unreadable or empty, a row is wrong (the message names its line), none is left.
  """
  try:
    text = files.read_text(Path(path))
  except files.FileError as error:
    raise ValueError(f"{error}; check the path, its rights, and that it is UTF-8 text") from None
  if not text.strip():
    raise ValueError(f"{path}: the file is empty; fetch it again")
  rows = list(_converted(path, text))
  demonstrations = [row for row in rows if row is not None]
  if not demonstrations:
    raise ValueError(f"{path}: none of {len(rows)} rows has a final answer (\\boxed{{...}}); give another file")
  if len(demonstrations) < len(rows):
    left_out = f"{len(rows) - len(demonstrations)} of {len(rows)} rows"
    _log.warning("%s: left out %s without a final answer (\\boxed{...})", path, left_out)
  return demonstrations


def conversation(demonstration: Demonstration) -> tuple[list[dict[str, str]], str]:
  """The chat turns and the completion that d1 fine-tunes on.

  d1 writes no line breaks inside the tags, unlike the format that it rewards later.

  Returns:
    (messages, completion): one user turn, the instruction and the question; and the text of the answer.
  """
  content = f"{SYSTEM_PROMPT}\n\n{demonstration.question}"
  completion = f"<reasoning>{demonstration.reasoning}</reasoning>\n<answer>{demonstration.answer}</answer>"
  return [{"role": "user", "content": content}], completion


@runtime_checkable
class Asked(Protocol):
  """A row with a question."""

  @property
  def question(self) -> str:
    """What is asked."""
    ...


Row = TypeVar("Row", bound=Asked)


def split(rows: Sequence[Row], held_out: float, name: str = "demonstrations") -> tuple[list[Row], list[Row]]:
  """Parts rows into (train, validation) by a hash of the question, so that no order or edit moves one.

  A question that occurs twice, but for white space, stays on one side.

  Args:
    rows: what to part; both sides keep its order.
    held_out: the expected share of the validation side, in [0, 1); 0 holds nothing out.
    name: of the rows, for messages.

  Raises:
    ValueError: the share is outside its range, or leaves a side empty.
  """
  if not 0 <= held_out < 1:
    raise ValueError(f"held_out={held_out} is not a share; give a number from 0 on and below 1")
  sides: tuple[list[Row], list[Row]] = ([], [])
  for row in rows:
    digest = hashlib.sha256(" ".join(row.question.split()).encode()).digest()
    sides[int.from_bytes(digest[:8], "big") < held_out * 2**64].append(row)
  train, validation = sides
  if not train or bool(validation) != bool(held_out):
    raise ValueError(
      f"held_out={held_out} parts {len(rows)} {name} into {len(train)} to train on and {len(validation)} to hold out;"
      f" change the share, or add {name}"
    )
  return train, validation
