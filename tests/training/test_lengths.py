"""A curriculum over completion length: when it grows, what a checkpoint holds of it, and what it refuses."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from d1jax import recipe
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.errors import RunError
from d1jax.rl.grading import Graded
from d1jax.run.metrics import read_records
from d1jax.training.host import Visit
from d1jax.training.lengths import Lengths
from d1jax.training.programs import Programs
from tests.jobs import small, started

STOP = 1


def lengths(threshold=0.25):
  each = []
  for length in (4, 6, 8):
    programs = object.__new__(Programs)
    programs.sampler, programs.model = SamplerSpec(8, 8, 2).resized(length, 2), SimpleNamespace()
    programs.model.denoiser = SimpleNamespace(stop_ids=(STOP,))
    each.append(programs)
  return Lengths(each, threshold)


def visit(ends):
  """Rows that end at these places; the canvas is longer than the completion."""
  completion = np.full((len(ends), 10), 5, np.int32)
  for row, end in enumerate(ends):
    completion[row, end:] = STOP
  rollout, rows = SimpleNamespace(completion=completion), np.arange(len(ends))
  return Visit(rows, rows, rows, {}, 0.0, rows, rollout, Graded([], [], rows))


def test_the_length_grows_when_more_than_a_share_of_the_answers_is_cut():
  one, seen = lengths(), []
  for ends in ([0, 3, 3, 4], [4, 4, 1, 1], [2, 2, 2, 7], [7, 7, 7, 7], [9, 9, 9, 9]):
    seen.append(one.learn(visit(ends)))
    other = lengths()
    other.restore(one.state())
    assert other.tokens == one.tokens
  assert [(int(each["length_curriculum/tokens"]), each["length_curriculum/unfinished"]) for each in seen] == [
    *((4, 0.25), (4, 0.5), (6, 0.25), (6, 1.0), (8, 1.0)),
  ]
  one.restore({})
  assert one.tokens == 4


@pytest.mark.parametrize(
  ("length", "expected"), [(64, (64, 32, 16)), (16, (16, 8, 16)), (8, (8, 4, 8)), (1, (1, 1, 1))]
)
def test_a_shorter_sampler_unmasks_as_many_tokens_a_step(length, expected):
  found = SamplerSpec(64, 32, 16).resized(length, min(length, 16))
  assert (found.completion_length, found.diffusion_steps, found.block_length) == expected


PARTIAL = {"partial_age": 1, "rollout_slots": 8, "rollout_chunks": 1, "estimator": "step_merged"}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"length_curriculum": (9, 12)}, r"\(9, 12\) must ascend and end with rollout.completion_length, here 18"),
    ({"length_curriculum": (4, 18)}, r"=\(4, 18\): completion_length=4 .* block_length=3"),
    ({"length_curriculum": (9, 18), "off_policy_steps": 1}, "set grpo.off_policy_steps=0, or grpo.length_curriculum"),
    ({"length_curriculum": (9, 18), **PARTIAL}, "set grpo.partial_age=0, or grpo.length_curriculum"),
    ({"length_curriculum": (9, 18), "overlong": 12}, "overlong"),
  ],
)
def test_lengths_that_make_no_sense_claim_no_folder(tmp_path, changes, message):
  fields = {"rollout__block_length": 3, "rollout__diffusion_steps": 6, "rollout__early_exit": True}
  fields |= {f"grpo__{name}": value for name, value in changes.items()}
  with pytest.raises(RunError, match=message):
    recipe.run(small(tmp_path / "run", **fields))
  assert not (tmp_path / "run").exists()


@pytest.mark.slow(reason="runs the recipe, and resumes it")
def test_a_run_whose_rollouts_grow_is_resumed_bit_for_bit(tmp_path):
  """No answer of 6 tokens is whole, so that the second iteration has 18."""
  changes = {"grpo__steps": 2, "grpo__validate_every": 1, "grpo__length_curriculum": (6, 18), "grpo__overlong": 4}
  results = recipe.run(started(tmp_path / "whole", **changes))
  records = [r for r in read_records(tmp_path / "whole" / "metrics.jsonl") if r["stage"] == "grpo"]
  assert [record["length_curriculum/tokens"] for record in records] == [6, 18]
  assert [record["cost/tokens/rollout"] for record in records] == [16 * 6, 16 * 18]
  assert records[0]["length_curriculum/unfinished"] == 1.0
  shutil.copytree(tmp_path / "whole", tmp_path / "parts")
  (tmp_path / "parts" / "results.json").unlink()
  shutil.rmtree(tmp_path / "parts" / "checkpoints" / "grpo" / "2")
  resumed = recipe.run(started(tmp_path / "parts", **changes))
  assert resumed["params_fingerprint"] == results["params_fingerprint"]
