"""From a folder in LLaDA's layout to a trained, exported one, all by the command line; 14M random weights."""

import json
import subprocess
import sys

import numpy as np
import pytest

from d1jax.models.tensor_files import TensorFiles
from tests import hub
from tests.data.folders import shared_tokenizers
from tests.jobs import ROOT, finish, start

COMMON = (
  "--config.rollout.completion_length=32",
  "--config.rollout.block_length=16",
  "--config.rollout.diffusion_steps=4",
  "--config.task.sizes.train=16",
  "--config.task.sizes.validation=4",
  "--config.task.sizes.test=4",
  "--config.evaluation.batch_size=4",
  "--config.data.prompt_buckets=(256,)",
  "--config.evaluation.prompt_buckets=(256,)",
  "--config.lora.rank=4",
)


def run(*arguments: str) -> str:
  code, out, error = finish(start(*arguments, optimised=True), timeout=900)
  assert code == 0, error
  return out


@pytest.mark.long
@pytest.mark.slow(reason="seven commands, each with a model of 14M parameters")
def test_sft_export_grpo_eval_export_by_the_command_line(tmp_path):
  data = shared_tokenizers().parent
  folder = hub.write_14m(tmp_path / "llada")
  assert sum(np.prod(shape) for shape in TensorFiles(folder).shapes.values()) == pytest.approx(14.5e6, rel=0.05)

  fine_tuned, merged = tmp_path / "sft", tmp_path / "merged"
  out = run(
    "--config=configs/sft.py:llada_8b",
    f"--config.model.pretrained={folder}",
    f"--config.data.root={data}",
    f"--config.workdir={fine_tuned}",
    "--config.sft.steps=2",
    "--config.sft.validate_every=2",
    "--config.sft.batch_size=2",
    "--config.sft.held_out=0.005",
    "--config.sft.learning_rate=1e-3",
    "--config.sft.completion_buckets=(64,128)",
    *COMMON,
  )
  assert "s1k.jsonl: cut" in out
  run("--config=configs/export.py", f"--config.checkpoint={fine_tuned}", f"--config.output={merged}")

  tuned = tmp_path / "grpo"
  job = (
    "--config=configs/grpo.py:llada_8b,gsm8k",
    f"--config.model.pretrained={merged}",
    f"--config.data.root={_with_test_questions(data, tmp_path / 'data')}",
    f"--config.workdir={tuned}",
    "--config.grpo.steps=2",
    "--config.grpo.validate_every=2",
    "--config.grpo.prompts_per_iteration=2",
    "--config.grpo.num_generations=4",
    "--config.grpo.num_iterations=2",
    "--config.grpo.grading_workers=2",
    *COMMON,
  )
  out = run(*job)
  assert "Held-out split of gsm8k" in out
  results = json.loads((tuned / "results.json").read_text())
  assert results["after"]["n"] == results["before"]["n"] == 4
  assert results["base_fingerprint"]
  assert "is finished" in run(*job), "the same command reprints"

  model, adapter, again = tmp_path / "model", tmp_path / "adapter", tmp_path / "again"
  run("--config=configs/export.py", f"--config.checkpoint={tuned}", f"--config.output={model}")
  checkpoint = (f"--config.checkpoint={tuned}", f"--config.output={adapter}", "--config.form=adapter")
  run("--config=configs/export.py", *checkpoint)
  pieces = (f"--config.pretrained={merged}", f"--config.adapter={adapter}", f"--config.output={again}")
  run("--config=configs/export.py", *pieces)
  first, second, source = TensorFiles(model), TensorFiles(again), TensorFiles(folder)
  assert first.shapes == second.shapes == source.shapes
  for name in first.shapes:
    assert first.read(name).tobytes() == second.read(name).tobytes(), name
  head = "model.transformer.ff_out.weight"
  assert first.read(head).tobytes() == source.read(head).tobytes(), "no adapter is there"
  query = "model.transformer.blocks.0.q_proj.weight"
  assert TensorFiles(merged).read(query).tobytes() != source.read(query).tobytes(), "fine-tuning changed it"
  sizes = ("--config.batch_size=4", "--config.prompt_buckets=(256,)", "--config.lengths=(32,)")
  rollout = ("--config.block_length=16", "--config.tokens_per_step=8")
  folders = (
    f"--config.pretrained={model}",
    f"--config.data_root={tmp_path / 'data'}",
    f"--config.output={tmp_path / 'on'}",
  )
  out = run("--config=configs/eval.py:gsm8k", "--config.questions=4", *folders, *sizes, *rollout)
  assert json.loads(out.splitlines()[-1])["n"] == 4, "the exported folder is read again"


def _with_test_questions(data, root):
  """The data folder with a stand-in for GSM8K's test file, which is not part of it."""
  (root / "gsm8k").mkdir(parents=True)
  lines = (data / "gsm8k" / "train.jsonl").read_text().splitlines()
  (root / "gsm8k" / "train.jsonl").write_text("\n".join(lines[:400]) + "\n")
  (root / "gsm8k" / "test.jsonl").write_text("\n".join(lines[400:420]) + "\n")
  return root


@pytest.mark.long
@pytest.mark.slow(reason="the TPU's compiler takes minutes for LLaDA-8B")
def test_the_8b_update_and_rollout_fit_one_v5e_chip():
  """By the TPU compiler's own account: NF4 base, adapters of rank 128 on all seven projections, d1's batch."""
  command = [sys.executable, "-m", "benchmarks.memory", "--chips", "1", "--training", "LoRA on all seven, NF4 base"]
  printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
  row = json.loads(printed.splitlines()[0])
  assert row["counted"]["trained"] == 4 * 335_544_320
  for program in ("rollout", "update"):
    assert row[program]["fits"]
    assert row[program]["peak_bytes"] < 15.75 * 2**30
