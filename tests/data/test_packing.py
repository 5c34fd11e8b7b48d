import itertools
from collections import Counter

import numpy as np
import pytest

from d1jax.data import packing
from d1jax.data.packing import Packer, packed_batches, row_shape

PAD, COUNT = 0, 37
PROMPTS = [[100 + i] * (1 + i % 6) for i in range(COUNT)]
COMPLETIONS = [[200 + i] * (1 + i % 4) + [PAD] for i in range(COUNT)]
BLOCKS = pytest.mark.parametrize("block", [None, 4])


def packer(block=None, **changes):
  settings = dict(prompts=PROMPTS, completions=COMPLETIONS, buckets=(4, 6), completion_buckets=(3, 9), pad_id=PAD)
  return Packer(block=block, **(settings | changes))


def take(count, position=0, block=None, seed=7, batch_size=3, **changes):
  stream = packed_batches(packer(block, **changes), seed=seed, batch_size=batch_size, position=position)
  return list(itertools.islice(stream, count))


def records_of(batch):
  return batch.sample_id[batch.sample_id >= 0].tolist()


def per_pass(batches):
  """The number of batches after which all records came once."""
  return next(n for n in range(1, len(batches) + 1) if sum(len(records_of(b)) for b in batches[:n]) == COUNT)


@BLOCKS
def test_nothing_is_lost_or_split_and_nothing_comes_twice(block):
  size = block or 1
  for batch in take(12, block=block):
    assert batch.tokens.shape == batch.segment.shape == batch.answer.shape == (3, 15 if block is None else 16)
    assert [x.dtype for x in batch] == [np.int32, np.int32, np.int32, bool]
    for ids, tokens, segment, answer in zip(*batch, strict=True):
      placed = ids[ids >= 0]
      assert (ids[len(placed) :] == -1).all()
      assert set(segment) - {0} == set(range(1, len(placed) + 1))
      assert (tokens[segment == 0] == PAD).all()
      for number, record in enumerate(placed, 1):
        (where,) = np.nonzero(segment == number)
        assert where[0] % size == 0, "a document begins with a block"
        assert len(where) % size == 0
        assert (np.diff(where) == 1).all()
        prompt, expected = PROMPTS[record], COMPLETIONS[record]
        assert len(where) - len(prompt) - len(expected) < size
        assert tokens[where].tolist() == (prompt + expected + [PAD] * size)[: len(where)]
        assert answer[where].tolist() == [False] * len(prompt) + [True] * (len(where) - len(prompt))
      assert not answer[segment == 0].any()
  batches = take(60, block=block)
  first = per_pass(batches)
  second = first + per_pass(batches[first:])
  passes = [[r for b in part for r in records_of(b)] for part in (batches[:first], batches[first:second])]
  assert all(sorted(one) == list(range(COUNT)) for one in passes)
  assert passes[0] != passes[1]


@BLOCKS
@pytest.mark.parametrize("position", [1, 2, 3, 5, 29])
def test_starting_at_a_position_is_walking_there(block, position):
  for a, b in zip(take(3, position, block), take(position + 3, block=block)[position:], strict=True):
    for x, y in zip(a, b, strict=True):
      np.testing.assert_array_equal(x, y)


def test_the_order_is_a_function_of_the_seed():
  first, again, other = ([records_of(b) for b in take(4, seed=seed)] for seed in (7, 7, 8))
  assert first == again
  assert first != other


def test_batches_of_a_pass_have_as_many_rows_as_the_others_up_to_one():
  batches = take(60, batch_size=4)
  filled = [int((b.segment > 0).any(axis=1).sum()) for b in batches[: per_pass(batches)]]
  assert max(filled) - min(filled) <= 1
  assert min(filled) > 0


def test_a_record_goes_into_the_first_open_row_with_room(monkeypatch):
  lengths = [9, 4, 8, 5, 3, 9, 2]
  made = packer(prompts=[[1]] * 7, completions=[[2] * (n - 1) for n in lengths], buckets=(1,), completion_buckets=(9,))
  assert (made.width, made.documents) == (10, 5)
  assert made.rows(range(7)) == [[0], [1, 3], [2, 6], [4], [5]]
  monkeypatch.setattr(packing, "OPEN", 2)
  assert made.rows(range(7)) == [[0], [1, 3], [2], [4, 6], [5]]
  made.documents = 1
  assert made.rows(range(7)) == [[i] for i in range(7)]


@pytest.mark.parametrize(
  ("block", "expected"), [(None, (15, 7)), (1, (15, 7)), (4, (16, 4)), (16, (16, 1)), (64, (64, 1))]
)
def test_a_row_holds_the_longest_demonstration(block, expected):
  assert row_shape((4, 6), (3, 9), block) == expected


def test_what_does_not_fit_a_row_is_left_out():
  """A short prompt leaves room for an answer that is longer than its bucket."""
  seen = Counter(r for b in take(40, buckets=(3,), completion_buckets=(2, 4)) for r in records_of(b))
  assert set(seen) == {i for i in range(COUNT) if len(PROMPTS[i]) + len(COMPLETIONS[i]) <= 7}
  assert any(len(COMPLETIONS[i]) > 4 for i in seen)
  assert packer(prompts=[[], [1]], completions=[[2], [2]]).records == [1]
  with pytest.raises(ValueError, match=r"none of 37 demonstrations fits a row of 2 tokens: raise the largest"):
    packer(buckets=(1,), completion_buckets=(1,))


@BLOCKS
def test_padding_counts_tokens_and_rows(block):
  used, computed = packer(block).padding()
  assert used == sum(map(len, PROMPTS)) + sum(map(len, COMPLETIONS))
  assert computed % packer(block).width == 0
  assert used <= computed < 1.6 * used
