"""The scripts of examples/ run: three on the small model of the tests, two together as parts of one run."""

import pytest

import d1jax
from examples import ask, choose, own_loss, own_task, solve
from tests import jobs

PUZZLE = "0300413012003420abcdefghijklmnop"


@pytest.mark.slow(reason="compiles programs of its own")
def test_a_folder_answers_chooses_and_solves(capsys):
  assert len(ask.main(str(jobs.START), PUZZLE, 32)) == 3
  assert choose.main(str(jobs.START), PUZZLE, "2314413212433421", "1") in ("1", "2314413212433421")
  assert 0 <= solve.main(str(jobs.START), 8, "terse") <= 1
  out = capsys.readouterr().out
  assert "log p = " in out
  assert "% solved, 95% interval " in out


def test_the_tasks_reward_counts_kept_clues():
  task = own_task.build(sizes={"test": 4})
  record = task.records("test")[0]
  right, other = task.grade(record["solution"], record), task.grade("1111222233334444", record)
  assert (right.components["clues"], other.components["clues"]) == (0.5, 0.0)
  assert right.metrics["solved"] == (1, 1)


@pytest.mark.slow(reason="runs the recipe")
def test_a_task_and_a_loss_of_ones_own_train(tmp_path, monkeypatch):
  seen = {}

  def train(preset, overrides):
    seen.update(overrides)
    return {"after": {"solved": 0.5}}

  monkeypatch.setattr(d1jax, "train", train, raising=False)
  assert own_task.main() == own_loss.main() == 0.5
  assert {"task.module": own_task.__file__, "grpo.loss": own_loss.__file__}.items() <= seen.items()
  monkeypatch.undo()
  config = jobs.started(tmp_path, task__module=own_task.__file__, grpo__loss=own_loss.__file__, grpo__steps=2)
  results = d1jax.train(config)
  assert results["task"] == "keeps_clues"
