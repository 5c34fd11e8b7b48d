"""The prompts of a split: what is asked, in batches, and the grades of what comes back."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from d1jax.data import pipeline
from d1jax.data.pipeline import PromptBatch
from d1jax.data.sft_batches import SftBatch, sft_batches
from d1jax.data.tokenizer import Tokenizer
from d1jax.diffusion.rollout import Rollout
from d1jax.rl.grading import Graded, graded_texts
from d1jax.tasks import Mixture, Record, Task, checked


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Records of one split with their tokenised prompts and the given starts of their answers, which end the prompts.

  Attributes:
    task: asks and grades.
    tokenizer: the tokenizer of the ids.
    records: those whose prompts fit a bucket.
    ids: the ids of each prompt.
    prefills: the given start of each answer.
    buckets: the lengths that batches are padded to.
    style: the prompt style.
    left_out: how many records fit none.
  """

  task: Task
  tokenizer: Tokenizer
  records: Sequence[Record]
  ids: Sequence[Sequence[int]]
  prefills: Sequence[str]
  buckets: tuple[int, ...]
  style: str
  left_out: int = 0

  @classmethod
  def of(
    cls,
    task: Task,
    tokenizer: Tokenizer,
    split: str = "train",
    *,
    style: str = "d1",
    buckets: Sequence[int] = (),
    prefill: str | None = None,
  ) -> "Prompts":
    """The prompts of a split; those that fit no bucket are left out and counted.

    Args:
      task: `d1jax.tasks.build("sudoku")`, or an object of yours that keeps the contract of `d1jax.tasks.Task`.
      tokenizer: the tokenizer of the model.
      split: one of the task's `splits`.
      style: the prompt style, one of the task's: `d1`, or `terse`.
      buckets: the lengths that batches are padded to, each of which is compiled; none: the longest prompt's.
      prefill: how answers start; None: as the style has it.

    Raises:
      ValueError: the split is empty, or every prompt is longer than the buckets.
    """
    records = list(task.records(split))
    if not records:
      raise ValueError(f"the split {split} holds no question")
    asked = [task.prompt(record, style) for record in records]
    prefills = [given if prefill is None else prefill for _, given in asked]
    ids = [tokenizer.prompt(turns, start) for (turns, _), start in zip(asked, prefills, strict=True)]
    buckets = tuple(buckets) or (max(map(len, ids)),)
    keep = pipeline.fitting(ids, buckets)
    if not keep:
      raise ValueError(
        f"every {split} prompt is longer than buckets={buckets}, the shortest {min(map(len, ids))}: raise it"
      )
    return cls(
      task,
      tokenizer,
      [records[i] for i in keep],
      [ids[i] for i in keep],
      [prefills[i] for i in keep],
      buckets,
      style,
      len(records) - len(keep),
    )

  def batches(self, *, prompts: int, num_generations: int, seed: int = 0, position: int = 0) -> Iterator[PromptBatch]:
    """An endless stream of batches; batch k is a function of the seed and k.

    Args:
      prompts: groups a batch.
      num_generations: completions of each prompt, which are consecutive rows.
      seed: the seed of the order.
      position: the batch to start at.
    """
    parts = [pipeline.Part(*part) for part in self.task.parts(self.records)] if isinstance(self.task, Mixture) else []
    return pipeline.prompt_batches(
      self.ids,
      seed=seed,
      prompts_per_batch=prompts,
      num_generations=num_generations,
      buckets=self.buckets,
      pad_id=self.tokenizer.pad_id,
      position=position,
      parts=parts,
    )

  def demonstrations(self, *, batch_size: int, seed: int = 0, position: int = 0) -> Iterator[SftBatch]:
    """An endless stream of prompts with the task's own answers, to be fine-tuned on; batch k is a function of the seed
    and k.

    Args:
      batch_size: demonstrations a batch.
      seed: the seed of the order.
      position: the batch to start at.
    """
    answers = [self.tokenizer.completion(self.task.demonstration(record, self.style)) for record in self.records]
    return sft_batches(
      self.ids,
      answers,
      seed=seed,
      batch_size=batch_size,
      buckets=self.buckets,
      completion_buckets=(max(map(len, answers)),),
      pad_id=self.tokenizer.pad_id,
      position=position,
    )

  def grade(self, batch: PromptBatch, rollout: Rollout, protocol: str = "strict") -> Graded:
    """Decodes and grades the completions of a batch, on this host.

    Args:
      batch: what was asked.
      rollout: what came back, on devices or on the host.
      protocol: `strict`, or `d1` to grade as d1's code does.

    Returns:
      Texts, grades and rewards[B].

    Raises:
      TaskError: the task does not keep its contract.
    """
    completion, mask = np.asarray(rollout.completion), np.asarray(rollout.completion_mask)
    prefills = [self.prefills[i] for i in batch.record]
    texts = graded_texts(self.tokenizer, prefills, completion, mask, protocol)
    grades = [
      checked.grade(self.task, text, self.records[i], protocol) for text, i in zip(texts, batch.record, strict=True)
    ]
    return Graded(texts, grades, np.asarray([grade.reward for grade in grades], np.float32))
