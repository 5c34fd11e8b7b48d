"""Answers to the same few validation questions at every validation: `samples.jsonl`, a line a validation.

They are what a run does not leave anywhere else: their texts, rewards, and the steps that unmasked their tokens.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from d1jax.data.tokenizer import Tokenizer
from d1jax.evaluation.evaluator import Evaluation
from d1jax.files import FileError, decode, parse_json, read_bytes
from d1jax.generation import canvas as canvases
from d1jax.generation.generate import Generation
from d1jax.run.metrics import STAGES
from d1jax.run.workdir import Folder, write_atomically

NAME = "samples.jsonl"

COUNT = 4
"""The questions that are shown."""

FILMED = 512
"""The tokens of one validation whose steps are stored, in the order of the samples; the first sample always has its."""

LONGEST = 4000
"""The characters of a question's field that are stored."""

METRIC = "solved"


class Sample(NamedTuple):
  """One answer.

  Attributes:
    record: the fields of the question.
    text: the text that was graded.
    reward: its reward.
    solved: whether it is right.
    pieces: the part of the text of each token, ending with the sign of the stop; none: the steps are not stored.
    steps: the step that unmasked each of them, counted from 0 without gaps; -1: it was given, or no step unmasked it.
  """

  record: dict[str, str]
  text: str
  reward: float
  solved: bool
  pieces: list[str]
  steps: list[int]


class Validated(NamedTuple):
  """The samples of one validation.

  Attributes:
    stage: `sft` or `grpo`.
    iteration: counted from 1.
    solved: the share of all validation questions that are solved, and the ends of its 95% interval.
    samples: the answers, to the same questions in each validation.
  """

  stage: str
  iteration: int
  solved: tuple[float, float, float]
  samples: list[Sample]


def places(count: int) -> list[int]:
  """The indices of the questions that are shown, evenly spread over a split of `count`."""
  return sorted(set(np.linspace(0, count - 1, min(COUNT, count)).astype(int).tolist()))


def of(stage: str, iteration: int, found: Evaluation, prefills: Sequence[str], tokenizer: Tokenizer) -> Validated:
  """The record of a validation.

  `found` has traces of the questions that are shown, and `prefills` the given start of each answer of the split.
  """
  samples: list[Sample] = []
  room = FILMED
  for index, trace in found.traces.items():
    record = {name: _plain(value)[:LONGEST] for name, value in found.records[index].items()}
    text, grade = found.graded.texts[index], found.graded.grades[index]
    pieces: Sequence[str] = ()
    steps = np.zeros(0, int)
    if not samples or len(trace.tokens) <= room:
      room -= len(trace.tokens)
      tokens, revealed = np.asarray(trace.tokens), np.asarray(trace.reveal_step)
      canvas = canvases.of(Generation("", index, 0, prefills[index], text, tokens, len(tokens), revealed), tokenizer)
      pieces, steps = canvas.texts, np.where(canvas.steps < canvases.NEVER, canvas.steps, -1)
    solved = bool(grade.metrics[METRIC][0])
    samples.append(Sample(record, text, float(grade.reward), solved, list(pieces), steps.tolist()))
  share = found.share(METRIC)
  return Validated(stage, iteration, (float(share.value), float(share.low), float(share.high)), samples)


def append(workdir: Folder, validation: Validated) -> None:
  """Adds a line to the file.

  Raises:
    OSError, FileError, RunError: the file cannot be read or written.
  """
  path = workdir / NAME
  before = read_bytes(path) if path.exists() else b""
  if before and not before.endswith(b"\n"):
    before += b"\n"
  line = validation._asdict() | {"samples": [sample._asdict() for sample in validation.samples]}
  write_atomically(path, before + json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")


def read(workdir: Folder) -> list[Validated]:
  """The records of the file in their order; of two of the same iteration the later one. Damaged lines are left out, and
  a file that is absent or cannot be read has none.
  """
  path = workdir / NAME
  try:
    lines = read_bytes(path).split(b"\n") if path.exists() else []
  except FileError:
    return []
  found: dict[tuple[str, int], Validated] = {}
  for line in lines:
    try:
      one = _validation(parse_json(decode(line, path), path, dict, finite=True)) if line.strip() else None
    except (AttributeError, FileError, LookupError, TypeError, ValueError):
      continue
    if one is not None:
      found.pop((one.stage, one.iteration), None)
      found[one.stage, one.iteration] = one
  return list(found.values())


def _validation(line: dict[str, Any]) -> Validated:
  """The record of a line; an error of Python's if the line has another form."""
  value, low, high = map(float, line["solved"])
  if line["stage"] not in STAGES or type(line["iteration"]) is not int:
    raise ValueError("no record")
  return Validated(
    line["stage"], line["iteration"], (value, low, high), [_sample(**x) for x in line["samples"][:COUNT]]
  )


def _sample(
  record: dict[str, Any], text: str, reward: float, solved: bool, pieces: list[str], steps: list[int], **_: Any
) -> Sample:
  if len(pieces) != len(steps) or not all(type(step) is int for step in steps):
    raise ValueError("no sample")
  fields = {str(name): str(value) for name, value in record.items()}
  return Sample(fields, str(text), float(reward), bool(solved), [str(piece) for piece in pieces], steps)


def _plain(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value)
