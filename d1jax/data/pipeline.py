"""Deterministic, resumable batches of prompts, with Grain.

Every process walks the same global order and builds the same global batch (text is small); each device then takes its
rows of it. So the order does not depend on the number of processes, and the data position is one number, the index of
the next batch.
"""

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from d1jax.errors import extra

Ids = Sequence[int]


class PromptBatch(NamedTuple):
  """Prompts ready for a rollout, each repeated for its group. `record` says which record a row came from."""

  sample_id: Int[np.ndarray, "B"]
  group_id: Int[np.ndarray, "B"]
  prompt: Int[np.ndarray, "B P"]
  prompt_valid: Bool[np.ndarray, "B P"]
  record: Int[np.ndarray, "B"]

  @property
  def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(prompt, prompt_valid, sample_id, group_id), as `sample` takes them."""
    return self.prompt, self.prompt_valid, self.sample_id, self.group_id


class Part(NamedTuple):
  """Records of one task in a mix. A part with weight 2 is drawn from twice as often as one with weight 1, whatever the
  number of its records.
  """

  chosen: Sequence[int]
  weight: float


def bucket_for(length: int, buckets: Sequence[int]) -> int | None:
  """The smallest bucket that holds `length` tokens; None if no bucket does."""
  return min((b for b in buckets if b >= length), default=None)


def fitting(prompts: Sequence[Ids], buckets: Sequence[int]) -> list[int]:
  """Indices of the prompts that fit the largest bucket; the others are left out, never cut."""
  return [i for i, ids in enumerate(prompts) if len(ids) <= max(buckets)]


def pad_left(rows: Sequence[Ids], width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
  """(tokens[B width], valid[B width]) with padding on the left."""
  tokens = np.full((len(rows), width), pad_id, np.int32)
  valid = np.zeros((len(rows), width), bool)
  for row, ids in enumerate(rows):
    tokens[row, width - len(ids) :] = ids
    valid[row, width - len(ids) :] = True
  return tokens, valid


def prompt_batch(
  prompts: Sequence[Ids],
  chosen: Sequence[int],
  first: int,
  num_generations: int,
  buckets: Sequence[int],
  pad_id: int,
) -> PromptBatch:
  """Lays out the chosen prompts, each `num_generations` times in a row, in the smallest bucket that holds them all.

  `first` is the sample id of the first row; the others count on. For the other arguments see `prompt_batches`.
  """
  width = bucket_for(max(len(prompts[i]) for i in chosen), buckets)
  if width is None:
    raise ValueError(
      f"a prompt is longer than the largest bucket {max(buckets)}: add a longer bucket, or leave the prompt out"
    )
  record = np.repeat(np.asarray(chosen, np.int32), num_generations)
  sample_id = first + np.arange(record.size, dtype=np.int32)
  tokens, valid = pad_left([prompts[int(i)] for i in record], width, pad_id)
  return PromptBatch(sample_id, sample_id // num_generations, tokens, valid, record)


def import_grain() -> ModuleType:
  """Imports Grain when a stream begins, because sampling and evaluation do not need it.

  Raises:
    RunError: it is not installed; the message names the extra that brings it.
  """
  with extra("train"):
    import grain
  return grain


def _order(parts: Sequence[Part], *, seed: int, batch_size: int) -> Any:
  """An endless Grain dataset of batches of record indices, each part reshuffled every epoch; batch k is a function of
  (seed, k).
  """
  grain = import_grain()
  streams = [grain.MapDataset.source(list(part.chosen)).seed(seed).shuffle().repeat() for part in parts]
  mixed = grain.MapDataset.mix(streams, [part.weight for part in parts]) if len(parts) > 1 else streams[0]
  return mixed.batch(batch_size, drop_remainder=True)


def start(dataset: Any, position: int) -> Iterator[Any]:
  """Iterates a Grain dataset from element `position` on, reading a little ahead on a thread."""
  grain = import_grain()
  iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
  iterator.set_state({"next_index": position})
  return iterator


def prompt_batches(
  prompts: Sequence[Ids],
  *,
  seed: int,
  prompts_per_batch: int,
  num_generations: int,
  buckets: Sequence[int],
  pad_id: int,
  position: int = 0,
  parts: Sequence[Part] = (),
) -> Iterator[PromptBatch]:
  """An endless stream of prompt batches, from batch `position` on. Prompts that fit no bucket are left out.

  If there are several parts, each keeps the order that it would have alone. They alternate as evenly as their weights
  allow, by a rule and not by chance: with weights 2 and 1 the parts come as 0 0 1 or a rotation of it, again and again.
  Weights are rounded to hundredths of the smallest one.

  Args:
    prompts: token ids of every record.
    seed: the seed of the order.
    prompts_per_batch: groups a batch.
    num_generations: completions a group.
    buckets: allowed prompt lengths.
    pad_id: fills the left.
    position: the batch to start at.
    parts: disjoint parts of the records to mix; without any, all records are one part.
  """
  usable = set(fitting(prompts, buckets))
  parts = parts or [Part(range(len(prompts)), 1.0)]
  order = _order(
    [part._replace(chosen=[i for i in part.chosen if i in usable]) for part in parts],
    seed=seed,
    batch_size=prompts_per_batch,
  )

  def assemble(index: int, chosen: np.ndarray) -> PromptBatch:
    first = index * prompts_per_batch * num_generations
    return prompt_batch(prompts, [int(i) for i in chosen], first, num_generations, buckets, pad_id)

  return start(order.map_with_index(assemble), position)
