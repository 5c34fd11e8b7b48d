"""Block-causal folders from download to export, all by the command line: random weights in the real layouts."""

import json

import pytest

from d1jax.models.tensor_files import TensorFiles
from tests import hub
from tests.jobs import finish, start

SMALL = (
  "--config.task.style=terse",
  "--config.task.sizes.train=16",
  "--config.task.sizes.demonstrations=8",
  "--config.task.sizes.validation=4",
  "--config.task.sizes.test=4",
  "--config.data.prompt_buckets=(128,)",
  "--config.evaluation.prompt_buckets=(128,)",
  "--config.evaluation.batch_size=4",
  "--config.rollout.completion_length=8",
  "--config.rollout.diffusion_steps=8",
  "--config.sft.steps=1",
  "--config.sft.validate_every=1",
  "--config.sft.batch_size=2",
  "--config.sft.prompt_buckets=(128,)",
  "--config.sft.completion_buckets=(20,)",
)
TRAINED = (
  "--config.grpo.steps=1",
  "--config.grpo.validate_every=1",
  "--config.grpo.prompts_per_iteration=2",
  "--config.grpo.num_generations=4",
  "--config.grpo.num_iterations=2",
  "--config.grpo.grading_workers=0",
  "--config.grpo.warmup_steps=0",
)
BLOCKS = {"sdar": ("--config.model.block=4",), "a2d_qwen3": ("--config.model.block=4",), "fast_dllm_qwen": ()}
"""What names the length of their blocks: 4; the last folder says it itself."""


def run(*arguments: str) -> str:
  code, out, error = finish(start(*arguments), timeout=900)
  assert code == 0, error
  return out


@pytest.mark.slow(reason="three commands, each with a small model of its own")
@pytest.mark.parametrize(
  "family", ["sdar", *(pytest.param(other, marks=pytest.mark.long) for other in ("a2d_qwen3", "fast_dllm_qwen"))]
)
def test_sft_grpo_export_eval_generate_by_the_command_line(tmp_path, family):
  """The families differ in what is read, and in what predicts a token: tests/models and tests/diffusion have each."""
  folder, tuned, model = hub.write(tmp_path / family, family), tmp_path / "tuned", tmp_path / "model"
  out = run(
    "--config=configs/grpo.py:full,sudoku,block",
    f"--config.model.pretrained={folder}",
    f"--config.workdir={tuned}",
    "--config.model.dtype=float32",
    *BLOCKS[family],
    *SMALL,
    *TRAINED,
  )
  assert "Held-out split of sudoku" in out
  records = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
  assert {record["stage"] for record in records} == {"sft", "grpo"}
  assert records[-1]["sampling_gap"] < 1e-4, "the path is scored as it was drawn"
  run("--config=configs/export.py", f"--config.checkpoint={tuned}", f"--config.output={model}")
  assert TensorFiles(model).shapes == TensorFiles(folder).shapes
  # The export says how long its blocks are: no command needs to be told.
  sizes = ("--config.prompt_buckets=(128,)", f"--config.pretrained={model}")
  if family != "sdar":  # the others differ from it before a denoiser is built
    assert run("--config=configs/generate.py", *sizes, "--config.prompt=1234", "--config.length=8")
    return
  evaluated = ("--config.questions=4", "--config.batch_size=4", "--config.lengths=(8,)", "--config.style=terse")
  out = run("--config=configs/eval.py:sudoku", *sizes, *evaluated, f"--config.output={tmp_path / 'on'}")
  assert json.loads(out.splitlines()[-1])["n"] == 4
