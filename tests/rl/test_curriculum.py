import functools
import json

import numpy as np

from d1jax import tasks
from d1jax.data.tokenizer import SentencePieceTokenizer, Tokenizer, train_sentencepiece
from d1jax.rl.curriculum import LEAST, Curriculum
from d1jax.rl.prompts import Prompts
from d1jax.tasks import Mixture, Task


@functools.cache
def parts() -> tuple[Task, Tokenizer]:
  tokenizer = SentencePieceTokenizer(train_sentencepiece(["abc"], model_type="char", vocab_size=16))
  return tasks.build("countdown", sizes={"train": 1, "validation": 1, "test": 1, "demonstrations": 1}), tokenizer


def curriculum(task=None, records=None, groups=4, ahead=0) -> Curriculum:
  records = records or [{}] * 10
  ids = [[1] * (1 + n % 3) for n in range(len(records))]
  prompts = Prompts(task or parts()[0], parts()[1], records, ids, [""] * len(records), (4,), "d1")
  return Curriculum(prompts, groups=groups, num_generations=2, seed=3, ahead=ahead)


def test_prompts_are_drawn_in_proportion_to_their_failures():
  one = curriculum()
  np.testing.assert_allclose(one.probabilities(), 0.1)
  one.learn(np.asarray([0, 0, 1, 1, 2, 2]), np.asarray([1.0, 1.0, 0.0, 1.0, 0.0, 0.0]))
  weights = np.asarray([LEAST, 0.5, *[1.0] * 8])
  np.testing.assert_allclose(one.probabilities(), weights / weights.sum())
  one.learn(np.asarray([1, 1, 0, 0]), np.asarray([1.0, 1.0, 0.0, 0.0]))
  np.testing.assert_allclose(one.rates[:2], [0.5, 0.75])
  drawn = np.concatenate([one.batch(n).record[::2] for n in range(2000)])
  shares = np.bincount(drawn, minlength=10) / 2000
  assert shares[1] < shares[0] < shares[2:].min()
  one = curriculum(groups=1)
  one.learn(np.asarray([0, 0, 1, 1]), np.asarray([1.0, 1.0, 0.0, 1.0]))
  drawn = np.bincount(np.concatenate([one.batch(n).record[::2] for n in range(4000)]), minlength=10)
  np.testing.assert_allclose(drawn / 4000, one.probabilities(), atol=4 * np.sqrt(0.1 / 4000))


def test_a_batch_depends_on_its_number_and_the_rates_alone():
  one = curriculum()
  for number in range(3):
    one.learn(one.batch(number).record, np.linspace(0, 1, 8))
  metadata = json.loads(json.dumps(one.state() | {"data": {"next_index": 3}}))
  other = curriculum()
  other.learn(np.asarray([9, 9]), np.ones(2))
  other.restore(metadata)
  for number in (3, 4):
    for found, expected in zip(other.batch(number), one.batch(number), strict=True):
      np.testing.assert_array_equal(found, expected)
  assert (one.batch(3).record != one.batch(4).record).any()
  batch = one.batch(3)
  assert batch.sample_id.tolist() == list(range(24, 32)), "the numbers that the plain order has"
  assert len(set(batch.record.tolist())) == 4
  assert one.learn(batch.record, np.ones(8)) == other.learn(batch.record, np.ones(8))
  other.restore({})
  assert not other.asked.any()


def test_batches_that_were_drawn_ahead_come_back_behind_other_rates():
  """The rates when batch 2 is drawn are those behind batch 0, not those of the checkpoint behind batch 1."""
  one = curriculum(ahead=2)
  drawn = [one.batch(0), one.batch(1), one.batch(2)]
  one.learn(drawn[0].record, np.ones(8))
  drawn.append(one.batch(3))
  one.learn(drawn[1].record, np.ones(8))
  other = curriculum(ahead=2)
  other.restore(json.loads(json.dumps(one.state())))
  drawn.append(one.batch(4))
  for number in (2, 3, 2, 3, 4):
    np.testing.assert_array_equal(other.batch(number).record, drawn[number].record)
  assert list(other.state()["curriculum"]["drawn"]) == ["3", "4"]


def test_tasks_of_a_mix_keep_their_shares():
  mix = Mixture(dict.fromkeys("ab", parts()[0]), {"a": 3.0, "b": 1.0})
  records = [{"task": "a"}] * 2 + [{"task": "b"}] * 6
  one = curriculum(mix, records)
  one.learn(np.asarray([0, 0, 2, 2]), np.ones(4))
  found = one.probabilities()
  np.testing.assert_allclose([found[:2].sum(), found[2:].sum()], [0.75, 0.25])
  np.testing.assert_allclose(found[0] / found[1], LEAST)


def test_a_batch_of_more_prompts_than_there_are_repeats_some():
  assert len(curriculum(records=[{}] * 2, groups=4).batch(0).record) == 8
