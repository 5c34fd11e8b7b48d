"""Reading a run: nothing in it changes, nothing that it names is executed, and damage is one line."""

import dataclasses
import json
import shutil

import pytest

import d1jax
from d1jax import export
from d1jax.errors import RunError
from d1jax.evaluation import command as evaluation
from d1jax.evaluation.subject import find_checkpoint, load, read_run
from d1jax.generation import command as generation
from d1jax.generation.generate import default_sampler
from d1jax.run import experiment as experiments
from d1jax.run.checkpoint import Checkpoints
from d1jax.run.workdir import claim, folder
from tests.jobs import load as load_config
from tests.jobs import small

EVIL = """
from pathlib import Path
Path(__file__).with_suffix(".ran").write_text("")
raise SystemExit(0)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A run with two checkpoints of weights that nobody trained; it names a Python file as its task and tracker."""
  workdir = tmp_path_factory.mktemp("written")
  config = small(workdir, "sft")
  experiment = experiments.build(config, None)
  module = workdir / "evil.py"
  module.write_text(EVIL)
  own = {"task": config.task.to_dict() | {"module": str(module)}, "trackers": str(module)}
  told = json.loads(json.dumps(config.to_dict() | own))
  claim(workdir, told, experiment.tokenizer.files, {})
  checkpoints = Checkpoints(workdir / "checkpoints" / "sft", writes=True)
  state = experiment.model.weights.fresh_state(experiment.optimizer(config.sft, config.sft.steps))
  for step, score in ((40, 0.5), (80, 0.25)):
    checkpoints.save(step, state, experiment.metadata() | {"config": told, "seconds": 1.0}, score)
  checkpoints.wait()
  checkpoints.close()
  return workdir


@pytest.fixture
def workdir(written, tmp_path):
  """A copy of it, whose name is a number."""
  return shutil.copytree(written, tmp_path / "20251129")


def configured(name: str, checkpoint, **changes):
  config = load_config(name)
  config.update(checkpoint=str(checkpoint), **changes)
  return config


def files(folder):
  return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["20251129", "\u00b2", "2024", "grpo"])
def test_a_work_directory_is_known_by_what_it_holds(written, tmp_path, name):
  home = tmp_path / name
  home.symlink_to(written)
  found = find_checkpoint(home)
  assert (found.home, found.workdir, found.named) == (home / "checkpoints" / "sft" / "40", home, False)
  named = find_checkpoint(home / "checkpoints" / "sft" / "80")
  assert (named.home, named.workdir, named.named) == (home / "checkpoints" / "sft" / "80", home, True)


def test_what_is_no_checkpoint_is_one_line_and_nothing_is_touched(tmp_path):
  (tmp_path / "2024").mkdir()
  (tmp_path / "mine.orbax-checkpoint-tmp").mkdir()
  for path in (tmp_path, tmp_path / "2024", tmp_path / "nowhere"):
    with pytest.raises(RunError, match="no checkpoint in"):
      find_checkpoint(path)
  assert (tmp_path / "mine.orbax-checkpoint-tmp").is_dir()


def test_a_run_in_a_bucket_is_found_as_one_on_a_disk(bucket):
  for step, files in ((2, ("_CHECKPOINT_METADATA", "commit_success.txt")), (4, ("_CHECKPOINT_METADATA",))):
    told = {"item_handlers": {}, "custom_metadata": {"fingerprint": "f", "config": {"seed": step}, "seconds": 0}}
    for name in files:
      path = bucket / "run" / "checkpoints" / "grpo" / str(step) / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(json.dumps(told))
  found = find_checkpoint(folder("gs://bucket/run"))  # step 4 is being written
  assert (str(found.home), str(found.workdir)) == ("gs://bucket/run/checkpoints/grpo/2", "gs://bucket/run")
  assert found.metadata["config"] == {"seed": 2}


def test_looking_at_a_run_changes_nothing_and_runs_nothing_of_it(workdir, tmp_path):
  half = workdir / "checkpoints" / "sft" / "120.orbax-checkpoint-tmp"
  half.mkdir()
  (half / "part").write_text("being written")
  before = files(workdir)
  load(configured("generate", workdir))
  (answer,) = generation.run(configured("generate", workdir, prompt="1003", prompt_buckets=(33,)))
  assert isinstance(answer.text, str)
  exported = export.run(configured("export", workdir, output=str(tmp_path / "out")))
  # The folder says how the run sampled, and `generate` follows it.
  trained = read_run(find_checkpoint(workdir), configured("export", workdir))[1].sampler
  expected = dataclasses.replace(trained.greedy(), early_exit=True)
  assert default_sampler(d1jax.from_pretrained(exported)) == expected
  assert "| base | none: the weights were drawn |" in (exported / "README.md").read_text()
  with pytest.raises(RunError, match=r"Python file .*evil\.py: its code is run only if .* --config\.module="):
    evaluation.run(configured("eval", workdir, output=str(tmp_path / "eval")))
  assert files(workdir) == before
  assert not (tmp_path / "eval").exists()


def test_a_damaged_tokenizer_is_one_line_with_a_remedy(workdir):
  (workdir / "tokenizer" / "tokenizer.model").write_bytes(b"")
  before = files(workdir)
  message = r"tokenizer\.model is damaged.*: run the command that trained it again, which makes the tokenizer anew"
  with pytest.raises(RunError, match=message) as caught:
    load(configured("generate", workdir))
  assert "\n" not in str(caught.value)
  assert files(workdir) == before


@pytest.mark.parametrize("damaged", ["_CHECKPOINT_METADATA", "metrics/metrics", "state/manifest.ocdbt"])
def test_another_checkpoint_serves_for_a_damaged_one(workdir, damaged, caplog):
  (workdir / "checkpoints" / "sft" / "40" / damaged).write_bytes(b"")
  before = files(workdir)
  assert load(configured("generate", workdir)).name == str(workdir / "checkpoints" / "sft" / "80")
  assert "sft/40" in caplog.text
  with pytest.raises(RunError, match=r"checkpoint .*sft/40 cannot be read") as caught:
    load(configured("generate", workdir / "checkpoints" / "sft" / "40")) if damaged != "metrics/metrics" else (
      find_checkpoint(workdir).checkpoints._score(40)
    )
  assert "\n" not in str(caught.value)
  assert files(workdir) == before


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model": None}, "not that of a run"),
    ({"rollout": 3}, "not that of a run"),
    ({"task": {}}, "not that of a run"),
    ({"sft": {}}, "not that of a run"),
    ({"rollout": {"temperature": "hot"}}, r"rollout\.temperature='hot' must be a finite number"),
    ({"model": {"unroll": 0}}, r"model\.unroll=0 must be a whole number of at least 1"),
  ],
)
def test_a_configuration_that_no_run_wrote_is_one_line(workdir, change, message):
  for step in (40, 80):
    path = workdir / "checkpoints" / "sft" / str(step) / "_CHECKPOINT_METADATA"
    found = json.loads(path.read_text())
    config = found["custom_metadata"]["config"]
    for section, fields in change.items():
      config[section] = config[section] | fields if fields and isinstance(fields, dict) else fields
    path.write_text(json.dumps(found))
  with pytest.raises(RunError, match=message) as caught:
    load(configured("generate", workdir))
  assert "\n" not in str(caught.value)
