import jax
import numpy as np
import pytest

from d1jax.diffusion.rollout import Rollout
from d1jax.errors import RunError
from d1jax.rl.grading import Graded, Grader, WorkersDiedError
from d1jax.rl.losses import RATIO_EDGES
from d1jax.rl.shaping import UNSHAPED, Shaping
from d1jax.run import experiment as experiments
from d1jax.tasks import Grade, TaskError
from d1jax.training import host
from d1jax.training.host import Grading
from tests.jobs import small

TWO = np.asarray([1.0, 3.0], np.float32)
UPDATE = {"loss": TWO, "kl": TWO, "grad_norm": TWO, "sampling_gap": TWO, "finite": np.asarray([True, False])}


def made_up(rows, completion_length=6, seed=0):
  """A rollout of made-up ids on the host; every mask is true up to a length of its own."""
  rng = np.random.default_rng(seed)
  completion = rng.integers(3, 9, (rows, completion_length)).astype(np.int32)
  mask = np.arange(completion_length) < rng.integers(1, completion_length + 1, (rows, 1))
  zeros = np.zeros((rows, completion_length), np.float32)
  ids = np.arange(rows, dtype=np.int32)
  return Rollout(ids, ids // 2, completion, mask, completion, mask, zeros.astype(np.int32), zeros - 0.5)


def graded(*grades):
  return Graded(["?"] * len(grades), list(grades), np.asarray([g.reward for g in grades], np.float32))


def summarised(batch, metrics, tasks):
  return host.summarise(batch.rewards, host.sums(made_up(4), batch), metrics, 2, tasks)


def test_metrics_are_pooled_and_components_averaged():
  batch = graded(
    Grade({"right": 1.0, "format": 0.5}, {"solved": (1, 1), "cells": (2, 8)}),
    Grade({"right": 0.0, "format": 0.5}, {"solved": (0, 1), "cells": (1, 2)}),
    Grade({"right": 0.0, "format": 0.0}, {"solved": (0, 1), "cells": (0, 0)}),
    Grade({"right": 0.0, "format": 0.0}, {"solved": (1, 1), "cells": (3, 5)}),
  )
  values = summarised(batch, UPDATE, [])
  assert (values["reward"], values["reward/right"], values["reward/format"]) == (0.5, 0.25, 0.25)
  assert (values["solved"], values["cells"]) == (0.5, 6 / 15)
  assert (values["reward_std"], values["no_signal"]) == (0.25, 0.5)
  assert (values["loss"], values["finite"], values["entropy"]) == (2.0, 0.0, 0.5)
  assert values["completion_length"] == made_up(4).completion_mask.sum() / 4
  assert "importance/effective_sample_size" not in values
  weighted = UPDATE | {"importance/effective_sample_size": np.asarray([0.5, 0.75], np.float32)}
  assert summarised(batch, weighted, []) == values | {"importance/effective_sample_size": 0.625}


def test_figures_of_the_ratio_are_those_of_all_inner_steps_and_the_gap_that_of_the_first():
  rng = np.random.default_rng(0)
  ratios = np.exp(0.3 * rng.normal(size=(2, 4000)))
  below = (np.log(ratios)[..., None] <= RATIO_EDGES).mean(axis=1).astype(np.float32)
  metrics = UPDATE | {
    "ratio": below,
    "ratio/effective_sample_size": np.asarray([1.0, 0.5], np.float32),
    "sampling_gap": np.asarray([0.25, 9.0], np.float32),
    "mine/tau": np.asarray([0.5, 1.0], np.float32),
  }
  batch = graded(*[Grade({"right": float(i)}, {}) for i in range(4)])
  values = summarised(batch, metrics, [])
  assert (values["sampling_gap"], values["ratio/effective_sample_size"]) == (0.25, 0.75)
  assert values["mine/tau"] == 0.75
  assert not {"clip_fraction", "ratio_deviation", "ratio"} & set(values)
  for share in (0.01, 0.5, 0.99):
    exact, found = np.log(np.quantile(ratios, share)), np.log(values[f"ratio/p{100 * share:g}"])
    assert abs(found - exact) <= max(0.34 * abs(exact), 0.02)


def test_ratios_of_one_have_quantiles_of_one_and_far_ones_the_last_edge():
  assert set(host.ratio_quantiles("ratio", (RATIO_EDGES > 0) * np.float32(1 - 1e-6)).values()) == {1.0}
  far = host.ratio_quantiles("ratio", np.where(RATIO_EDGES < 9, 0.5, 0.5).astype(np.float32))
  assert far["ratio/p1"] == pytest.approx(np.exp(-10))
  assert far["ratio/p99"] == pytest.approx(np.exp(10))


def test_rows_of_several_tasks_count_where_they_have_something_to_say():
  batch = graded(
    Grade({"grid": 1.0}, {"solved": (1, 1), "a/solved": (1, 1), "cells": (3, 4)}),
    Grade({"sum": 0.25, "format": 0.25}, {"solved": (0, 1), "b/solved": (0, 1), "extra": (0, 0)}),
    Grade({"grid": 0.5}, {"solved": (0, 1), "a/solved": (0, 1), "cells": (1, 4)}),
    Grade({"sum": 0.75, "format": 0.0}, {"solved": (1, 1), "b/solved": (1, 1), "extra": (0, 0)}),
  )
  values = summarised(batch, UPDATE, ["a", "b", "a", "b"])
  assert (values["reward"], values["a/reward"], values["b/reward"]) == (0.6875, 0.75, 0.625)
  assert (values["reward/grid"], values["reward/sum"], values["reward/format"]) == (0.75, 0.5, 0.125)
  assert (values["solved"], values["a/solved"], values["b/solved"], values["cells"]) == (0.5, 0.5, 0.5, 0.5)
  assert "extra" not in values, "no row counts for it"


def test_sums_of_parts_are_those_of_the_whole():
  grades = [Grade({"right": i / 3}, {"cells": (i, 4)} | ({"odd": (1, 1)} if i % 2 else {})) for i in range(4)]
  rollout = made_up(4)
  cut = [jax.tree.map(lambda x, i=i: x[i : i + 2], rollout) for i in (0, 2)]
  parts = [host.sums(part, graded(*grades[i : i + 2])) for i, part in zip((0, 2), cut, strict=True)]
  whole = host.sums(rollout, graded(*grades))
  found = host.added(parts)
  assert found.keys() == whole.keys()
  for name, pair in whole.items():
    assert found[name] == pytest.approx(pair, rel=1e-12), name
  assert whole["odd"] == (2, 2)
  assert whole["reward/right"] == (2.0, 4)


class Recording(Grader):
  """Notes what is asked for, in its order."""

  def __init__(self, task):
    super().__init__(task, 0)
    self.events = []

  def submit(self, texts, records, protocol):
    number = len(self.events)
    self.events.append(("submitted", len(texts), protocol))
    wait = super().submit(texts, records, protocol)

    def waiting():
      self.events.append(("waited for", number))
      return wait()

    return waiting


@pytest.mark.parametrize("protocol", ["strict", "d1"])
def test_every_chunk_is_handed_over_before_any_is_waited_for(tmp_path, protocol):
  experiment = experiments.build(small(tmp_path, task__protocol=protocol), None)
  prompts, grader = experiment.prompts("train"), Recording(experiment.task)
  chunks = tuple(made_up(4, completion_length=18, seed=seed) for seed in range(3))
  record = np.asarray([5, 5, 0, 0, 9, 9, 1, 1, 2, 2, 3, 3], np.int32)
  visit = host.grade_chunks(Grading(prompts, grader, protocol), record, jax.device_put(chunks))
  rollout, found = visit.rollout, visit.graded
  np.testing.assert_array_equal(visit.rows, np.arange(12))
  np.testing.assert_array_equal(visit.rewards, found.rewards)
  np.testing.assert_array_equal(visit.lengths, rollout.completion_mask.sum(axis=1))
  np.testing.assert_array_equal(
    visit.solved, [top / bottom for top, bottom in (g.metrics["solved"] for g in found.grades)]
  )
  assert visit.sums == host.sums(rollout, found)
  assert grader.events == [("submitted", 4, protocol)] * 3 + [("waited for", n) for n in range(3)]
  np.testing.assert_array_equal(rollout.completion, np.concatenate([c.completion for c in chunks]))
  for row, (text, index) in enumerate(zip(found.texts, record, strict=True)):
    ids = rollout.completion[row][rollout.completion_mask[row] | (protocol == "d1")]
    assert text == prompts.prefills[index] + experiment.tokenizer.decode_all([ids.tolist()])[0]
    assert found.grades[row] == experiment.task.grade(text, prompts.records[index], protocol)
    assert found.rewards[row] == np.float32(found.grades[row].reward)


@pytest.mark.parametrize(
  ("error", "message"),
  [
    (TaskError("mine.py: it is not finite"), "^mine.py: it is not finite$"),
    (WorkersDiedError("they died"), r"^they died. It is --config.grpo.grading_workers$"),
  ],
)
def test_a_failure_to_grade_is_told_to_all_processes_and_ends_the_run(tmp_path, monkeypatch, error, message):
  experiment, told = experiments.build(small(tmp_path), None), []
  grader, record = Grader(experiment.task, 0), np.zeros(4, np.int32)

  def fail():
    raise error

  def gather(part):
    told.append(part["failure"])
    return [part]

  monkeypatch.setattr(grader, "submit", lambda *_: fail)
  monkeypatch.setattr(host.multihost, "gather", gather)
  chunks = jax.device_put((made_up(4, completion_length=18),))
  with pytest.raises(RunError, match=message) as caught:
    host.grade_chunks(Grading(experiment.prompts("train"), grader, "strict"), record, chunks)
  assert told == [str(caught.value)]


def test_rewards_are_shaped_by_length_and_answer(tmp_path):
  experiment = experiments.build(small(tmp_path), None)
  grading = Grading(experiment.prompts("train"), Grader(experiment.task, 0), "strict")
  shaping = Shaping(overlong=6, answered=0.5)
  record, chunks = np.asarray([5, 5, 0, 0], np.int32), jax.device_put((made_up(4, completion_length=18),))
  plain, shaped = (host.grade_chunks(grading._replace(shaping=s), record, chunks) for s in (UNSHAPED, shaping))
  for row, (before, after) in enumerate(zip(plain.graded.grades, shaped.graded.grades, strict=True)):
    length = int(plain.rollout.completion_mask[row].sum())
    assert after == shaping(before, length, 18)
    assert shaped.rewards[row] == np.float32(after.reward)
  assert shaped.sums["reward/overlong"][0] == pytest.approx(sum(g.components["overlong"] for g in shaped.graded.grades))
  assert (shaped.rewards != plain.rewards).any()
