"""The host's visit between two compiled programs: decode, grade, nothing else."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from d1jax.data.tokenizer import Tokenizer
from d1jax.tasks.base import Grade, Record, Task


class Graded(NamedTuple):
  """What a batch of completions says and earns."""

  texts: list[str]
  grades: list[Grade]
  rewards: Float[np.ndarray, "B"]


def decode(tokenizer: Tokenizer, completion: Int[np.ndarray, "B C"], mask: Bool[np.ndarray, "B C"]) -> list[str]:
  """The texts of completions where `mask` is true: up to their stop id."""
  return tokenizer.decode_all([row[keep].tolist() for row, keep in zip(completion, mask, strict=True)])


def grade(
  task: Task,
  tokenizer: Tokenizer,
  records: Sequence[Record],
  prefills: Sequence[str],
  completion: Any,
  completion_mask: Any,
  protocol: str = "strict",
) -> Graded:
  """Decodes and grades a batch; a row's reward is the sum of its grade's components.

  Args:
    task: the grader.
    tokenizer: of the ids.
    records: one a row.
    prefills: the given start of each answer, part of what is graded.
    completion: token ids [B C].
    completion_mask: [B C], true up to and including the stop id.
    protocol: of the task's grader. `d1` sees what lies behind the stop id too, as d1's rewards do.
  """
  seen = np.ones_like(completion_mask) if protocol == "d1" else np.asarray(completion_mask)
  texts = decode(tokenizer, np.asarray(completion), seen)
  texts = [prefill + text for prefill, text in zip(prefills, texts, strict=True)]
  grades = [task.grade(text, record, protocol) for text, record in zip(texts, records, strict=True)]
  return Graded(texts, grades, np.asarray([g.reward for g in grades], np.float32))
