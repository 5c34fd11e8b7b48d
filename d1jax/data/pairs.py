"""Preference pairs: two answers to one prompt, of which the first is preferred; their files and their batches.

A file has one JSON object a line, with `prompt` (a text: one user turn) or `messages` (a chat whose last turn is a
user's), and the texts `chosen` and `rejected`. `prefill` may hold the given start of both answers, which they go on
from. Further fields are ignored; `d1jax.evaluation.rollout_pairs` writes there where a pair comes from.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from d1jax import files
from d1jax.data.examples import UNREADABLE, checked_text
from d1jax.data.pipeline import Ids, bucket_for, pad_left
from d1jax.data.sft_batches import check_buckets, in_buckets, pad_right
from d1jax.data.tokenizer import Tokenizer
from d1jax.errors import reworded

KINDS = ("prompt", "messages")
"""The fields that ask; all rows of a file have the same one."""


class Pair(NamedTuple):
  """A row of a file.

  Attributes:
    messages: the turns of a chat; the last one is a user's.
    prefill: the given start of both answers.
    chosen: the answer that is preferred.
    rejected: the other one.
    line: its line in the file, from 1.
  """

  messages: list[dict[str, str]]
  prefill: str
  chosen: str
  rejected: str
  line: int

  @property
  def question(self) -> str:
    """What the user says last."""
    return self.messages[-1]["content"]


class PairTokens(NamedTuple):
  """Tokenised pairs; answers have stop ids."""

  prompts: list[list[int]]
  chosen: list[list[int]]
  rejected: list[list[int]]

  @property
  def longest(self) -> list[list[int]]:
    """The longer answer of each pair, which decides its bucket."""
    return [max(pair, key=len) for pair in zip(self.chosen, self.rejected, strict=True)]


class PairBatch(NamedTuple):
  """Pairs of one prompt bucket and one answer bucket.

  Attributes:
    sample_id: of each pair; the keys of all draws are made of it.
    prompt: left-padded ids.
    prompt_valid: false at padding.
    answers: ids, the chosen answer first; padding on the right.
    length: the tokens of each answer with its stop id.
  """

  sample_id: Int[np.ndarray, "B"]
  prompt: Int[np.ndarray, "B P"]
  prompt_valid: Bool[np.ndarray, "B P"]
  answers: Int[np.ndarray, "B 2 C"]
  length: Int[np.ndarray, "B 2"]

  @property
  def lengths(self) -> tuple[int, int]:
    """The lengths of prompts and answers, P and C."""
    return self.prompt.shape[1], self.answers.shape[2]


def _messages(row: Mapping[str, Any], kind: str) -> list[dict[str, str]]:
  if kind == "prompt":
    return [{"role": "user", "content": checked_text("prompt", row["prompt"])}]
  turns = row["messages"]
  if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
    raise ValueError(f"messages is {str(turns)[:40]!r}, expected a list of turns; write role and content of each")
  found = [{name: checked_text(f"messages: {name}", turn.get(name)) for name in ("role", "content")} for turn in turns]
  if found[-1]["role"] != "user":
    raise ValueError(f"the last of messages is by {found[-1]['role']!r}; end with a user's, which the answers answer")
  return found


def _pair(row: Mapping[str, Any], kind: str, line: int) -> Pair:
  for name in (kind, "chosen", "rejected"):
    if name not in row:
      raise ValueError(f"field {name!r} is missing; add it, or remove the row")
  if any(other in row for other in KINDS if other != kind):
    raise ValueError(f"has {' and '.join(KINDS)}; the rows of a file are of one kind: keep {kind!r}")
  chosen, rejected = (checked_text(name, row[name]) for name in ("chosen", "rejected"))
  if chosen == rejected:
    raise ValueError("chosen and rejected are the same text, so that none is preferred; correct one or remove the row")
  prefill = checked_text("prefill", row.get("prefill", ""), may_be_blank=True)
  return Pair(_messages(row, kind), prefill, chosen, rejected, line)


def read(path: Any) -> list[Pair]:
  """Reads the pairs of a file, in its order.

  Args:
    path: the file, on a disk or in a bucket.

  Raises:
    ValueError: the file is absent, unreadable or empty, or a row is wrong; the message names its line.
  """
  with reworded("", UNREADABLE):
    text = files.read_text(path)
  found: list[Pair] = []
  kind = ""
  for number, _, row in files.json_lines(text, path):
    if isinstance(row, files.FileError):
      raise ValueError(f"{row}; write one object a line")
    with reworded(f"{path} line {number}: "):
      if not isinstance(row, dict):
        raise ValueError(f"is a JSON {type(row).__name__}, expected an object; write one object a line")
      kinds = [name for name in KINDS if name in row]
      if not kinds:
        raise ValueError(f"has none of the fields {' and '.join(KINDS)}; name what is asked so")
      kind = kind or kinds[0]
      if kind not in kinds:
        raise ValueError(
          f"has {kinds[0]!r}, but line {found[0].line} has {kind!r}; give all rows of the file the same one"
        )
      found.append(_pair(row, kind, number))
  if not found:
    raise ValueError(f"{path}: the file holds no pair; write one object a line")
  return found


def tokenised(pairs: Sequence[Pair], tokenizer: Tokenizer, path: object) -> PairTokens:
  """The tokens of pairs.

  Raises:
    ValueError: the two answers of a row are the same tokens, or the chat template refuses its turns; the message names
      file and line.
  """
  tokens = PairTokens([], [], [])
  for pair in pairs:
    with reworded(f"{path} line {pair.line}: "):
      chosen, rejected = tokenizer.completion(pair.chosen), tokenizer.completion(pair.rejected)
      if chosen == rejected:
        raise ValueError("chosen and rejected are the same tokens, so that none is preferred; remove the row")
      prompt = tokenizer.prompt(pair.messages, pair.prefill)
    for side, ids in zip(tokens, (prompt, chosen, rejected), strict=True):
      side.append(ids)
  return tokens


def fitting(tokens: PairTokens, buckets: Sequence[int], answer_buckets: Sequence[int]) -> list[int]:
  """The pairs whose prompt and answers fit a bucket each; the others are left out, never cut."""
  check_buckets(answer_buckets)
  lengths = zip(tokens.prompts, tokens.longest, strict=True)
  return [
    i
    for i, (prompt, answer) in enumerate(lengths)
    if len(prompt) <= max(buckets) and len(answer) <= max(answer_buckets)
  ]


def batch_of(
  tokens: PairTokens, chosen: Sequence[int], sample_id: Int[np.ndarray, "B"], lengths: tuple[int, int], pad_id: int
) -> PairBatch:
  """The chosen pairs, with prompts and answers padded to `lengths`."""
  prompt, valid = pad_left([tokens.prompts[i] for i in chosen], lengths[0], pad_id)
  sides = (tokens.chosen, tokens.rejected)
  answers = np.stack([pad_right(side, chosen, lengths[1], pad_id) for side in sides], axis=1)
  length = np.asarray([[len(side[i]) for side in sides] for i in chosen], np.int32)
  return PairBatch(sample_id, prompt, valid, answers, length)


def pair_batches(
  tokens: PairTokens,
  *,
  seed: int,
  batch_size: int,
  buckets: Sequence[int],
  answer_buckets: Sequence[int],
  pad_id: int,
  position: int = 0,
) -> Iterator[PairBatch]:
  """An endless stream of pairs, from batch `position` on, in the order of `d1jax.data.sft_batches.sft_batches`.

  The arguments are those of `sft_batches`; pairs that fit no buckets are left out.
  """

  def assemble(first: int, chosen: Sequence[int], width: int) -> PairBatch:
    longest = bucket_for(max(len(tokens.prompts[i]) for i in chosen), buckets) or max(buckets)
    return batch_of(tokens, chosen, first + np.arange(len(chosen), dtype=np.int32), (longest, width), pad_id)

  longest: Sequence[Ids] = tokens.longest
  return in_buckets(
    tokens.prompts,
    longest,
    assemble,
    seed=seed,
    batch_size=batch_size,
    buckets=buckets,
    completion_buckets=answer_buckets,
    position=position,
  )
