"""Evaluations of a small trained run, in this process: what they complete, how they go on, what they refuse."""

import json
import shutil
from pathlib import Path

import pytest

from d1jax import recipe
from d1jax.diffusion.rollout import SamplerSpec
from d1jax.errors import PreemptedError, RunError
from d1jax.evaluation import command, evaluator, items, output, subject
from d1jax.run import experiment as experiments
from d1jax.run import fields, inputs
from d1jax.run.interrupts import Interrupts
from tests import hub, runs
from tests.jobs import load, small


@pytest.fixture(scope="module")
def finished():
  """The folder of a finished job and its results."""
  workdir, _, results = runs.finished()
  return workdir, results


def evaluate(workdir: Path, output: Path | None = None, words: str = "", **changes):
  config = load("eval", words)
  config.update(checkpoint=str(workdir), **changes)
  if output is not None:
    config.output = str(output)
  return command.run(config)


def contents(folder: Path) -> dict[str, list[dict]]:
  """Items without what a clock says."""
  timeless = lambda line: json.loads(line) | {"seconds": None}
  return {p.name: [timeless(x) for x in p.read_text().splitlines()] for p in sorted((folder / "items").iterdir())}


def test_greedy_agrees_with_the_final_table(finished, tmp_path, capsys):
  workdir, trained = finished
  results = evaluate(workdir, tmp_path)
  (arm,) = results["arms"]
  for name in ("solved", "cell_accuracy", "well_formed"):
    assert arm["summary"]["metrics"][name]["value"] == trained["after"][name]
    assert arm["summary"]["metrics"][name]["interval"] == trained["after"][f"{name}_interval"]
  assert arm["baseline"]["value"] == trained["baseline"]["solved"]
  assert results["questions"][arm["name"]]["records_sha256"] == trained["splits"]["test"]["sha256"]
  assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
  texts = [json.loads(line)["text"] for line in (workdir / "completions" / "after.jsonl").read_text().splitlines()]
  assert [item.text for item in output.read_items(tmp_path, arm["name"])] == texts
  out, err = capsys.readouterr()
  assert "compiling completions of 18 tokens for 24 prompts" in err
  last = json.loads(out.splitlines()[-1])
  assert last == {
    "task": "sudoku",
    "protocol": "strict",
    "accuracy": round(100 * trained["after"]["solved"], 2),
    "n": 24,
  }
  # One checkpoint's folder, the one that validation chose, is the same.
  again = evaluate(trained["checkpoint"], tmp_path)
  assert again["arms"] == results["arms"]


def test_a_checkpoint_from_before_mixes_is_still_read(finished):
  _, trained = finished
  config = json.loads(json.dumps(trained["config"]))
  late = ("cache", "refresh_every", "look_behind", "look_ahead", "schedule", "threshold", "factor", "max_reveal")
  later = ("grading_workers", "estimator", "importance_cap", "drift_every", "drift_limit", "ema_decay", "save_every")
  for section, names in (
    ("task", ("module", "mix")),
    ("lora", ("rslora",)),
    ("rollout", ("early_exit", *late)),
    ("grpo", later),
  ):
    for name in names:
      del config[section][name]
  restored = experiments.of_checkpoint(config, load("eval"))
  assert inputs.build_task(restored).name == "sudoku"
  assert SamplerSpec(**restored.rollout) == SamplerSpec(**trained["config"]["rollout"])
  assert (restored.lora.rslora, restored.grpo.ema_decay) == (False, None)
  assert experiments.of_checkpoint(trained["config"], load("eval")).task.to_dict() == trained["config"]["task"]


def test_results_say_what_determines_them(finished, tmp_path):
  workdir, _ = finished
  results = evaluate(workdir, tmp_path)
  assert {"subject", "params_fingerprint", "config", "versions", "revision", "device", "questions"} <= set(results)
  (asked,) = results["questions"].values()
  assert (asked["n"], asked["left_out"], asked["style"]) == (24, 0, "terse")
  assert asked["sampler"]["completion_length"] == 18
  assert len(asked["prompts_sha256"]) == 64
  summary = results["arms"][0]["summary"]
  assert summary["forward_passes"] == 4
  assert 1 <= summary["tokens"] <= 18
  assert summary["tokens_per_second"] > 0


@pytest.mark.slow(reason="evaluates a run again and again")
def test_seeds_and_samples_are_drawn_apart_and_whatever_the_batch(finished, tmp_path):
  workdir, _ = finished
  draws = {"temperatures": (0.0, 1.5), "seeds": (0, 7), "samples": 2}
  results = evaluate(workdir, tmp_path / "a", **draws)
  greedy, drawn = results["arms"]
  assert (greedy["summary"]["samples"], greedy["summary"]["seeds"]) == (1, [0])
  assert (drawn["summary"]["samples"], drawn["summary"]["seeds"]) == (2, [0, 7])
  assert set(drawn["summary"]["pass_at"]) == {"1", "2", "4"}
  assert len(drawn["summary"]["over_seeds"]["values"]) == 2
  found = output.read_items(tmp_path / "a", drawn["name"])
  texts = {}
  for item in found:
    texts.setdefault((item.seed, item.sample), []).append(item.text)
  assert len(texts) == 4
  assert len({tuple(column) for column in texts.values()}) == 4, "no two draws are the same"
  evaluate(workdir, tmp_path / "b", batch_size=8, **draws | {"temperatures": (1.5,)})
  one, other = (output.read_items(tmp_path / x, drawn["name"]) for x in "ab")
  assert [(i.seed, i.sample, i.index, i.text) for i in one] == [(i.seed, i.sample, i.index, i.text) for i in other]


@pytest.mark.slow(reason="evaluates a run again and again")
def test_an_interrupted_evaluation_goes_on_where_it_stopped(finished, tmp_path, monkeypatch):
  workdir, _ = finished
  draws = {"temperatures": (1.0,), "samples": 2, "batch_size": 8}
  whole = evaluate(workdir, tmp_path / "whole", **draws)
  runs = []
  original = evaluator.Evaluator.complete

  def counted(self, batch, params, **draw):
    runs.append(batch)
    return original(self, batch, params, **draw)

  monkeypatch.setattr(evaluator.Evaluator, "complete", counted)
  monkeypatch.setattr(Interrupts, "pending", lambda self: len(runs) == 2)
  monkeypatch.setattr(Interrupts, "error", lambda self, where: PreemptedError(where))
  with pytest.raises(PreemptedError, match="batch 2"):
    evaluate(workdir, tmp_path / "cut", **draws)
  assert not (tmp_path / "cut" / "results.json").exists()
  # A kill may leave half a line.
  (path,) = (tmp_path / "cut" / "items").iterdir()
  assert len(items.read(path)) == 16
  path.write_bytes(path.read_bytes()[:-20])
  results = evaluate(workdir, tmp_path / "cut", **draws)
  assert runs == [0, 1, 1, 2, 0, 1, 2], "only what is missing is computed"
  assert contents(tmp_path / "cut").keys() == contents(tmp_path / "whole").keys()
  assert results["arms"][0]["summary"]["metrics"] == whole["arms"][0]["summary"]["metrics"]
  key = lambda item: (item.seed, item.sample, item.index)
  one, other = (output.read_items(tmp_path / x, results["arms"][0]["name"]) for x in ("cut", "whole"))
  assert [(key(i), i.text, i.metrics, i.tokens) for i in one] == [(key(i), i.text, i.metrics, i.tokens) for i in other]


@pytest.mark.slow(reason="evaluates a run again and again")
def test_the_folder_is_named_by_what_is_evaluated(finished, tmp_path):
  workdir, _ = finished
  shutil.copytree(workdir, tmp_path / "run")
  evaluate(tmp_path / "run", questions=8)
  (folder,) = (tmp_path / "run" / "eval").iterdir()
  before = (folder / "results.json").read_bytes()
  evaluate(tmp_path / "run", questions=8)
  assert (folder / "results.json").read_bytes() == before, "nothing is computed again"
  evaluate(tmp_path / "run", questions=9)
  assert len(list((tmp_path / "run" / "eval").iterdir())) == 2
  with pytest.raises(RunError, match="holds another evaluation"):
    evaluate(tmp_path / "run", folder, questions=9)


@pytest.mark.slow(reason="evaluates a run again and again")
def test_any_mix_of_tasks_and_lengths(finished, tmp_path, capsys):
  """One of one's own among them."""
  workdir, _ = finished
  module = str(Path(__file__).parents[1] / "tasks" / "parity_task.py")
  fields = {"questions": 4, "prompt_buckets": (16, 64), "module": module}
  steps = {"lengths": (12, 24), "block_length": 12, "tokens_per_step": 3}
  results = evaluate(workdir, tmp_path / "both", "tiny,sudoku", **fields, **steps)
  names = [(arm["task"], arm["length"], arm["sampler"]["diffusion_steps"]) for arm in results["arms"]]
  assert names == [("sudoku", 12, 4), ("sudoku", 24, 8), ("parity", 12, 4), ("parity", 24, 8)]
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()[-4:]]
  assert [(line["task"], line["length"], line["n"]) for line in lines] == [(t, n, 4) for t, n, _ in names]
  with pytest.raises(RunError, match="unknown protocol 'd1'; choose one of: strict"):
    evaluate(workdir, tmp_path / "d1", protocol="d1", **fields)


def test_a_cache_and_a_schedule_are_those_of_the_rollouts_or_said():
  config = load("eval")
  rollouts = SamplerSpec(18, 6, 18, cache="window", refresh_every=2, look_ahead=4, schedule="threshold", threshold=0.5)
  (sampler,) = command.samplers(config, rollouts)
  assert sampler == SamplerSpec(**vars(rollouts) | {"temperature": 0.0, "early_exit": True})
  config.update(cache="none", schedule="static")
  (sampler,) = command.samplers(config, rollouts)
  assert (sampler.cache, sampler.refresh_every, sampler.schedule) == ("none", None, "static")
  config.update(cache="dual", schedule="factor")
  (sampler,) = command.samplers(config, rollouts)
  assert (sampler.cache, sampler.refresh_every, sampler.schedule, sampler.look_ahead) == ("dual", 2, "factor", 4)


@pytest.mark.parametrize(
  ("trained", "fields", "expected"),
  [
    ((18, 4, 18), {"lengths": (18, 36, 54)}, [(18, 4), (36, 8), (54, 12)]),
    ((256, 128, 32), {"lengths": (128, 256, 512)}, [(128, 64), (256, 128), (512, 256)]),
    ((256, 128, 32), {"lengths": (128,), "block_length": 16}, [(128, 64)]),
    ((256, 128, 32), {"lengths": (128, 512), "tokens_per_step": 4}, [(128, 32), (512, 128)]),
    ((20, 5, 20), {"tokens_per_step": 3}, [(20, 6)]),
  ],
)
def test_tokens_a_step_are_those_of_the_rollouts_whatever_the_length(trained, fields, expected):
  """As `configs/generate.py` has them."""
  config = load("eval")
  config.update(**fields)
  found = list(command.samplers(config, SamplerSpec(*trained)))
  assert [(spec.completion_length, spec.diffusion_steps) for spec in found] == expected


def test_steps_that_blocks_cannot_share_name_the_field():
  config = load("eval")
  config.update(lengths=(36,), tokens_per_step=5)
  with pytest.raises(ValueError, match=r"tokens_per_step=5 gives 7 steps to 36 tokens, which the 2 blocks of block_l"):
    list(command.samplers(config, SamplerSpec(18, 6, 18)))


@pytest.mark.slow(reason="evaluates a run again and again")
def test_an_evaluation_with_a_cache_says_so(finished, tmp_path, capsys):
  workdir, _ = finished
  fields = {"lengths": (24,), "block_length": 6, "tokens_per_step": 3, "questions": 8, "early_exit": False}
  exact = evaluate(workdir, tmp_path / "exact", **fields)
  assert "mode" not in capsys.readouterr().out
  cached = evaluate(workdir, tmp_path / "dual", cache="dual", schedule="threshold", **fields)
  (arm,) = cached["arms"]
  assert (arm["sampler"]["cache"], arm["sampler"]["schedule"]) == ("dual", "threshold")
  shown = capsys.readouterr().out
  assert "mode" in shown
  assert "dual threshold" in shown
  assert exact["arms"][0]["summary"]["forward_passes"] == 8
  assert 4 <= arm["summary"]["forward_passes"] <= 24


def test_a_checkpoint_that_validation_did_not_choose_may_not_meet_the_test_split(finished, tmp_path):
  _, trained = finished
  other = next(p for p in Path(trained["checkpoint"]).parent.iterdir() if p.name.isdigit() and p.name != "4")
  with pytest.raises(RunError, match=r"meets the test split, but validation chose checkpoint 4"):
    evaluate(other, tmp_path / "test")
  assert not (tmp_path / "test").exists()
  assert evaluate(other, tmp_path / "v", split="validation")["arms"][0]["summary"]["n"] == 16
  assert evaluate(other, tmp_path / "b", chosen_beforehand=True)["arms"][0]["summary"]["n"] == 24


@pytest.mark.slow(reason="evaluates a run again and again")
def test_two_evaluations_are_compared_question_by_question(finished, tmp_path):
  workdir, trained = finished
  sft = Path(trained["checkpoint"]).parent.parent / "sft" / str(trained["best_iteration"]["sft"])
  first = evaluate(sft, tmp_path / "a")
  second = evaluate(workdir, tmp_path / "b", compare=str(tmp_path / "a"))
  (pair,) = second["compare"]["arms"].values()
  assert pair["n"] == pair["both"] + pair["only_first"] + pair["only_second"] + pair["neither"] == 24
  share = lambda results: results["arms"][0]["summary"]["accuracy"]
  assert pair["difference"] == pytest.approx(share(second) - share(first))
  same = evaluate(workdir, tmp_path / "c", compare=str(tmp_path / "b"))
  assert next(iter(same["compare"]["arms"].values()))["p"] == 1.0
  with pytest.raises(RunError, match="holds no finished evaluation"):
    evaluate(workdir, tmp_path / "d", compare=str(tmp_path / "nowhere"))
  with pytest.raises(RunError, match="graded under the protocol strict, this evaluation under d1"):
    evaluate(workdir, tmp_path / "d", compare=str(tmp_path / "b"), protocol="d1")
  assert not (tmp_path / "d").exists(), "what can be known is said before anything is computed"
  with pytest.raises(RunError, match="have no partner"):
    evaluate(workdir, tmp_path / "e", compare=str(tmp_path / "b"), questions=8)


@pytest.mark.slow(reason="compiles programs of its own")
def test_the_d1_protocol_reads_on_and_refuses_an_early_exit(finished, tmp_path):
  workdir, _ = finished
  both = evaluate(workdir, tmp_path / "d1", protocol="d1", lengths=(24,), block_length=6, tokens_per_step=3)
  strict = evaluate(workdir, tmp_path / "strict", lengths=(24,), block_length=6, tokens_per_step=3)
  one, other = both["arms"][0], strict["arms"][0]
  assert (one["sampler"]["early_exit"], other["sampler"]["early_exit"]) == (False, True)
  assert one["summary"]["metrics"]["solved"] == other["summary"]["metrics"]["solved"]
  assert one["summary"]["forward_passes"] == 8 >= other["summary"]["forward_passes"]
  assert "d1_accuracy" in one["summary"]["metrics"]
  assert "d1_accuracy" not in other["summary"]["metrics"]
  with pytest.raises(RunError, match="early_exit ends completions at their stop id, but the protocol d1 reads on"):
    evaluate(workdir, tmp_path / "no", protocol="d1", early_exit=True)
  with pytest.raises(RunError, match=r"rollout\.early_exit .* but task\.protocol=d1 reads on"):
    recipe.run(small(tmp_path / "run", rollout__early_exit=True, task__protocol="d1"))


@pytest.mark.slow(reason="prompts of 1,536 bytes")
def test_a_models_folder_is_evaluated_as_d1_does(tmp_path):
  folder = hub.write(tmp_path / "model")
  config = load("eval", "llada_8b,sudoku,countdown")
  config.update(
    pretrained=str(folder),
    output=str(tmp_path / "out"),
    questions=2,
    lengths=(4,),
    block_length=4,
    protocol="d1",
    batch_size=8,
    prompt_buckets=(1536,),
  )
  results = command.run(config)
  assert results["subject"] == str(folder)
  assert [(arm["task"], arm["length"]) for arm in results["arms"]] == [("sudoku", 4), ("countdown", 4)]
  for arm in results["arms"]:
    assert arm["sampler"] == {
      "completion_length": arm["length"],
      "diffusion_steps": arm["length"] // 2,
      "block_length": 4,
      "temperature": 0.0,
      "cfg_scale": 0.0,
      "remasking": "low_confidence",
      "early_exit": False,
      "cache": "none",
      "refresh_every": None,
      "look_behind": 16,
      "look_ahead": 16,
      "schedule": "static",
      "threshold": 0.9,
      "factor": 1.0,
      "max_reveal": 4,
    }
    assert arm["summary"]["n"] == 2
  # The prefill ends the prompt: without it the prompts are others, whatever is completed.
  config.update(prefill="", output=str(tmp_path / "plain"))
  plain = command.run(config)
  hashes = lambda r: {asked["prompts_sha256"] for asked in r["questions"].values()}
  assert len(hashes(plain)) == 2
  assert hashes(plain).isdisjoint(hashes(results))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"temperatures": ()}, "temperatures is empty"),
    ({"samples": 0}, "samples=0 must be a whole number of at least 1"),
    ({"lengths": (20,)}, "completion_length=20 is not a multiple of block_length=18"),
    ({"temperatures": (-1.0,)}, r"temperatures=\(-1\.0,\) must hold"),
    ({"split": "tests"}, "unknown split 'tests'; choose one of: demonstrations, train, validation, test"),
    ({"style": "loud"}, "unknown style 'loud'"),
    ({"tasks": ("chess",)}, "unknown task 'chess'"),
    ({"protocol": "loose"}, "unknown protocol 'loose'"),
    ({"remasking": "none"}, "remasking='none' is unknown"),
    ({"cache": "duel"}, "cache='duel' is unknown"),
    ({"schedule": "quick"}, "schedule='quick' is unknown"),
    ({"prompt_buckets": (4,)}, "every test prompt is longer than evaluation.prompt_buckets"),
    ({"tasks": ("gsm8k",), "style": "d1_eval"}, "gsm8k root is None"),
    ({"questions": 0}, "questions=0 must be a whole number of at least 1"),
  ],
)
def test_wrong_settings_are_one_line(finished, tmp_path, changes, message):
  workdir, _ = finished
  with pytest.raises(RunError, match=message):
    evaluate(workdir, tmp_path / "out", **changes)
  assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ("tiny,chess", "unknown preset word 'chess'; known: tiny, d1, sudoku"),
    ("tiny,llada_8b", "exclude each other"),
  ],
)
def test_words_that_make_no_sense_are_refused(words, message):
  with pytest.raises(ValueError, match=message):
    load("eval", words)


def test_a_folder_is_sampled_with_the_block_length_that_the_command_names(tmp_path):
  """And a checkpoint with that of its run."""
  config = load("eval")
  config.pretrained = str(hub.write(tmp_path / "sdar", "sdar"))
  with pytest.raises(RunError, match=r"block-causal, but config.json has no block_size: set model\.block"):
    subject.load(config)
  fields.choose(config, [("model.block", "4")])
  config.bare.update(mesh=config.mesh, cpu_devices=config.cpu_devices)
  config.bare.model.pretrained = config.pretrained
  assert experiments.build(config.bare, None, with_task=False).model.denoiser.block == 4
  config.tasks, config.block_length = ("sudoku",), 8
  with pytest.raises(RunError, match=r"block_length=8 does not divide the network's block of 4 .* use block_length=4"):
    command.run(config)
  config.checkpoint = str(tmp_path)
  with pytest.raises(RunError, match=r"model\.block is for a folder .*a checkpoint samples with the blocks of its run"):
    subject.load(config)


def test_nothing_to_evaluate_is_an_error(tmp_path):
  with pytest.raises(RunError, match=r"nothing to evaluate: set config\.checkpoint"):
    command.run(load("eval"))
  with pytest.raises(RunError, match="no checkpoint in"):
    evaluate(tmp_path)
  config = load("eval")
  config.pretrained = str(tmp_path)
  with pytest.raises(RunError, match=r"config\.json"):
    command.run(config)
