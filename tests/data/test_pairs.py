import json

import numpy as np
import pytest

from d1jax.data import demonstrations, pairs
from d1jax.data.pairs import Pair, PairTokens, pair_batches
from d1jax.data.tokenizer import Tokenizer
from tests.data.test_sft_batches import PAD

ROW = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
CHAT = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]}


def written(path, *rows):
  file = path / "pairs.jsonl"
  file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
  return file


class Letters(Tokenizer):
  """A tokenizer of letters, which knows no capitals."""

  stop_ids = (0,)

  def prompt(self, messages, prefill):
    return [ord(c) for c in "".join(m["content"] for m in messages) + prefill]

  def completion(self, text):
    return [*map(ord, text.lower()), 0]


def test_a_row_asks_by_a_prompt_or_by_messages(tmp_path):
  (pair,) = pairs.read(written(tmp_path, ROW | {"made": {"by": "somebody"}}))
  assert pair == Pair([{"role": "user", "content": "2 + 2?"}], "", "4", "5", 1)
  (pair,) = pairs.read(written(tmp_path, "", CHAT | {"chosen": "4", "rejected": "5", "prefill": "It is "}))
  assert pair == Pair(CHAT["messages"], "It is ", "4", "5", 2)
  assert pair.question == "2 + 2?"


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    ([], "holds no pair"),
    (["{"], "line 1 is not JSON .*write one object a line"),
    ([[1]], "line 1: is a JSON list, expected an object; write one object a line"),
    ([{"chosen": "4", "rejected": "5"}], "line 1: has none of the fields prompt and messages"),
    ([ROW, CHAT | ROW], "line 2: has prompt and messages; the rows of a file are of one kind: keep 'prompt'"),
    (
      [ROW, CHAT | {"chosen": "4", "rejected": "5"}],
      "line 2: has 'messages', but line 1 has 'prompt'; give all rows of the file the same one",
    ),
    ([{"prompt": "2 + 2?", "chosen": "4"}], "line 1: field 'rejected' is missing; add it, or remove the row"),
    ([ROW, ROW | {"rejected": "4"}], "line 2: chosen and rejected are the same text.*correct one or remove the row"),
    ([ROW | {"chosen": " "}], "line 1: chosen is blank; fill it in, or remove the row"),
    ([ROW | {"chosen": [{"role": "assistant"}]}], "line 1: chosen is a JSON list, expected a string"),
    ([{**ROW, "prompt": ""}], "line 1: prompt is blank"),
    ([{"messages": [], "chosen": "4", "rejected": "5"}], r"line 1: messages is '\[\]', expected a list of turns"),
    (
      [{"messages": [{"role": "user"}], "chosen": "4", "rejected": "5"}],
      "line 1: messages: content is a JSON NoneType",
    ),
    (
      [{"messages": [{"role": "assistant", "content": "4"}], "chosen": "4", "rejected": "5"}],
      "line 1: the last of messages is by 'assistant'; end with a user's",
    ),
  ],
)
def test_a_wrong_row_is_one_line_with_file_line_and_remedy(tmp_path, rows, message):
  file = written(tmp_path, *rows)
  with pytest.raises(ValueError, match=message) as caught:
    pairs.read(file)
  assert str(file) in str(caught.value)
  assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_an_error(tmp_path):
  with pytest.raises(ValueError, match="check the path, its rights"):
    pairs.read(tmp_path / "none.jsonl")


def test_answers_of_equal_tokens_are_refused(tmp_path):
  file = written(tmp_path, ROW, ROW | {"chosen": "Four", "rejected": "four"})
  with pytest.raises(ValueError, match=r"line 2: chosen and rejected are the same tokens.*remove the row"):
    pairs.tokenised(pairs.read(file), Letters(), file)


def test_pairs_of_a_question_stay_on_one_side():
  rows = [Pair([{"role": "user", "content": f"{i // 4}"}], "", "a", "b", i) for i in range(80)]
  train, held_out = demonstrations.split(rows, 0.3, "pairs")
  assert 0 < len(held_out) < len(train)
  assert not {row.question for row in train} & {row.question for row in held_out}
  with pytest.raises(ValueError, match=r"parts 1 pairs into .* change the share, or add pairs"):
    demonstrations.split(rows[:1], 0.5, "pairs")


TOKENS = PairTokens(
  [[1] * (1 + i % 5) for i in range(20)],
  [[2] * (1 + i % 3) for i in range(20)],
  [[3] * (1 + i % 7) for i in range(20)],
)


def batches(position=0, **options):
  given = dict(seed=1, batch_size=4, buckets=(3, 5), answer_buckets=(4, 8), pad_id=PAD)
  return pair_batches(TOKENS, position=position, **(given | options))


def test_a_batch_holds_both_answers_in_the_bucket_of_the_longer_one():
  found = [next(stream) for stream in [batches()] for _ in range(5)]
  seen = []
  for number, batch in enumerate(found):
    assert batch.sample_id.tolist() == list(range(4 * number, 4 * number + 4))
    width, length = batch.lengths
    assert batch.answers.shape == (4, 2, length)
    assert length == (4 if batch.length.max() <= 4 else 8)
    assert width == (3 if batch.prompt_valid.sum(axis=1).max() <= 3 else 5)
    for prompt, valid, answers, lengths in zip(*batch[1:], strict=True):
      assert (prompt[valid] == 1).all()
      for side, token in enumerate((2, 3)):
        assert answers[side].tolist() == [token] * lengths[side] + [PAD] * (length - lengths[side])
      seen.append((int(valid.sum()), *lengths.tolist()))
  expected = [(len(a), len(b), len(c)) for a, b, c in zip(*TOKENS, strict=True)]
  assert sorted(seen) == sorted(expected), "a pass has each pair once"


def test_a_stream_that_begins_later_goes_on_bit_for_bit():
  first, later = batches(), batches(3)
  expected = [next(first) for _ in range(6)][3:]
  for a in expected:
    for x, y in zip(a, next(later), strict=True):
      np.testing.assert_array_equal(x, y)


def test_pairs_that_fit_no_bucket_are_left_out_and_never_cut():
  kept = pairs.fitting(TOKENS, (3,), (4,))
  assert kept == [i for i in range(20) if i % 5 < 3 and i % 7 < 4]
  stream = batches(buckets=(3,), answer_buckets=(4,))
  assert all(next(stream).length.max() <= 4 for _ in range(4))
