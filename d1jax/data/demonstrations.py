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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from d1jax.data.examples import FORMS, Row, checked_text, json_lines
from d1jax.errors import reworded

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


@runtime_checkable
class HasQuestion(Protocol):
  """A row with a question."""

  @property
  def question(self) -> str:
    """What is asked."""
    ...


Asked = TypeVar("Asked", bound=HasQuestion)


class _Schema(NamedTuple):
  """A kind of row: any of `markers` identifies it, all of `fields` are required; `convert` returns None to skip a row.

  `others` are fields with traces of other models, which are not read.
  """

  name: str
  markers: tuple[str, ...]
  fields: tuple[str, ...]
  convert: Callable[[Mapping[str, Any]], Demonstration | None]
  others: tuple[str, ...] = ()


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
  reasoning = checked_text("thinking_trajectories[0]", traces[0])
  return Demonstration(checked_text("question", row["question"]), reasoning, checked_text("attempt", row["attempt"]))


def _s1k_deepseek(row: Mapping[str, Any]) -> Demonstration:
  reasoning = checked_text("deepseek_thinking_trajectory", row["deepseek_thinking_trajectory"])
  return Demonstration(
    checked_text("question", row["question"]), reasoning, checked_text("deepseek_attempt", row["deepseek_attempt"])
  )


def _math(row: Mapping[str, Any]) -> Demonstration | None:
  problem, solution = checked_text("problem", row["problem"]), checked_text("solution", row["solution"])
  answer = checked_text("answer", row["answer"], may_be_blank=True)  # two rows of MATH have `\boxed{}`
  return Demonstration(problem, solution, f"\\boxed{{{answer}}}") if answer.strip() else None


def _solved(row: Mapping[str, Any]) -> Demonstration | None:
  question, solution = checked_text("question", row["question"]), checked_text("solution", row["solution"])
  answer = _last_boxed(solution)
  return None if answer is None else Demonstration(question, solution, answer)


def _gsm8k(row: Mapping[str, Any]) -> Demonstration:
  parts = checked_text("answer", row["answer"]).split("####")
  if len(parts) != 2:
    raise ValueError(f"answer has {len(parts) - 1} '####', expected one before the gold; correct the row")
  reasoning = checked_text("answer before '####'", _CALCULATOR.sub("", parts[0])).strip()
  return Demonstration(
    checked_text("question", row["question"]), reasoning, checked_text("answer behind '####'", parts[1]).strip()
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


def has_schema(row: Mapping[str, Any]) -> bool:
  """Whether a row has a field that only one of the schemas has."""
  return any(marker in row for schema in _SCHEMAS for marker in schema.markers)


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
  forms = "; ".join(", ".join(fields) for fields in FORMS.values())
  raise ValueError(f"fields {', '.join(map(repr, row)) or 'none'} fit no known schema; rename them ({forms}; {known})")


def _converted(rows: Iterable[Row]) -> Iterator[Demonstration | None]:
  schema = None
  for place, row in rows:
    with reworded(f"{place}: "):
      if not isinstance(row, dict):
        raise ValueError(f"is a JSON {type(row).__name__}, expected an object; write one object a line")
      schema = schema or _schema_of(row)
      missing = [field for field in schema.fields if field not in row]
      if missing:
        raise ValueError(f"field {missing[0]!r} is missing, which {schema.name} has; add it, or remove the row")
      yield schema.convert(row)


def read(path: str | os.PathLike[str]) -> list[Demonstration]:
  """The demonstrations of a JSON-lines file in one of the schemas above, in its order; see `json_lines` and `parse`."""
  return parse(json_lines(path), path)


def parse(found: Iterable[Row], name: object) -> list[Demonstration]:
  r"""The demonstrations of the rows of a file, in their order.

  Text is kept to the letter, but for GSM8K: its calculator marks go, and the white space around reasoning and gold.
  Rows without a final answer, which real files have, are left out, and one warning counts them: an s1K row without
  traces whose solution has no `\boxed{...}`, a MATH row with an empty `answer`.
  `name` is what messages call the file.

  Raises:
    ValueError: a row is wrong (the message names its line), or none is left.
  """
  rows = list(_converted(found))
  demonstrations = [row for row in rows if row is not None]
  if not demonstrations:
    raise ValueError(f"{name}: none of {len(rows)} rows has a final answer (\\boxed{{...}}); give another file")
  if len(demonstrations) < len(rows):
    left_out = f"{len(rows) - len(demonstrations)} of {len(rows)} rows"
    _log.warning("%s: left out %s without a final answer (\\boxed{...})", name, left_out)
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


def split(items: Sequence[Asked], held_out: float, name: str = "demonstrations") -> tuple[list[Asked], list[Asked]]:
  """Parts rows with a question into (train, validation) by a hash of the question, so that no order or edit moves one.

  A question that occurs twice, but for white space, stays on one side.

  Args:
    items: what to part; both sides keep its order.
    held_out: the expected share of the validation side, below 1; 0 holds nothing out. From 1 on it is the number of
      questions: those with the least hashes.
    name: of the rows, for messages.

  Raises:
    ValueError: the share is outside its range, or leaves a side empty.
  """
  if not 0 <= held_out < 1 and not (held_out >= 1 and float(held_out).is_integer()):
    raise ValueError(
      f"held_out={held_out} is not a share; give a number from 0 on and below 1, or a whole number of questions"
    )
  digests = [hashlib.sha256(" ".join(item.question.split()).encode()).digest()[:8] for item in items]
  limit = held_out * 2**64
  if held_out >= 1:
    least = sorted(set(digests))
    limit = int.from_bytes(least[int(held_out)], "big") if int(held_out) < len(least) else 2**64
  sides: tuple[list[Asked], list[Asked]] = ([], [])
  for item, digest in zip(items, digests, strict=True):
    sides[int.from_bytes(digest, "big") < limit].append(item)
  train, validation = sides
  if not train or bool(validation) != bool(held_out):
    raise ValueError(
      f"held_out={held_out} parts {len(items)} {name} into {len(train)} to train on and {len(validation)} to hold out;"
      f" change the share, or add {name}"
    )
  return train, validation
