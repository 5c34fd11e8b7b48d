"""The user's own data: rows of `messages`, of `prompt` and `response`, or of plain `text`.

- `messages` is a conversation, a list of `{"role": ..., "content": ...}`. Each turn of the assistant is an example of
  its own, which has all turns before it as its prompt. They do not share a row: attention goes both ways, so that an
  answer would see the questions that come after it.
- `prompt` and `response` are a conversation of two turns.
- `text` is learned from its first token to its last.

A file has rows of one kind, which its first row decides. Other fields are ignored.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from d1jax import files
from d1jax.errors import reworded

FORMS: Mapping[str, tuple[str, ...]] = {
  "messages": ("messages",),
  "prompt and response": ("prompt", "response"),
  "text": ("text",),
}
"""The fields that each kind of row must have."""

UNREADABLE = "; check the path, its rights, and that it is UTF-8 text"
Row = tuple[str, Any]
"""The place of a row, such as `mine.jsonl line 3`, and its value."""


class Example(NamedTuple):
  """What is learned from one answer, or from one text.

  Attributes:
    place: the file and the line.
    question: the text that decides whether the example is held out: the first user turn, or the text itself.
    messages: the turns before the answer; empty for a text.
    answer: the text that is learned.
  """

  place: str
  question: str
  messages: Sequence[dict[str, str]]
  answer: str


def checked_text(name: str, value: object, *, may_be_blank: bool = False) -> str:
  """A field that has to be text.

  Raises:
    ValueError: it is something else, is blank, or cannot be encoded; the message names the field and the remedy.
  """
  if not isinstance(value, str):
    raise ValueError(f"{name} is a JSON {type(value).__name__}, expected a string; correct the row")
  if not value.strip() and not may_be_blank:
    raise ValueError(f"{name} is blank; fill it in, or remove the row")
  if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
    raise ValueError(f"{name} holds half of a surrogate pair, which is not a character; correct the row")
  return value


def json_lines(path: str | os.PathLike[str]) -> Iterator[Row]:
  """The rows of a JSON-lines file with their places, `FILE line N`; blank lines are skipped.

  Raises:
    ValueError: the file is absent, unreadable or empty, or a line is not JSON; the message names the line.
  """
  with reworded("", UNREADABLE):
    text = files.read_text(Path(path))
  if not text.strip():
    raise ValueError(f"{path}: the file is empty; fetch it again")
  for number, _, row in files.json_lines(text, path):
    if isinstance(row, files.FileError):
      raise ValueError(f"{row}; write one object a line")
    yield f"{path} line {number}", row


def form_of(row: Any) -> str | None:
  """The key of `FORMS` whose fields a row has, the first one of several; None: it has those of none."""
  if not isinstance(row, dict):
    return None
  return next((form for form, fields in FORMS.items() if all(row.get(field) is not None for field in fields)), None)


def parse(rows: Iterable[Row]) -> list[Example]:
  """The examples of the rows of a file.

  Raises:
    ValueError: a row is of another kind than the first one, or is wrong; the message names the file and the line.
  """
  found: list[Example] = []
  first: tuple[str, str] | None = None
  for place, row in rows:
    with reworded(f"{place}: "):
      form = form_of(row)
      first = first or (place, form or "")
      if form != first[1]:
        said = "" if form is None else f"has {form}, but "
        raise ValueError(
          f"{said}{first[0]} has {first[1]}, and a file has rows of one kind: correct the row, or put rows of"
          " another kind into a file of their own; sft.data may name a folder of files"
        )
      found += _examples(place, row, first[1])
  return found


def _examples(place: str, row: Mapping[str, Any], form: str) -> list[Example]:
  if form == "text":
    text = checked_text("text", row["text"])
    return [Example(place, text, (), text)]
  if form == "prompt and response":
    prompt, response = checked_text("prompt", row["prompt"]), checked_text("response", row["response"])
    return [Example(place, prompt, ({"role": "user", "content": prompt},), response)]
  turns = _turns(row["messages"])
  answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
  if not answers:
    raise ValueError(
      "messages has no turn of the role 'assistant', whose words are learned; add one, or remove the row"
    )
  if not answers[0]:
    raise ValueError("messages begins with the assistant, who has nothing to answer; put a turn of the user before it")
  question = next((turn["content"] for turn in turns if turn["role"] == "user"), turns[0]["content"])
  return [Example(place, question, turns[:i], turns[i]["content"]) for i in answers]


def _turns(messages: object) -> list[dict[str, str]]:
  """The turns of a conversation, with their roles and contents alone."""
  expected = 'expected a list of {"role": ..., "content": ...}; correct the row'
  if not isinstance(messages, list):
    raise ValueError(f"messages is a JSON {type(messages).__name__}, {expected}")
  turns = []
  for i, turn in enumerate(messages):
    if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
      raise ValueError(f"messages[{i}] is {str(turn)[:40]!r}, {expected}")
    role = checked_text(f"messages[{i}].role", turn["role"])
    content = checked_text(f"messages[{i}].content", turn["content"], may_be_blank=role != "assistant")
    turns.append({"role": role, "content": content})
  return turns
