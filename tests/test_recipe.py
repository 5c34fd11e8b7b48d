"""The whole job in this process, on eight devices: what it leaves behind, how it goes on, that it never recompiles."""

import json
import shutil
import struct
import zlib

import jax
import numpy as np
import pytest

from d1jax import recipe
from d1jax.errors import RunError
from d1jax.fingerprint import fingerprint
from d1jax.generation.canvas import END, SILENT
from d1jax.page import samples, writer
from d1jax.report import summary
from d1jax.run import experiment as experiments
from d1jax.run.checkpoint import Checkpoints
from d1jax.run.metrics import read_records
from d1jax.run.run_tokenizer import kept_in
from d1jax.state import Frozen
from d1jax.telemetry import ledger
from d1jax.training import configured, dump
from tests import runs
from tests.jobs import small
from tests.telemetry import formulas


@pytest.fixture(scope="module")
def finished():
  return runs.finished()


def pixels(path):
  """The decoded bytes of a PNG's image data, by the format's own rules."""
  data, position, image = path.read_bytes(), 8, b""
  assert data[:8] == b"\x89PNG\r\n\x1a\n"
  while position < len(data):
    (length,) = struct.unpack(">I", data[position : position + 4])
    if data[position + 4 : position + 8] == b"IDAT":
      image += data[position + 8 : position + 8 + length]
    position += 12 + length
  return zlib.decompress(image)


def test_results_hold_what_they_promise(finished):
  workdir, config, results = finished
  assert json.loads((workdir / "results.json").read_text()) == json.loads(json.dumps(results))  # tuples become lists
  for arm in ("before", "after", "baseline"):
    assert results[arm]["n"] == 24
    for metric in ("solved", "cell_accuracy"):
      low, high = results[arm][f"{metric}_interval"]
      assert 0 <= low <= results[arm][metric] <= high <= 1
  assert results["baseline"]["solved"] == 0
  assert 0.1 < results["baseline"]["cell_accuracy"] < 0.4
  assert len(results["params_fingerprint"]) == 64
  assert set(results["seconds"]) == {"sft", "grpo", "this_invocation"}
  assert results["config"] == config.to_dict()
  assert results["versions"]["jax"] == jax.__version__
  assert len(results["samples"]) == 5
  assert len(results["revision"]["source"]) == 64
  sizes = {name: split["n"] for name, split in results["splits"].items()}
  assert sizes == {"demonstrations": 16, "train": 64, "validation": 16, "test": 24}
  assert len({split["sha256"] for split in results["splits"].values()}) == 4


def records_with_validation(workdir):
  return [record for record in read_records(workdir / "metrics.jsonl") if "validation" in record]


def test_files_are_written(finished):
  workdir, _, _ = finished
  assert len(set(pixels(workdir / "learning_curves.png"))) > 20
  for arm in ("before", "after"):
    lines = (workdir / "completions" / f"{arm}.jsonl").read_text().splitlines()
    assert len(lines) == 24
    assert set(json.loads(lines[0])) == {"record", "text", "reward", "metrics"}
  validated = [(r["stage"], r["iteration"], r["validation"]) for r in records_with_validation(workdir)]
  kept = samples.read(workdir)
  assert [(one.stage, one.iteration, one.solved[0]) for one in kept] == validated
  for one in kept:
    assert len(one.samples) == samples.COUNT
    for sample in one.samples:
      assert "".join(sample.pieces).rstrip(END).replace(SILENT, "") == sample.text
      assert {*sample.steps} == {*range(max(sample.steps) + 1)}
  page = (workdir / "report.html").read_text(encoding="utf-8")
  assert page == writer.drawn(workdir, None)
  assert "finished after 4 iterations of diffu-GRPO" in page
  events = b"".join(p.read_bytes() for p in (workdir / "tensorboard" / "grpo").iterdir())
  assert b"reward" in events
  assert b"validation" in events


def own_rate(config, stage, iteration):
  """The learning rate of an iteration's last optimiser step: a line up from 0, and down to 0 at the end."""
  mu, warmup = (config.grpo.num_iterations if stage == "grpo" else 1), config[stage].warmup_steps
  step, steps = iteration * mu - 1, config[stage].steps * mu
  rate = min(step / warmup, 1 - (step - warmup) / (steps - warmup))
  return pytest.approx(config[stage].learning_rate * rate, rel=1e-5)


def test_metrics_have_one_record_an_iteration(finished):
  workdir, config, _ = finished
  records = read_records(workdir / "metrics.jsonl")
  for stage in ("sft", "grpo"):
    own = [r for r in records if r["stage"] == stage]
    assert [r["iteration"] for r in own] == list(range(1, config[stage].steps + 1))
    every = config[stage].validate_every
    assert [r["iteration"] for r in own if "validation" in r] == list(range(every, config[stage].steps + 1, every))
    assert all(np.isfinite(r["loss"]) for r in own)
    assert [r["learning_rate"] for r in own] == [own_rate(config, stage, r["iteration"]) for r in own]
  assert any(r["reward_std"] > 0 and r["grad_norm"] > 0 for r in own), "the job has nothing to learn from"
  assert {"reward", "kl", "entropy", "no_signal", "tokens_per_second", "compiled_share"} <= set(own[0])


def test_each_record_says_what_its_iteration_cost(finished):
  workdir, config, _ = finished
  records = read_records(workdir / "metrics.jsonl")
  parts = {"sft": {"update"}, "grpo": {"rollout", "grading", "update"}}
  for stage, own in parts.items():
    first, *others = [r for r in records if r["stage"] == stage]
    names = {f"cost/seconds/{part}" for part in own | {"idle"}} | {"cost/devices"}
    names |= {f"cost/{kind}/{part}" for kind in ("flops", "tokens") for part in own - {"grading"}}
    assert names <= set.intersection(*(set(r) for r in [first, *others]))
    assert first["cost/seconds/compilation"] > 0
    assert not any("cost/seconds/compilation" in r for r in others)
    for before, record in zip([first, *others], others, strict=False):
      outside = {f"cost/seconds/{part}" for part in ("validation", "saving")}
      seconds = [value for name, value in record.items() if name.startswith("cost/seconds/") and name not in outside]
      assert sum(seconds) == pytest.approx(record["seconds"], rel=1e-9)
      assert all(value >= -1e-9 for name, value in record.items() if name.startswith("cost/"))
      assert ("cost/seconds/saving" in record) == ("validation" in before)
      assert ("cost/seconds/validation" in record) == ("validation" in record)
  assert record["cost/tokens/rollout"] == record["cost/tokens/update"] == 16 * 18
  size = experiments.build(config, kept_in(workdir)).model.network.size
  canvas = 33 + 18
  assert record["cost/flops/rollout"] == 4 * formulas.forward(size, 16, canvas, canvas, 18)
  assert record["cost/flops/update"] == 3 * formulas.forward(size, 16, canvas, canvas, 18)
  assert record["cost/flops/score"] == 0
  assert record["cost/devices"] == 8


def test_the_final_table_of_costs_adds_up(finished):
  workdir, config, results = finished
  spent = results["cost"]
  assert set(spent) == {"sft", "grpo", "total"}
  parts = [each for stage in ("sft", "grpo") for each in spent[stage].values()]
  for name in ("device_seconds", "share", "flops", "tokens"):
    assert sum(each[name] for each in parts) == pytest.approx(spent["total"][name], rel=1e-9)
  assert spent["total"]["share"] == 1
  assert spent["grpo"]["rollout"]["tokens"] == config.grpo.steps * 16 * 18
  assert spent["total"]["mfu"] is None  # nobody states the peak of a CPU
  seconds = sum(r["cost/seconds/rollout"] for r in read_records(workdir / "metrics.jsonl") if r["stage"] == "grpo")
  assert spent["grpo"]["rollout"]["device_seconds"] == pytest.approx(8 * seconds, rel=1e-9)
  assert ledger.table(spent) in summary(results, workdir)


def test_a_finished_job_reprints_its_table(finished, capsys, monkeypatch):
  _, config, results = finished
  monkeypatch.setattr(recipe, "Recipe", None)  # computing anything would fail
  assert recipe.run(config) == json.loads(json.dumps(results))
  shown = capsys.readouterr().out
  assert "is finished" in shown
  assert "constant answer" in shown
  assert "SFT + diffu-GRPO" in shown


def test_a_finished_job_makes_a_damaged_tokenizer_again(finished, tmp_path, capsys, monkeypatch):
  workdir, _, results = finished
  shutil.copytree(workdir, tmp_path / "run")
  model = tmp_path / "run" / "tokenizer" / "tokenizer.model"
  model.write_bytes(b"")
  monkeypatch.setattr(recipe.Recipe, "run", None)  # computing anything would fail
  assert recipe.run(small(tmp_path / "run", **runs.CHANGES)) == json.loads(json.dumps(results))
  assert "is finished" in capsys.readouterr().out
  assert model.read_bytes() == (workdir / "tokenizer" / "tokenizer.model").read_bytes()


@pytest.mark.slow(reason="runs the recipe")
def test_more_steps_go_on_from_the_end(finished, tmp_path):
  workdir, _, results = finished
  shutil.copytree(workdir, tmp_path / "longer")
  config = small(tmp_path / "longer", **runs.CHANGES | {"grpo__dump_every": 0, "grpo__steps": 6})
  longer = recipe.run(config)
  assert longer["params_fingerprint"] != results["params_fingerprint"]
  records = [r for r in read_records(tmp_path / "longer" / "metrics.jsonl") if r["stage"] == "grpo"]
  assert [r["iteration"] for r in records] == [1, 2, 3, 4, 5, 6]
  assert longer["cost"]["grpo"]["rollout"]["tokens"] == 6 * 16 * 18, "both attempts count"


def test_another_config_is_refused_and_nothing_changes(finished):
  workdir, _, _ = finished
  before = (workdir / "config.json").read_bytes()
  with pytest.raises(RunError, match=r"grpo\.loss\.beta was .*, now 0\.5.*May change on a resume"):
    recipe.run(small(workdir, **runs.CHANGES, grpo__loss__beta=0.5))
  assert (workdir / "config.json").read_bytes() == before


def test_other_questions_are_refused(finished, tmp_path):
  """A data file that changed between two starts of a run."""
  workdir, _, results = finished
  shutil.copytree(workdir, tmp_path / "run")
  (tmp_path / "run" / "results.json").unlink()
  path = tmp_path / "run" / "splits.json"
  splits = json.loads(path.read_text())
  assert splits == results["splits"]
  splits["train"]["sha256"] = "0" * 64
  path.write_text(json.dumps(splits))
  with pytest.raises(RunError, match=r"the questions of train are not those that .* began with"):
    recipe.run(small(tmp_path / "run", **runs.CHANGES))


def test_any_mesh_can_go_on(finished, tmp_path, caplog):
  """Files were damaged meanwhile: the tokenizer is trained again, and lost records are said."""
  workdir, _, results = finished
  shutil.copytree(workdir, tmp_path / "moved")
  (tmp_path / "moved" / "results.json").unlink()
  model = tmp_path / "moved" / "tokenizer" / "tokenizer.model"
  for damaged in (model, tmp_path / "moved" / "metrics.jsonl"):
    damaged.write_bytes(b"")
  mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
  moved = recipe.run(small(tmp_path / "moved", **runs.CHANGES, **mesh))
  assert moved["params_fingerprint"] == results["params_fingerprint"]
  assert moved["after"]["n"] == 24
  assert "metrics.jsonl lacks records that were written: 30 of the 30 of sft and 4 of the 4 of grpo" in caplog.text
  assert model.read_bytes() == (workdir / "tokenizer" / "tokenizer.model").read_bytes()


@pytest.mark.slow(reason="compiles programs of its own")
def test_a_dumped_rollout_replays_to_the_same_state(finished):
  """Checkpoint 2, the rollout of iteration 2 (counted from 0) and the one after: together they give checkpoint 4."""
  workdir, config, _ = finished
  experiment = experiments.build(config, kept_in(workdir))
  optimizer = experiment.optimizer(config.grpo, config.grpo.steps)
  abstract = experiment.model.weights.abstract_state(optimizer)
  checkpoints = Checkpoints(workdir / "checkpoints" / "grpo")
  state = checkpoints.restore(2, abstract).state
  programs = configured.programs(experiment, optimizer)
  programs.compile()
  for iteration in (2, 3):
    dumped = dump.read(workdir / "rollouts", iteration)
    halves = [
      jax.tree.map(lambda x, i=i: jax.device_put(np.split(x, 2)[i], experiment.model.by_row), dumped.rollout)
      for i in (0, 1)
    ]
    state, _, advantages = programs.update(state, Frozen({}, {}), tuple(halves), dumped.rewards)
    np.testing.assert_array_equal(advantages, dumped.advantages)
    assert dumped.rollout.completion.shape == (16, 18)
    assert len(dumped.texts) == 16
  assert fingerprint(state) == checkpoints.metadata(4)["fingerprint"]


def test_checkpoints_say_all_that_is_needed(finished):
  workdir, config, _ = finished
  metadata = Checkpoints(workdir / "checkpoints" / "grpo").metadata(4)
  assert metadata["data"] == {"next_index": 4}
  assert metadata["config"]["grpo"]["learning_rate"] == config.grpo.learning_rate
  assert metadata["base"] is None  # every weight is trained
  assert metadata["seconds"] > 0


def test_of_equally_good_checkpoints_the_later_is_the_best(finished):
  _, _, results = finished
  assert results["best_iteration"] == {"sft": 30, "grpo": 4}  # nothing is solved: all are equal


@pytest.mark.slow(reason="runs the recipe")
def test_sft_alone(tmp_path, capsys):
  results = recipe.run(small(tmp_path, "sft", sft__steps=4))
  assert "before" not in results
  assert results["after"]["n"] == 24
  assert results["checkpoint"].startswith(str(tmp_path / "checkpoints" / "sft"))
  assert "SFT + diffu-GRPO" not in capsys.readouterr().out


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"mesh__tensor": 3}, "does not fit 8 devices"),
    ({"mesh__data": 1, "mesh__tensor": 8, "model__overrides__mlp": 60}, r"does not divide \['blocks'\]\['mlp'\]"),
    ({"sft__batch_size": 12}, r"sft\.batch_size is 12, .*use a multiple of 8"),
    ({"grpo__num_generations": 3}, "prompts_per_iteration x num_generations is 12"),
    ({"grpo__rollout_chunks": 4}, r"grpo\.rollout_chunks=4 parts"),
    ({"rollout__block_length": 4}, "completion_length=18 is not a multiple of block_length=4"),
    ({"rollout__diffusion_steps": 0}, "diffusion_steps=0"),
    ({"rollout__temperature": -1.0}, "temperature=-1.0"),
    ({"rollout__remasking": "hight"}, "remasking='hight' is unknown"),
    ({"sft__completion_buckets": (9,)}, "none of 16 demonstrations fits"),
    ({"sft__completion_buckets": (18, 9)}, "ascending"),
    ({"lora__rank": 4}, "sft.steps=120 with adapters"),
    ({"lora__rank": 4, "sft__steps": 0, "lora__targets": ("q_proj", "ff_proj")}, "ff_proj match no projection"),
    ({"model__quantize": "nf4"}, "set lora.rank"),
    ({"model__quantize": "None"}, "unknown model.quantize 'None'; choose one of: none, int8, nf4"),
    ({"model__size": "llada_8b"}, "--config.model.pretrained=FOLDER"),
    ({"model__pretrained": "/nowhere"}, "/nowhere/config.json is missing"),
    ({"task__protocol": "lax"}, "unknown protocol 'lax'"),
    (
      {"data__prompt_buckets": (20,)},
      r"every train prompt is longer than data.prompt_buckets=\(20,\), the shortest 33",
    ),
    ({"evaluation__prompt_buckets": (20,)}, "every test prompt is longer than evaluation.prompt_buckets"),
    ({"task__name": "sodoku"}, "unknown task 'sodoku'"),
    ({"task__style": "wordy"}, "unknown style 'wordy'"),
    ({"model__size": "huge"}, "model.size='huge' is unknown; known: .*dream_7b, .*tiny, small, llada_8b, .*"),
    ({"model__dtype": "float99"}, "model.dtype='float99' is unknown"),
    ({"tokenizer__model_type": "words"}, "tokenizer.model_type='words' is unknown"),
    ({"grpo__steps": 0}, r"grpo\.steps is 0"),
    ({"profile_steps": "2:9"}, r"profile_steps='2:9' must be FIRST:LAST, iterations of the stage, .* 1:6"),
    ({"grpo__aggregation": "mean"}, "aggregation='mean' is unknown"),
    ({"sft__decay": "cosine"}, "decay='cosine' is unknown"),
    ({"trackers": "tensorboard,wandbb"}, "unknown tracker 'wandbb'; known: tensorboard, trackio, wandb"),
    ({"data__root": "/nowhere"}, "sudoku/train.csv: not found in '/nowhere'"),
  ],
)
def test_bad_settings_are_one_line_and_claim_no_folder(tmp_path, changes, message):
  with pytest.raises(RunError, match=message) as caught:
    recipe.run(small(tmp_path / "run", **changes))
  assert "\n" not in str(caught.value)
  assert caught.value.exit_code == 2
  assert not (tmp_path / "run" / "config.json").exists()


def test_a_bad_row_of_a_data_file_is_named(tmp_path):
  (tmp_path / "sudoku").mkdir()
  (tmp_path / "sudoku" / "train.csv").write_text("Puzzle,Solution\n1234341221434321,1234\n")
  with pytest.raises(RunError, match=r"sudoku/train.csv line 2: solution '1234' has 4 digits, expected 16"):
    recipe.run(small(tmp_path / "run", data__root=str(tmp_path)))
