"""Runs on a pretrained folder: adapters, frozen and quantised bases, what is checkpointed, export."""

import dataclasses
import json
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

import d1jax
from d1jax import export, generation_config, recipe
from d1jax.errors import RunError
from d1jax.evaluation import command
from d1jax.models import lora, peft
from d1jax.models.lora import Adapter
from d1jax.models.tensor_files import TensorFiles
from d1jax.run import experiment as experiments
from d1jax.run.checkpoint import Checkpoints
from d1jax.run.metrics import read_records
from d1jax.run.run_tokenizer import kept_in
from d1jax.state import merge, merge_for_rollout
from d1jax.tasks.sudoku import Sudoku
from d1jax.training import configured, grpo
from tests import hub, hub_server, jobs
from tests.session import shared

FIELDS = {
  "lora.rank": 4,
  "lora.alpha": 8.0,
  "lora.dropout": 0.1,
  "data.prompt_buckets": (80,),
  "evaluation.prompt_buckets": (80,),
  "sft.prompt_buckets": (80,),
  "sft.completion_buckets": (20,),
  "sft.steps": 6,
  "sft.validate_every": 3,
  "sft.batch_size": 8,
  "sft.learning_rate": 1e-2,
  "rollout.completion_length": 20,
  "rollout.block_length": 20,
  "task.sizes.demonstrations": 16,
  "task.sizes.train": 32,
  "task.sizes.validation": 8,
  "task.sizes.test": 8,
  "grpo.steps": 2,
  "grpo.validate_every": 1,
  "grpo.prompts_per_iteration": 4,
  "grpo.num_generations": 4,
  "grpo.num_iterations": 2,
  "grpo.accumulation": 1,
  "grpo.rollout_chunks": 2,
  "grpo.loss.beta": 0.04,
  "grpo.learning_rate": 1e-2,
  "evaluation.batch_size": 8,
}


def job(name: str, folder, workdir, **changes) -> ConfigDict:
  config = jobs.load(name, "smoke")
  fields = FIELDS | {"model.pretrained": str(folder), "workdir": str(workdir)}
  if name == "grpo":
    fields["sft.steps"] = 0
  for field, value in (fields | {k.replace("__", "."): v for k, v in changes.items()}).items():
    if field.split(".")[0] in config:
      config.update_from_flattened_dict({field: value})
  config.lock()
  return config


def base():
  """A folder to train adapters on."""
  return shared("llada", hub.write)[0]


def adapted():
  """A run of supervised fine-tuning of adapters on the base: its folder, configuration and results."""
  workdir, results = shared("adapted", lambda workdir: recipe.run(job("sft", base(), workdir)))
  return workdir, job("sft", base(), workdir), results


@pytest.fixture(scope="module")
def folder():
  return base()


@pytest.fixture(scope="module")
def sft():
  return adapted()


@pytest.fixture(scope="module")
def tuned(folder, tmp_path_factory):
  """diffu-GRPO from the folder, adapters on its float base. Completions are paid by their letters alone: by the rules
  random ones earn nothing, and nothing would be learned.
  """
  workdir = tmp_path_factory.mktemp("grpo") / "run"
  config, honest = job("grpo", folder, workdir), Sudoku.grade

  def pay(self, text, record, protocol="strict"):
    reward = zlib.crc32(text.encode(errors="replace")) % 7 / 7
    return dataclasses.replace(honest(self, text, record, protocol), components={"letters": reward})

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Sudoku, "grade", pay)
    return workdir, config, recipe.run(config)


def state_of(workdir, stage, config):
  experiment = experiments.build(config, kept_in(workdir))
  section = config[stage]
  optimizer = experiment.optimizer(section, section.steps)
  checkpoints = Checkpoints(workdir / "checkpoints" / stage)
  restored = checkpoints.restore(max(checkpoints.steps()), experiment.model.weights.abstract_state(optimizer))
  return experiment, restored


@pytest.mark.slow(reason="reads a run that trains adapters")
def test_adapters_learn_and_the_base_stays(sft):
  workdir, config, results = sft
  losses = [r["loss"] for r in read_records(workdir / "metrics.jsonl")]
  assert np.mean(losses[-2:]) < np.mean(losses[:2])
  experiment, restored = state_of(workdir, "sft", config)
  assert results["base_fingerprint"] == experiment.model.weights.base_fingerprint == restored.metadata["base"]


@pytest.mark.slow(reason="reads a run that trains adapters")
def test_a_checkpoint_holds_the_adapters_alone(sft):
  workdir, config, _ = sft
  _, restored = state_of(workdir, "sft", config)
  trainable = restored.state.trainable
  kinds = jax.tree.leaves(trainable, is_leaf=lambda x: isinstance(x, Adapter))
  assert len(kinds) == 7
  assert all(isinstance(x, Adapter) for x in kinds)
  count = sum(x.size for x in jax.tree.leaves(trainable))
  moments = sum(x.size for x in jax.tree.leaves(restored.state.opt_state))
  assert 2 * count <= moments <= 2 * count + 8
  stored = sum(p.stat().st_size for p in (workdir / "checkpoints" / "sft" / "6").rglob("*") if p.is_file())
  assert stored < 3 * 4 * count + 400_000  # ids, metadata and indices beside the arrays


@pytest.mark.slow(reason="runs the recipe")
def test_an_adapter_run_goes_on_to_the_same_bits(sft, folder, tmp_path):
  _, _, results = sft
  # The decay depends on the total, so that the run to compare with stops at 3 of 6 by losing its last checkpoint.
  other = shutil.copytree(sft[0], tmp_path / "cut")
  shutil.rmtree(other / "checkpoints" / "sft" / "6")
  (other / "results.json").unlink()
  again = recipe.run(job("sft", folder, other))
  assert again["params_fingerprint"] == results["params_fingerprint"]


@pytest.mark.slow(reason="reads a run that trains adapters")
def test_adapters_of_another_base_are_refused(sft, folder, tmp_path):
  workdir = shutil.copytree(sft[0], tmp_path / "run")
  (workdir / "results.json").unlink()
  stranger = tmp_path / "stranger"
  shutil.copytree(folder, stranger)
  hub.folders.write(stranger, "llada", dtype="bfloat16", shards=2, seed=1, **hub.SIZES)
  hub._name_ids(stranger, hub.IDS)
  record = json.loads((workdir / "config.json").read_text())
  record["model"]["pretrained"] = str(stranger)
  (workdir / "config.json").write_text(json.dumps(record))
  with pytest.raises(RunError, match="trained on other weights"):
    recipe.run(job("sft", stranger, workdir))


@pytest.mark.parametrize("rank", [0, 4])
def test_a_damaged_folder_is_one_line_before_anything_is_written(folder, tmp_path, rank):
  damaged = shutil.copytree(folder, tmp_path / "damaged")
  shard = damaged / "model-00002-of-00002.safetensors"
  shard.write_bytes(shard.read_bytes()[:-100])
  with pytest.raises(RunError, match=r"model-00002-of-00002.safetensors cannot be read \(tensor .* is truncated\)"):
    recipe.run(job("grpo", damaged, tmp_path / "run", lora__rank=rank))
  assert not (tmp_path / "run").exists()


@pytest.mark.slow(reason="runs the recipe")
def test_the_reference_is_the_base_and_rollouts_are_merged(tuned):
  workdir, config, results = tuned
  records = [r for r in read_records(workdir / "metrics.jsonl") if r["stage"] == "grpo"]
  assert records[0]["ratio_deviation"] >= 0
  assert records[-1]["kl"] > 0, "the policy moved away from the base"
  assert records[-1]["reference_gap"] > 0
  for record in records:
    assert 0 <= record["merge_gap_mean"] <= record["merge_gap_max"] < 1e-4
  assert records[-1]["merge_gap_max"] > 0
  assert {"before", "after", "baseline"} <= results.keys()
  experiment, restored = state_of(workdir, "grpo", config)
  frozen = experiment.model.weights.frozen
  apart, added = merge(restored.state.trainable, frozen), merge_for_rollout(restored.state.trainable, frozen)
  assert isinstance(apart["blocks"]["mlp"]["up"], lora.Adapted)
  assert isinstance(added["blocks"]["mlp"]["up"], jax.Array)


@pytest.mark.slow(reason="runs the recipe")
@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.long)])
def test_a_quantised_base_trains_unmerged_and_is_exported_dense(folder, tmp_path, kind):
  """int8 and NF4 differ in how they are stored and read: tests/models/test_quantize.py."""
  config = job("grpo", folder, tmp_path / "run", model__quantize=kind, task__protocol="d1", grpo__steps=1)
  recipe.run(config)
  records = read_records(tmp_path / "run" / "metrics.jsonl")
  assert all("merge_gap_mean" not in r for r in records)
  experiment, restored = state_of(tmp_path / "run", "grpo", config)
  added = merge_for_rollout(restored.state.trainable, experiment.model.weights.frozen)
  assert isinstance(added["blocks"]["mlp"]["up"], lora.Adapted)
  exporting = export_config(checkpoint=tmp_path / "run", output=tmp_path / "out")
  exporting.mesh.update(data=-1, fsdp=1)  # one block of 64 cannot be shared by 8 devices
  target = export.run(exporting)
  stored = TensorFiles(folder).read("model.transformer.blocks.1.attn_out.weight").astype(np.float32)
  found = TensorFiles(target).read("model.transformer.blocks.1.attn_out.weight").astype(np.float32)
  assert np.abs(found - stored).max() < 0.02 * np.abs(stored).max() + 0.02, "an adapter's step, not NF4's rounding"
  assert (found == stored).mean() > 0.01


def eval_config(workdir) -> ConfigDict:
  config = jobs.load("eval")
  config.update(checkpoint=str(workdir))
  return config


@pytest.mark.slow(reason="compiles a rollout and an update twice")
def test_dropout_is_off_wherever_log_probabilities_meet(folder, tmp_path):
  """The same rollout and update with a dropout of 0 and of 0.9."""
  outcomes = []
  for rate in (0.0, 0.9):
    config = job("grpo", folder, tmp_path, lora__dropout=rate, task__protocol="d1")
    experiment = experiments.build(config, None)
    optimizer = experiment.optimizer(config.grpo, 4)
    programs = configured.programs(experiment, optimizer)
    programs.compile()
    state = experiment.model.weights.fresh_state(optimizer)
    grading = configured.grading(experiment)
    frozen = experiment.model.frozen
    advance = grpo.advancer(programs, grading, frozen, 0, tmp_path, seed=0, gap_every=4)
    state, metrics = advance(state, 0)
    outcomes.append((jax.tree.leaves(jax.device_get(state.trainable)), metrics["loss"], metrics["reward"]))
  for a, b in zip(outcomes[0][0], outcomes[1][0], strict=True):
    np.testing.assert_array_equal(a, b)
  assert outcomes[0][1:] == outcomes[1][1:]


@pytest.mark.slow(reason="runs the recipe")
def test_dropout_is_on_in_supervised_fine_tuning(sft, folder, tmp_path):
  recipe.run(job("sft", folder, tmp_path / "dry", lora__dropout=0.0, sft__steps=3))
  wet, dry = ([r["loss"] for r in read_records(w / "metrics.jsonl")] for w in (sft[0], tmp_path / "dry"))
  assert wet[0] == dry[0], "a fresh adapter adds nothing, whatever is dropped before it"
  assert wet[2] != dry[2]


def dense(folder, dtype=jnp.float32):
  return d1jax.from_pretrained(folder, dtype)


def export_config(**fields) -> ConfigDict:
  config = jobs.load("export")
  config.update(**{name: str(value) for name, value in fields.items()})
  return config


@pytest.mark.slow(reason="compiles merges of a run on every device")
def test_a_run_is_exported_merged_and_read_again(sft, folder, tmp_path):
  workdir, config, _ = sft
  target = export.run(export_config(checkpoint=workdir, output=tmp_path / "merged"))
  experiment, _ = state_of(workdir, "sft", config)
  checkpoints = Checkpoints(workdir / "checkpoints" / "sft")
  optimizer = experiment.optimizer(config.sft, config.sft.steps)
  best = checkpoints.restore(
    checkpoints.best_step(), experiment.model.weights.abstract_state(optimizer)
  ).state.trainable
  weights = dataclasses.replace(experiment.model.weights, base_dtype=jnp.bfloat16)
  expected = merge_for_rollout(best, weights.frozen)
  again = dense(target, jnp.bfloat16).params
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32), err_msg=str(path))
  before, after = TensorFiles(folder), TensorFiles(target)
  assert before.shapes == after.shapes
  untouched = [n for n in before.shapes if "norm" in n or "wte" in n or n.startswith("model.transformer.ff_out")]
  assert len(untouched) == 2 * 2 + 2
  for name in untouched:
    assert before.read(name).tobytes() == after.read(name).tobytes()
  assert (
    before.read("model.transformer.blocks.0.q_proj.weight").tobytes()
    != after.read("model.transformer.blocks.0.q_proj.weight").tobytes()
  )
  assert json.loads((folder / "config.json").read_text()) == json.loads((target / "config.json").read_text())
  for name in ("vocab.json", "tokenizer_config.json"):
    assert (folder / name).read_bytes() == (target / name).read_bytes()
  said = (target / "README.md").read_text()
  assert f"| base | {folder.name} |" in said
  assert str(folder.parent) not in said
  low, high = (100 * end for end in sft[2]["after"]["solved_interval"])
  assert f"| this model | {100 * sft[2]['after']['solved']:.1f} [{low:.1f}, {high:.1f}] |" in said


@pytest.mark.slow(reason="reads a run that trains adapters")
def test_an_adapter_folder_is_pushed_and_merges_to_the_same_model(sft, folder, tmp_path, monkeypatch):
  merged = export.run(export_config(checkpoint=sft[0], output=tmp_path / "merged"))
  with hub_server.running(monkeypatch, tmp_path / "cache") as stand_in:
    pushing = export_config(checkpoint=sft[0], output=tmp_path / "adapter", form="adapter", push_to_hub="lab/mine")
    with pytest.raises(RunError, match="push_to_hub=lab/mine needs a token that may write: set HF_TOKEN"):
      export.run(pushing)
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    adapter = export.run(pushing)
    assert stand_in.files["model/lab/mine"] == {path.name: path.read_bytes() for path in adapter.iterdir()}
  assert {p.name for p in adapter.iterdir()} == {peft.CONFIG, peft.WEIGHTS, "README.md", generation_config.FILE}
  assert (adapter / "README.md").read_text().partition("\n# ")[2].startswith("lab/mine\n")
  again = export.run(export_config(pretrained=folder, adapter=adapter, output=tmp_path / "again"))
  a, b = TensorFiles(merged), TensorFiles(again)
  assert a.shapes == b.shapes
  for name in a.shapes:
    assert a.read(name).tobytes() == b.read(name).tobytes(), name
  assert (merged / generation_config.FILE).read_bytes() == (again / generation_config.FILE).read_bytes()


@pytest.mark.slow(reason="reads a run that trains adapters")
def test_a_weight_of_a_wider_type_than_the_others_keeps_its_bits(sft, folder, tmp_path):
  mixed = shutil.copytree(folder, tmp_path / "mixed")
  name = "model.transformer.ln_f.weight"
  shard = TensorFiles(mixed).file_of(name)
  tensors = load_file(shard)
  tensors[name] = np.linspace(1, 2, tensors[name].size, dtype=np.float32)  # not bfloat16's numbers
  save_file(tensors, shard)
  adapter = export.run(export_config(checkpoint=sft[0], output=tmp_path / "adapter", form="adapter"))
  target = export.run(export_config(pretrained=mixed, adapter=adapter, output=tmp_path / "out"))
  assert {TensorFiles(target).dtypes[n] for n in TensorFiles(target).shapes} == {"F32", "BF16"}
  for untouched in (name, "model.transformer.wte.weight"):
    assert TensorFiles(target).read(untouched).tobytes() == TensorFiles(mixed).read(untouched).tobytes()


@pytest.mark.slow(reason="reads a run that trains adapters")
def test_a_base_that_has_moved_is_named(sft, folder, tmp_path):
  workdir = shutil.copytree(sft[0], tmp_path / "run")
  moved = shutil.copytree(folder, tmp_path / "moved")
  for step in (workdir / "checkpoints" / "sft").iterdir():
    if step.name.isdigit():
      for path in step.rglob("*"):
        if path.is_file() and str(folder).encode() in path.read_bytes():
          path.write_bytes(path.read_bytes().replace(str(folder).encode(), b"/gone"))
  target = export_config(checkpoint=workdir, output=tmp_path / "out")
  with pytest.raises(RunError, match=r"/gone/config\.json is missing"):
    export.run(target)
  config = eval_config(workdir)
  config.pretrained = target.pretrained = str(moved)
  assert command.run(config)["arms"][0]["summary"]["n"] == 8
  assert TensorFiles(export.run(target)).shapes == TensorFiles(folder).shapes


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({}, "config.output is not set"),
    ({"output": "x"}, "name a run with config.checkpoint"),
    ({"output": "x", "checkpoint": "/nowhere"}, "no checkpoint in /nowhere"),
    ({"output": "x", "pretrained": "/nowhere", "adapter": "y"}, "/nowhere/config.json is missing"),
    ({"output": "x", "form": "zip"}, "config.form is 'zip'; known: model, adapter"),
  ],
)
def test_bad_exports_are_one_line(fields, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(RunError, match=message):
    export.run(export_config(**fields))
  assert not list(tmp_path.iterdir())


@pytest.mark.slow(reason="reads a run that trains adapters")
def test_a_used_folder_is_not_overwritten(sft, tmp_path):
  (tmp_path / "used").mkdir()
  (tmp_path / "used" / "thesis.tex").touch()
  for form in export.FORMS:
    with pytest.raises(RunError, match="is not empty"):
      export.run(export_config(checkpoint=sft[0], output=tmp_path / "used", form=form))


@pytest.mark.slow(reason="runs the recipe")
def test_full_fine_tuning_starts_from_the_folder(folder, tmp_path):
  config = job("grpo", folder, tmp_path / "full", lora__rank=0, task__protocol="d1", grpo__steps=1)
  recipe.run(config)
  experiment, restored = state_of(tmp_path / "full", "grpo", config)
  start, trained = experiment.model.weights.start(), restored.state.trainable
  stored = dense(folder).params
  assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
  for a, b, c in zip(*map(jax.tree.leaves, (start, stored, trained)), strict=True):
    np.testing.assert_array_equal(a, b)
    assert a.shape == c.shape
  with pytest.raises(RunError, match="trained every weight"):
    export.run(export_config(checkpoint=tmp_path / "full", output=tmp_path / "a", form="adapter"))
