import itertools
from collections import Counter

import numpy as np
import pytest

from d1jax.data.pipeline import bucket_for
from d1jax.data.sft_batches import padding, sft_batches

PAD = 0
PROMPTS = [[10 + i] * (1 + i % 6) for i in range(23)]
COMPLETIONS = [[50 + i] * (1 + i % 4) + [PAD] for i in range(23)]
BUCKETS, COMPLETION_BUCKETS = (2, 4, 6), (2, 3, 5)
PER_PASS = 23 // 5


def stream(position=0, **changes):
  settings = dict(
    prompts=PROMPTS,
    completions=COMPLETIONS,
    seed=7,
    batch_size=5,
    buckets=BUCKETS,
    completion_buckets=COMPLETION_BUCKETS,
    pad_id=PAD,
    position=position,
  )
  return sft_batches(**(settings | changes))


def take(batches, count):
  return list(itertools.islice(batches, count))


def records_of(batch):
  """The records of a batch: the last token of a prompt names its record."""
  return (batch.prompt[:, -1] - 10).tolist()


def drawn(batches):
  return [record for batch in batches for record in records_of(batch)]


def shape(batch):
  return batch.prompt.shape[1], batch.completion.shape[1]


def rows_of(lengths):
  """Prompts and completions of the given (prompt, completion) lengths."""
  prompts = [[10 + i] * prompt for i, (prompt, _) in enumerate(lengths)]
  return {"prompts": prompts, "completions": [[7] * completion for _, completion in lengths]}


# Written down from the stream as it was before there were completion buckets: published runs depend on it.
FROZEN = {
  (23, 5, 7): [
    [7, 9, 0, 8, 14],
    [20, 17, 6, 10, 22],
    [3, 19, 5, 2, 4],
    [16, 21, 18, 11, 12],
    [15, 13, 1, 6, 12],
    [20, 13, 17, 14, 22],
  ],
  (23, 5, 8): [[5, 14, 10, 2, 17], [19, 9, 16, 22, 3], [20, 18, 0, 12, 13]],
  (12, 4, 0): [[1, 2, 11, 5], [9, 7, 10, 6], [0, 3, 8, 4], [9, 11, 1, 8]],
  (3, 5, 7): [[2, 1, 0, 1, 0], [2, 2, 0, 1, 2], [1, 0, 2, 0, 1]],
}


@pytest.mark.parametrize(("count", "batch_size", "seed"), FROZEN)
def test_one_bucket_of_each_kind_gives_the_order_of_published_runs(count, batch_size, seed):
  one = dict(buckets=(6,), completion_buckets=(5,), batch_size=batch_size, seed=seed)
  expected = FROZEN[count, batch_size, seed]
  batches = take(stream(prompts=PROMPTS[:count], completions=COMPLETIONS[:count], **one), len(expected))
  assert [records_of(batch) for batch in batches] == expected
  for k, batch in enumerate(batches):
    assert batch.sample_id.tolist() == list(range(batch_size * k, batch_size * (k + 1)))
    assert shape(batch) == (6, 5)


def test_rows_that_do_not_fit_are_left_out_before_the_order_of_published_runs():
  completions = [[50 + i] * (1 + i % 5) for i in range(23)]
  batches = take(stream(completions=completions, buckets=(6,), completion_buckets=(3,)), 3)
  assert [records_of(b) for b in batches] == [[11, 15, 0, 12, 22], [21, 17, 10, 16, 1], [5, 20, 7, 2, 6]]


def test_a_row_is_what_its_record_says_and_its_id_is_its_place_in_the_run():
  for k, batch in enumerate(take(stream(), 3 * PER_PASS)):
    assert batch.sample_id.tolist() == list(range(5 * k, 5 * k + 5))
    assert (batch.sample_id.dtype, batch.completion.dtype) == (np.int32, np.int32)
    for record, tokens, valid, answer in zip(
      records_of(batch), batch.prompt, batch.prompt_valid, batch.completion, strict=True
    ):
      expected = COMPLETIONS[record]
      assert tokens[valid].tolist() == PROMPTS[record]
      assert not valid[: (~valid).sum()].any(), "padding on the left"
      assert answer.tolist() == expected + [PAD] * (batch.completion.shape[1] - len(expected))


def test_a_batch_lies_in_the_smallest_buckets_that_hold_its_rows():
  batches = take(stream(), 5 * PER_PASS)
  for batch in batches:
    longest = [max(len(texts[i]) for i in records_of(batch)) for texts in (PROMPTS, COMPLETIONS)]
    assert shape(batch) == (bucket_for(longest[0], BUCKETS), bucket_for(longest[1], COMPLETION_BUCKETS))
  assert len({shape(batch) for batch in batches}) > 1


def test_only_what_fills_no_batch_of_its_buckets_moves_up():
  lengths = [(1, 2)] * 7 + [(1, 4)] * 6 + [(1, 8)] * 7
  rows = rows_of(lengths)
  batches = take(stream(**rows, buckets=(1,), completion_buckets=(2, 4, 8)), 12)
  for number in range(3):
    sizes = Counter(b.completion.shape[1] for b in batches[4 * number : 4 * number + 4])
    assert sizes == {2: 1, 4: 1, 8: 2}, "of 7, 6 and 7 rows one batch of 5 each; 2, 1 and 2 are left and share one"
    kinds = [{lengths[i] for i in records_of(b)} for b in batches[4 * number : 4 * number + 4]]
    assert sorted(map(len, kinds)) == [1, 1, 1, 3]


def test_rows_move_to_a_larger_prompt_bucket_before_a_larger_completion_bucket():
  rows = rows_of([(1, 2)] * 3 + [(4, 2)] * 2 + [(1, 8)] * 2 + [(4, 8)] * 3)
  batches = take(stream(**rows, buckets=(1, 4), completion_buckets=(2, 8)), 6)
  assert sorted(sorted(records_of(b)) for b in batches[:2]) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
  assert {shape(b) for b in batches} == {(4, 2), (4, 8)}


def test_every_pass_covers_all_records_once_where_batches_divide_them():
  batches = take(stream(prompts=PROMPTS[:20], completions=COMPLETIONS[:20]), 12)
  passes = [drawn(batches[start : start + 4]) for start in (0, 4, 8)]
  assert all(sorted(one) == list(range(20)) for one in passes)
  assert len({tuple(one) for one in passes}) == 3


def test_rows_that_fill_no_batch_of_an_epoch_start_the_next_pass():
  first = drawn(take(stream(), PER_PASS))
  assert len(set(first)) == 20
  missing = set(range(23)) - set(first)
  second = drawn(take(stream(PER_PASS), PER_PASS))
  assert missing <= set(second)
  batches = take(stream(), 23 * PER_PASS)  # 20 epochs of 23 rows
  assert Counter(drawn(batches)) == dict.fromkeys(range(23), 20)


def test_batches_come_in_an_order_of_their_own_every_pass():
  prompts = [[10 + i] for i in range(40)]
  completions = [[7] * (2 if i < 20 else 5) for i in range(40)]
  batches = take(stream(prompts=prompts, completions=completions, buckets=(1,), completion_buckets=(2, 5)), 10 * 8)
  orders = [tuple(shape(b)[1] for b in batches[8 * n : 8 * n + 8]) for n in range(10)]
  assert all(sorted(order) == [2] * 4 + [5] * 4 for order in orders)
  assert len(set(orders)) >= 8, "70 orders of sizes are possible"
  assert {order[0] for order in orders} == {2, 5}


@pytest.mark.few(3, reason="each case walks through an epoch again and again")
@pytest.mark.parametrize("position", [1, PER_PASS - 1, PER_PASS, PER_PASS + 1, 3 * PER_PASS, 17])
def test_starting_at_a_position_is_walking_there(position):
  walked = take(stream(), position + 6)[position:]
  for a, b in zip(take(stream(position), 6), walked, strict=True):
    for x, y in zip(a, b, strict=True):
      np.testing.assert_array_equal(x, y)


def test_a_late_start_draws_no_rows_of_earlier_passes():
  position = 10**7
  batch = next(stream(position))
  assert batch.sample_id.tolist() == list(range(5 * position, 5 * position + 5))


def test_the_order_is_a_function_of_the_seed():
  first, again, other = (drawn(take(stream(seed=seed), 8)) for seed in (7, 7, 8))
  assert first == again
  assert first != other


def test_fewer_rows_than_a_batch_come_again_in_it():
  batches = take(stream(prompts=PROMPTS[:2], completions=COMPLETIONS[:2]), 4)
  assert Counter(drawn(batches)) == {0: 10, 1: 10}


def test_long_completions_are_left_out_and_never_cut_by_default():
  seen = set(drawn(take(stream(completion_buckets=(2, 3)), 20)))
  assert seen == {i for i, completion in enumerate(COMPLETIONS) if len(completion) <= 3}


def test_truncated_completions_lose_their_end_and_its_stop_id():
  batches = take(stream(completion_buckets=(2, 3), truncate=True), 20)
  assert set(drawn(batches)) == set(range(23))
  for batch in batches:
    for record, answer in zip(records_of(batch), batch.completion, strict=True):
      text = [50 + record] * (1 + record % 4)
      assert answer.tolist() == (text + [PAD] * 3)[: len(answer)]
      assert (PAD in answer) == (len(text) < len(answer))
  assert max(b.completion.shape[1] for b in batches) == 3


@pytest.mark.parametrize("truncate", [False, True])
def test_prompts_beyond_the_buckets_are_left_out_and_never_cut(truncate):
  seen = set(drawn(take(stream(buckets=(2, 3), truncate=truncate), 20)))
  assert seen == {i for i, prompt in enumerate(PROMPTS) if len(prompt) <= 3}


def test_no_row_that_fits_is_an_error_at_once():
  with pytest.raises(ValueError, match=r"none of 23 demonstrations fits .* 6 .* 1 tokens: raise the largest"):
    stream(completion_buckets=(1,))
  with pytest.raises(ValueError, match=r"none of 0 demonstrations"):
    stream(prompts=[], completions=[])


@pytest.mark.parametrize("buckets", [(), (3, 2), (2, 2), (0, 4)])
def test_completion_buckets_that_do_not_ascend_are_refused(buckets):
  with pytest.raises(ValueError, match=r"completion_buckets=.*ascending"):
    stream(completion_buckets=buckets)
  with pytest.raises(ValueError, match=r"completion_buckets=.*ascending"):
    padding(PROMPTS, COMPLETIONS, BUCKETS, buckets)


def test_padding_counts_tokens_and_buckets():
  rows = rows_of([(1, 2), (2, 3), (3, 9), (9, 1), (4, 8)])
  rows = rows["prompts"], rows["completions"]
  assert padding(*rows, (2, 4), (2, 4, 8)) == (1 + 2 + 2 + 3 + 4 + 8, (2 + 2) + (2 + 4) + (4 + 8))
  assert padding(*rows, (2, 4), (2, 4, 8), truncate=True) == (20 + 3 + 8, 22 + 4 + 8)
  assert padding(*rows, (16,), (16,)) == (20 + 12 + 10, 5 * 32)
  assert padding([], [], (2,), (2,)) == (0, 0)


def test_padding_is_what_a_pass_computes_where_all_batches_fill():
  lengths = [(prompt, completion) for prompt in (1, 3) for completion in (2, 5) for _ in range(5)]
  rows = rows_of(lengths)
  batches = take(stream(**rows, buckets=(2, 4), completion_buckets=(2, 6)), 4)
  used, computed = padding(rows["prompts"], rows["completions"], (2, 4), (2, 6))
  assert computed == sum(b.prompt.size + b.completion.size for b in batches)
  assert used == sum(b.prompt_valid.sum() + (b.completion == 7).sum() for b in batches)
