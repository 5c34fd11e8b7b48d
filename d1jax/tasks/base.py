"""The interface of a task: records, prompts, demonstrations, grades. A new task is one new file here."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from d1jax.errors import RunError

Record = Mapping[str, Any]
Message = dict[str, str]
"""One chat turn: `{"role": "user", "content": ...}`."""


class DataError(ValueError):
  """Input data that cannot be used; the message names the file, the line and the remedy."""


class TaskError(DataError, RunError):
  """A task that breaks its contract; the message is one line that names the task, the call and the text.

  It ends a run like any wrong input, also in the middle of training.
  """


@dataclasses.dataclass(frozen=True)
class Grade:
  """The rewards and metrics of one completion.

  Attributes:
    components: named rewards, finite; the reward of a completion is their sum.
    metrics: named (numerator, denominator) pairs, pooled over a split by adding both; 0 <= numerator <= denominator.
      `solved` must be among those of `strict`, with a positive denominator: validation chooses checkpoints by it.
    answer: the answer that was read from the text, in a normal form (equal answers are equal texts); several samples of
      one question vote by it. None if there is no answer.
  """

  components: Mapping[str, float]
  metrics: Mapping[str, tuple[int | float, int | float]]
  answer: str | None = None

  @property
  def reward(self) -> float:
    """The sum of the components."""
    return sum(self.components.values())


@runtime_checkable
class Task(Protocol):
  """A family of problems with a verifiable answer; pure Python, deterministic, total."""

  name: str
  splits: Sequence[str]

  def records(self, split: str) -> Sequence[Record]:
    """Return the records of one split, always the same.

    Splits: `demonstrations` (for supervised fine-tuning), `train`, `validation`, `test`.
    """
    ...

  def prompt(self, record: Record, style: str) -> tuple[list[Message], str]:
    """Return the chat messages and the text that the completion starts with (often empty).

    Styles: `d1` is d1's training prompt to the letter, `d1_eval` that of its evaluation (whose answers start with
    `<reasoning>`), `terse` a few tokens for small models.
    """
    ...

  def demonstration(self, record: Record, style: str) -> str:
    """Write a correct completion, the target of supervised fine-tuning."""
    ...

  def baseline(self, record: Record, style: str) -> str:
    """Write the completion of a model that knows nothing but the format."""
    ...

  def cluster(self, record: Record) -> str:
    """Name the cluster: records that share one are not independent; intervals resample clusters."""
    ...

  def grade(self, text: str, record: Record, protocol: str = "strict") -> Grade:
    """Grade a completion; any string gets a finite score, nothing raises or is executed.

    Protocols: `strict` rewards correct answers; `d1` gives d1's RL rewards to the letter, one component for each of its
    functions. Both have the metrics of `strict`, so that runs can be compared; `d1` adds `d1_accuracy`, the verdict of
    d1's evaluation. An unknown protocol is a ValueError.
    """
    ...
