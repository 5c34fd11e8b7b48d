"""Deterministic, resumable batches of demonstrations, each of one length, with Grain.

If all demonstrations were padded to one length, each would cost as much as the longest. Here a batch holds rows that
fit one pair of prompt and completion bucket. A pass over the data is a fixed number of batches, and its contents follow
from (seed, number of the pass) alone, so that the data position is one number, the index of the next batch. A process
that starts in the middle computes the layout of one pass, never that of the passes before it.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Int

from d1jax.data.pipeline import Ids, bucket_for, import_grain, prompt_batch, start

T = TypeVar("T")


class SftBatch(NamedTuple):
  """Demonstrations; the completion is padded with the end-of-sequence token, which is part of what is learned."""

  sample_id: Int[np.ndarray, "B"]
  prompt: Int[np.ndarray, "B P"]
  prompt_valid: Bool[np.ndarray, "B P"]
  completion: Int[np.ndarray, "B C"]

  @property
  def lengths(self) -> tuple[int, int]:
    """The lengths of prompts and completions, P and C."""
    return self.prompt.shape[1], self.completion.shape[1]


def _cut(completions: Sequence[Ids], buckets: Sequence[int], truncate: bool) -> Sequence[Ids]:
  check_buckets(buckets)
  return [ids[: buckets[-1]] for ids in completions] if truncate else completions


def check_buckets(buckets: Sequence[int]) -> None:
  """Raises a ValueError if completion buckets do not ascend."""
  if not buckets or min(buckets) < 1 or list(buckets) != sorted(set(buckets)):
    raise ValueError(f"completion_buckets={tuple(buckets)}: give one or more lengths of at least 1, ascending")


def _pairs(
  prompts: Sequence[Ids], completions: Sequence[Ids], prompt_buckets: Sequence[int], completion_buckets: Sequence[int]
) -> dict[int, tuple[int, int]]:
  """The smallest (prompt bucket, completion bucket) of every record that fits one."""
  pairs = {}
  for record, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
    pair = bucket_for(len(prompt), prompt_buckets), bucket_for(len(completion), completion_buckets)
    if pair[0] is not None and pair[1] is not None:
      pairs[record] = pair[0], pair[1]
  return pairs


def _batches_of_pass(
  records: Sequence[int], pairs: Mapping[int, tuple[int, int]], batch_size: int
) -> list[Sequence[int]]:
  """Cuts the records of a pass, a multiple of the batch size, into batches of one pair of buckets each.

  Rows that do not fill a batch of their pair share one with the leftovers of the next pairs: of the larger prompt
  buckets with the same completion bucket, then of the next completion bucket. With batches of 4, and pairs of 5, 6 and
  1 rows in this order, there are two full batches (4 rows of the first pair, 4 of the second), and the last batch holds
  the leftovers 1 + 2 + 1, padded to the buckets of the longest of them.
  """
  bins: dict[tuple[int, int], list[int]] = defaultdict(list)
  for record in records:
    bins[pairs[record]].append(record)
  whole, leftovers = [], []
  for pair in sorted(bins, key=lambda pair: (pair[1], pair[0])):
    rows = bins[pair]
    full = len(rows) - len(rows) % batch_size
    whole += rows[:full]
    leftovers += rows[full:]
  ordered = whole + leftovers
  return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]


def sft_batches(
  prompts: Sequence[Ids],
  completions: Sequence[Ids],
  *,
  seed: int,
  batch_size: int,
  buckets: Sequence[int],
  completion_buckets: Sequence[int],
  pad_id: int,
  truncate: bool = False,
  position: int = 0,
) -> Iterator[SftBatch]:
  """An endless stream of demonstrations, from batch `position` on. Prompts that fit no bucket are left out.

  Rows come in a shuffled order, a new one every epoch. A pass is the next `max(1, rows // batch_size)` batches of this
  order: each batch has the smallest buckets that hold its rows, and the batches of a pass are shuffled. Rows that do
  not fill a batch of their own buckets share a batch with larger buckets; rows that do not fill a batch at the end of
  an epoch start the next pass. So no row is lost. If there are fewer rows than a batch has, rows are repeated in it.
  With one bucket of each kind the batches keep the rows' order.

  Args:
    prompts: token ids of every record.
    completions: token ids of the answers, stop id included; padded with `pad_id` to their bucket.
    seed: the seed of the order.
    batch_size: rows a batch.
    buckets: allowed prompt lengths.
    completion_buckets: allowed completion lengths, ascending.
    pad_id: the end-of-sequence token.
    truncate: True cuts completions beyond the largest bucket at the right, so that they have no stop id, as d1 does;
      False leaves them out.
    position: the batch to start at.

  Raises:
    ValueError: the completion buckets do not ascend, or no demonstration fits.
  """
  answers = _cut(completions, completion_buckets, truncate)

  def assemble(first: int, chosen: Sequence[int], width: int) -> SftBatch:
    side = prompt_batch(prompts, chosen, first, 1, buckets, pad_id)
    return SftBatch(side.sample_id, side.prompt, side.prompt_valid, pad_right(answers, chosen, width, pad_id))

  return in_buckets(
    prompts,
    answers,
    assemble,
    seed=seed,
    batch_size=batch_size,
    buckets=buckets,
    completion_buckets=completion_buckets,
    position=position,
  )


def pad_right(rows: Sequence[Ids], chosen: Sequence[int], width: int, pad_id: int) -> Int[np.ndarray, "B width"]:
  """The chosen rows with padding on the right."""
  tokens = np.full((len(chosen), width), pad_id, np.int32)
  for row, record in enumerate(chosen):
    tokens[row, : len(rows[record])] = rows[record]
  return tokens


def in_buckets(
  prompts: Sequence[Ids],
  answers: Sequence[Ids],
  assemble: Callable[[int, Sequence[int], int], T],
  *,
  seed: int,
  batch_size: int,
  buckets: Sequence[int],
  completion_buckets: Sequence[int],
  position: int,
) -> Iterator[T]:
  """The stream of `sft_batches`, whose batches are made by `assemble(first sample id, records, completion bucket)`.

  `answers` say how long each record is: of records with several answers it is the longest one.
  """
  pairs = _pairs(prompts, answers, buckets, completion_buckets)
  if not pairs:
    raise ValueError(
      f"none of {len(prompts)} demonstrations fits prompts of {max(buckets)} and completions of"
      f" {completion_buckets[-1]} tokens: raise the largest prompt or completion bucket"
    )
  per_pass = max(1, len(pairs) // batch_size)
  grain = import_grain()
  rows = grain.MapDataset.source(list(pairs)).seed(seed).shuffle().repeat()
  places = grain.MapDataset.range(per_pass)
  if len(buckets) * len(completion_buckets) > 1:
    places = places.shuffle(seed=seed % 2**32)

  @functools.lru_cache(maxsize=1)
  def laid_out(number: int) -> list[Sequence[int]]:
    drawn = range(number * per_pass * batch_size, (number + 1) * per_pass * batch_size)
    return _batches_of_pass([rows[i] for i in drawn], pairs, batch_size)

  def one(index: int, place: int) -> T:
    chosen = laid_out(index // per_pass)[place]
    return assemble(index * batch_size, chosen, max(pairs[record][1] for record in chosen))

  return start(places.repeat().map_with_index(one), position)


def padding(
  prompts: Sequence[Ids],
  completions: Sequence[Ids],
  prompt_buckets: Sequence[int],
  completion_buckets: Sequence[int],
  *,
  truncate: bool = False,
) -> tuple[int, int]:
  """(tokens used, tokens computed) of one pass over the demonstrations that fit, each in its own pair of buckets.

  Tokens used are those of prompts and completions; tokens computed are the sizes of their buckets. The few rows that
  share a batch of larger buckets compute a little more.
  The arguments are those of `sft_batches`; tokens that are cut off do not count.

  Raises:
    ValueError: the completion buckets do not ascend.
  """
  answers = _cut(completions, completion_buckets, truncate)
  pairs = _pairs(prompts, answers, prompt_buckets, completion_buckets)
  used = sum(len(prompts[record]) + len(answers[record]) for record in pairs)
  return used, sum(prompt + completion for prompt, completion in pairs.values())
