"""Packed batches: several demonstrations share a row, so that short ones waste no padding.

All rows of a run have one width. A pass over the data is one epoch: its demonstrations come in a shuffled order, and
each goes into the first open row that has room for it, whole. So the layout of a pass follows from (seed, number of the
pass) alone, and the data position is one number, the index of the next batch. How many batches a pass has depends on
its order: a process that starts in the middle lays out the passes before it once, but makes none of their batches.
"""

import bisect
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from d1jax.data.pipeline import Ids, import_grain, start

OPEN = 64
"""Rows that take demonstrations at a time: the search for one with room is short, however long the pass is."""

MOST = 128
"""Demonstrations of a row, at most: draws are made for so many."""


class PackedBatch(NamedTuple):
  """Rows of several demonstrations.

  Attributes:
    sample_id: the record of each demonstration of a row; -1 behind the last one.
    tokens: ids; padding at the end of a row.
    segment: 1 at the tokens of the first demonstration, 2 at those of the second, ...; 0 at padding.
    answer: true from the first token of an answer to its end; with blocks to the end of its last block.
  """

  sample_id: Int[np.ndarray, "B M"]
  tokens: Int[np.ndarray, "B L"]
  segment: Int[np.ndarray, "B L"]
  answer: Bool[np.ndarray, "B L"]

  @property
  def lengths(self) -> tuple[int, int]:
    """0 and the width of the rows, because prompts and answers share them."""
    return 0, self.tokens.shape[1]


def row_shape(buckets: Sequence[int], completion_buckets: Sequence[int], block: int | None) -> tuple[int, int]:
  """The width of packed rows, L, and how many demonstrations a row takes, M.

  A demonstration fits if prompt and answer together are not longer than a row, whatever bucket each would need alone.
  The arguments are those of `Packer`.
  """
  size = block or 1
  width = -(-(max(buckets) + max(completion_buckets)) // size) * size
  return width, min(MOST, max(1, width // max(size, 2)))


class Packer:
  """Puts demonstrations into rows.

  Attributes:
    records: the indices of the demonstrations that fit a row; the others are left out.
    width: of a row.
    documents: how many demonstrations a row takes.
  """

  def __init__(
    self,
    prompts: Sequence[Ids],
    completions: Sequence[Ids],
    *,
    buckets: Sequence[int],
    completion_buckets: Sequence[int],
    block: int | None,
    pad_id: int,
  ):
    """Measures the demonstrations.

    Args:
      prompts: token ids of every record; one without a token is left out, because nothing would predict its answer.
      completions: token ids of the answers, stop id included.
      buckets: allowed prompt lengths.
      completion_buckets: allowed completion lengths.
      block: of a block-causal network: demonstrations begin at its multiples; None: anywhere.
      pad_id: the end-of-sequence token, which fills the last block of an answer.

    Raises:
      ValueError: no demonstration fits.
    """
    self.width, self.documents = row_shape(buckets, completion_buckets, block)
    self._prompts, self._completions, self._pad_id, size = prompts, completions, pad_id, block or 1
    pairs = enumerate(zip(prompts, completions, strict=True))
    self._lengths = {
      record: -(-(len(prompt) + len(answer)) // size) * size
      for record, (prompt, answer) in pairs
      if prompt and answer and len(prompt) + len(answer) <= self.width
    }
    self.records = list(self._lengths)
    if not self.records:
      raise ValueError(
        f"none of {len(prompts)} demonstrations fits a row of {self.width} tokens: raise the largest prompt or"
        " completion bucket"
      )

  def rows(self, order: Sequence[int]) -> list[list[int]]:
    """The records of each row; each record in turn goes into the first open row that has room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for record in order:
      length = self._lengths[record]
      opened = range(max(0, len(rows) - OPEN), len(rows))
      place = next((i for i in opened if room[i] >= length and len(rows[i]) < self.documents), len(rows))
      if place == len(rows):
        rows.append([])
        room.append(self.width)
      rows[place].append(record)
      room[place] -= length
    return rows

  def batch(self, rows: Sequence[Sequence[int]], batch_size: int) -> PackedBatch:
    """The arrays of some rows; if there are fewer than a batch has, the others are padding."""
    canvas = (batch_size, self.width)
    found = PackedBatch(
      np.full((batch_size, self.documents), -1, np.int32),
      np.full(canvas, self._pad_id, np.int32),
      np.zeros(canvas, np.int32),
      np.zeros(canvas, bool),
    )
    for row, records in enumerate(rows):
      first = 0
      for place, record in enumerate(records):
        prompt, answer, end = self._prompts[record], self._completions[record], first + self._lengths[record]
        begin = first + len(prompt)
        found.sample_id[row, place] = record
        found.tokens[row, first:begin], found.tokens[row, begin : begin + len(answer)] = prompt, answer
        found.segment[row, first:end], found.answer[row, begin:end] = place + 1, True
        first = end
    return found

  def padding(self) -> tuple[int, int]:
    """(tokens used, tokens computed) of a pass in the records' own order; other orders differ by a few rows."""
    used = sum(len(self._prompts[record]) + len(self._completions[record]) for record in self.records)
    return used, len(self.rows(self.records)) * self.width


def packed_batches(packer: Packer, *, seed: int, batch_size: int, position: int = 0) -> Iterator[PackedBatch]:
  """An endless stream of packed batches, from batch `position` on.

  Each pass has every record once. Its rows are dealt out to as few batches as hold them, like cards, so that these have
  equally many rows, up to one; what a batch lacks is padding.
  `seed` is that of the order, and `batch_size` counts the rows of a batch.
  """
  grain, count = import_grain(), len(packer.records)
  order = grain.MapDataset.source(packer.records).seed(seed).shuffle().repeat()
  firsts = [0]  # the first batch of each pass, as far as they are known

  @functools.lru_cache(maxsize=1)
  def rows_of(number: int) -> list[list[int]]:
    return packer.rows([order[i] for i in range(number * count, (number + 1) * count)])

  def assemble(index: int, _: int) -> PackedBatch:
    while firsts[-1] <= index:
      firsts.append(firsts[-1] + -(-len(rows_of(len(firsts) - 1)) // batch_size))
    number = bisect.bisect_right(firsts, index) - 1
    first, end = firsts[number : number + 2]
    return packer.batch(rows_of(number)[index - first :: end - first], batch_size)

  return start(grain.MapDataset.range(1).repeat().map_with_index(assemble), position)
