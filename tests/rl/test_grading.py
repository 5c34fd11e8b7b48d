import jax.numpy as jnp
import numpy as np

from d1jax.rl.grading import decode, grade
from d1jax.tasks.base import Grade


class Letters:
  """Id i is the i-th letter; id 0 is the stop, which shows as a full stop."""

  vocab, mask_id, stop_ids, pad_id, files = 27, 26, (0,), 0, {}

  def prompt(self, messages, prefill):
    raise NotImplementedError

  def completion(self, text):
    raise NotImplementedError

  def decode_all(self, rows):
    return ["".join("." if i == 0 else chr(96 + i) for i in row) for row in rows]


class Counting:
  """One point a letter, and half a point for the record's letter."""

  name, splits = "counting", ("train",)

  def records(self, split):
    raise NotImplementedError

  prompt = demonstration = baseline = cluster = records

  def grade(self, text, record, protocol):
    assert protocol in ("strict", "d1")
    return Grade({"length": float(len(text)), "hit": 0.5 * (record["letter"] in text)}, {"hit": (1, 1)})


COMPLETION = np.asarray([[1, 2, 0, 3], [4, 0, 1, 1], [1, 2, 3, 4]])
KEPT = np.asarray([[True, True, True, False], [True, True, False, False], [True] * 4])


def test_what_lies_behind_the_stop_is_never_decoded():
  assert decode(Letters(), COMPLETION, KEPT) == ["ab.", "d.", "abcd"]


def test_a_reward_is_the_sum_of_its_components_on_prefill_and_text():
  records = [{"letter": "a"}, {"letter": "a"}, {"letter": "x"}]
  graded = grade(Counting(), Letters(), records, ["", "xa", "x"], jnp.asarray(COMPLETION), jnp.asarray(KEPT))
  assert graded.texts == ["ab.", "xad.", "xabcd"]
  np.testing.assert_array_equal(graded.rewards, [3.5, 4.5, 5.5])
  assert graded.rewards.dtype == np.float32
  assert [g.components["hit"] for g in graded.grades] == [0.5, 0.5, 0.5]


def test_only_the_protocol_of_d1_sees_what_lies_behind_the_stop():
  rows = [{"letter": "a"}] * 3, [""] * 3, COMPLETION, KEPT
  assert grade(Counting(), Letters(), *rows, "strict").texts == ["ab.", "d.", "abcd"]
  assert grade(Counting(), Letters(), *rows, "d1").texts == ["ab.c", "d.aa", "abcd"]
