"""A causal model becomes a diffusion model on the user's own data: `configs/sft.py:adapt` on small random folders."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from d1jax import export, recipe, report
from d1jax.diffusion.likelihood import by_level
from d1jax.errors import RunError
from d1jax.evaluation import command as evaluation
from d1jax.evaluation.samples import shown
from d1jax.files import read_json
from d1jax.run.metrics import read_records
from d1jax.source import inspect
from tests import hub
from tests.jobs import load
from tests.models.folders import edit_config

ROWS = [{"prompt": f"Say {i}", "response": f"It is {i}. " * (1 + i % 3)} for i in range(40)]


def job(tmp_path, words="adapt", rows=ROWS, **changes):
  """A job of the preset with a folder `model` and data in `tmp_path`; `changes` have `__` for the dot."""
  (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  config = load("sft", words)
  given = {
    "workdir": str(tmp_path / "run"),
    "trackers": "",
    "model.pretrained": str(tmp_path / "model"),
    "model.remat": False,
    "data.root": str(tmp_path),
    "sft.data": "mine.jsonl",
    "sft.steps": 4,
    "sft.warmup_steps": 1,
    "sft.validate_every": 2,
    "sft.batch_size": 8,
    "sft.accumulation": 1,
    "sft.prompt_buckets": (64,),
    "sft.completion_buckets": (64,),
    "sft.held_out": 4.0,
    "sft.samples": 2,
    "evaluation.prompt_buckets": (64,),
    "rollout.completion_length": 32,
    "rollout.diffusion_steps": 4,
    "rollout.block_length": 32,
  }
  config.update_from_flattened_dict(given | {name.replace("__", "."): value for name, value in changes.items()})
  return config


@pytest.mark.slow(reason="runs the recipe on a small folder twice, and exports it")
def test_a_causal_folder_is_adapted_resumed_and_exported(tmp_path, capsys):
  hub.write(tmp_path / "model", "llama", layers=1)
  results = recipe.run(job(tmp_path))
  out, workdir = capsys.readouterr().out, tmp_path / "run"
  assert "is a causal llama, no diffusion model before it is fine-tuned" in out
  assert "the new id 262 (a spare row of the 264)" in out
  assert "tokens in packed rows of" in out
  assert "sft 2/4" in out
  assert " tokens/s " in out
  assert " held_out_loss " in out
  assert "Held-out loss of mine.jsonl at iteration" in out
  assert not {"after", "before", "baseline"} & set(results)
  assert results["task"] == "none"
  validated = [r for r in read_records(workdir / "metrics.jsonl") if "validation" in r]
  assert [r["iteration"] for r in validated] == [2, 4]
  levels = [f"held_out_ce/t{percent}" for percent in (25, 50, 75, 100)]
  for record in validated:
    assert record["validation"] == -record["held_out_loss"]
    assert all(0 < record[name] < 20 for name in levels)
    lines = [json.loads(line) for line in (workdir / "samples" / f"{record['iteration']}.jsonl").open()]
    assert [set(line) for line in lines] == [{"prompt", "completion", "expected"}] * 2
    assert all(line["prompt"].split("\n")[1].startswith("Say ") for line in lines)
    assert all(line["expected"].startswith("It is ") for line in lines)
  best = results["best_iteration"]["sft"]
  assert results["held_out"] == {k: v for k, v in validated[best // 2 - 1].items() if k.startswith("held_out_")}
  assert [len(results["samples"]), results["splits"]["sft.data"]["n"]] == [2, 36]
  assert recipe.run(job(tmp_path)) == json.loads(json.dumps(results)), "it is finished"
  longer = recipe.run(job(tmp_path, sft__steps=6, sft__samples=1))
  assert longer["params_fingerprint"] != results["params_fingerprint"]
  with pytest.raises(RunError, match=r"the questions of sft\.data are not those that"):
    recipe.run(job(tmp_path, rows=ROWS[:-1], sft__steps=8))
  config = load("eval")
  config.checkpoint = str(workdir)
  with pytest.raises(RunError, match=r"run has no task: name one, for example --config=configs/eval.py:gsm8k"):
    evaluation.run(config)
  config = load("export")
  config.checkpoint, config.output = str(workdir), str(tmp_path / "diffusion")
  export.run(config)
  assert read_json(tmp_path / "diffusion" / "config.json")["mask_token_id"] == 262
  exported = inspect(tmp_path / "diffusion")
  assert exported.as_start() is None
  assert exported.tokenizer.decode_raw([[262]]) == ["<|mask|>"], "the tokenizer has the mask too"
  assert exported.tokenizer.prompt([{"role": "user", "content": "<|mask|>"}], "").count(262) == 0


@pytest.mark.slow(reason="runs the recipe on a small folder")
def test_adapters_and_blocks_learn_plain_text(tmp_path, capsys):
  hub.write(tmp_path / "model", "qwen3", vocab=262, layers=1)
  texts = [{"text": f"{i} and then " * (1 + i % 20)} for i in range(30)]
  changes = dict(model__block=8, rollout__block_length=8, rollout__diffusion_steps=32, lora__rank=2)
  results = recipe.run(job(tmp_path, "adapt,lora,block", texts, sft__steps=2, **changes))
  assert "(the vocabulary grows from 262 to 384)" in capsys.readouterr().out
  assert results["held_out"]["held_out_loss"] > 0
  assert results["splits"]["sft.data"]["n"] > 26, "long texts are several pieces"
  assert all(len(sample["prompt"]) > 0 for sample in results["samples"])


@pytest.mark.parametrize(
  ("words", "changes", "message"),
  [
    ("adapt", {"sft__data": None}, r"task.name=none neither asks .* --config.sft.data=FILE, JSON lines of `messages`"),
    ("adapt", {"model__pretrained": None}, r"no texts for a tokenizer: .*--config.model.pretrained=FOLDER"),
    ("adapt", {"sft__held_out": 0.0}, r"nothing to validate with: use --config.sft.held_out=64"),
    ("adapt", {"sft__data": "nowhere"}, r"nowhere is missing, expected a file"),
    ("adapt", {"sft__prompt_buckets": (4,), "sft__completion_buckets": (4,)}, r"none of 36 .* fits a row of 8 tokens"),
    ("adapt", {"evaluation__prompt_buckets": (4,)}, r"every held-out prompt is longer than .*, or use sft.samples=0"),
    ("adapt", {"sft__held_out": 90.0}, r"held_out=90.0 parts 40 demonstrations into 0 to train on"),
    ("adapt,block", {"sft__ends": 3}, r"sft.ends=3 is for packed rows of full attention"),
  ],
)
def test_what_does_not_fit_together_is_one_line_and_claims_no_folder(tmp_path, words, changes, message):
  if "model__pretrained" not in changes:
    hub.write(tmp_path / "model", "llama", layers=1)
  with pytest.raises(RunError, match=message) as caught:
    recipe.run(job(tmp_path, words, **changes))
  assert "\n" not in str(caught.value)
  assert caught.value.exit_code == 2
  assert not (tmp_path / "run").exists()


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
  hub.write(tmp_path / "model", "qwen2")
  for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
    (tmp_path / "model" / name).unlink()
  with pytest.raises(RunError, match=r"model holds no tokenizer; put tokenizer.json, or its parts, beside config.json"):
    recipe.run(job(tmp_path))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_mask_that_is_named_is_no_news(tmp_path, family):
  folder = hub.write(tmp_path / "model", family)
  assert f"is a causal {family}, no diffusion model" in inspect(folder).as_start()
  edit_config(folder, mask_token_id=261)
  assert inspect(folder).as_start() is None
  assert inspect(folder).ids.mask_id == 261


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ("8b", "preset word 8b is a size of adapt: write adapt,8b"),
    ("adapt,0.1b,8b", "preset words 0.1b, 8b exclude each other"),
    ("adapt,tiny", "preset words tiny exclude each other or adapt"),
    ("adapt,large", "unknown preset word 'large'"),
  ],
)
def test_wrong_words_are_named(words, message):
  with pytest.raises(ValueError, match=message):
    load("sft", words)


def test_words_of_adapt():
  small, large = load("sft", "adapt"), load("sft", "adapt,8b,lora,block,gsm8k")
  assert (small.task.name, small.lora.rank, small.sft.ends, small.model.block) == ("none", 0, 32, None)
  assert (large.task.name, large.lora.rank, large.sft.ends, large.model.block) == ("gsm8k", 128, 0, 32)
  assert small.sft.learning_rate == 1e-4
  assert small.sft.packed
  assert large.sft.batch_size % large.sft.accumulation == 0


def test_levels_are_ranges_of_t():
  time, masked = jnp.asarray([[0.1], [0.25], [1.0]]), jnp.asarray([[1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
  found = by_level(time, jnp.asarray([[1.0, 2, 9], [4, 9, 9], [1, 2, 3]]), masked, 4)
  np.testing.assert_array_equal(found, [[3, 2], [4, 1], [0, 0], [6, 3]])
  line = report.by_level({"held_out_loss": 2.0, "held_out_ce/t25": 1.5, "held_out_ce/t100": 6.0})
  assert line == "  cross-entropy of masked tokens by the share t that is masked: 1.50 (to 25%), 6.00 (to 100%)"


def test_samples_are_shown_in_a_line():
  assert shown("Why?\n", "So\x1b") == r"  'Why?\n' -> 'So\x1b'"
  assert shown("a" * 300, "b" * 300) == f"  ...{'a' * 200!r} -> {'b' * 200!r}"
