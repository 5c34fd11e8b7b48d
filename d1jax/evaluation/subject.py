"""What is evaluated: a checkpoint of a run, or a model's folder as it was downloaded or exported."""

import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from d1jax.errors import RunError, input_checked
from d1jax.fingerprint import fingerprint
from d1jax.state import Frozen
from d1jax.training.checkpoint import Checkpoints
from d1jax.training.experiment import Experiment, build, of_checkpoint
from d1jax.training.weights import check_base
from d1jax.training.workdir import Folder, folder, read_tokenizer


@dataclasses.dataclass(frozen=True)
class Subject:
  """Weights and what they were made with.

  Attributes:
    name: the folder they came from.
    home: where evaluations go by default.
    experiment: network, tokenizer, mesh, and the task they were trained on.
    trainable: what was trained.
    frozen: its base.
    fingerprint: of `trainable`.
  """

  name: str
  home: Folder
  experiment: Experiment
  trainable: Any
  frozen: Frozen
  fingerprint: str


def find_checkpoint(path: Folder) -> Folder:
  """The folder of one checkpoint: `path` itself, or the best of the last stage of the work directory `path`.

  Raises:
    RunError: there is none.
  """
  if path.name.isdigit() and path.is_dir():
    return path
  for stage in ("grpo", "sft"):
    home = path / "checkpoints" / stage
    if home.is_dir() and (best := Checkpoints(home).best_step()) is not None:
      return home / str(best)
  raise RunError(
    f"no checkpoint in {path}: give a work directory of a run, or a folder like WORKDIR/checkpoints/grpo/400"
  )


def load(config: ConfigDict) -> Subject:
  """Reads what `config.checkpoint`, or else `config.pretrained`, names.

  Raises:
    RunError: nothing is named, it cannot be read, or a checkpoint that validation did not choose would meet the test
      split.
  """
  if config.checkpoint is not None:
    return _checkpoint(find_checkpoint(folder(config.checkpoint)), config)
  if config.pretrained is None:
    raise RunError(
      "nothing to evaluate: set config.checkpoint (a work directory or a checkpoint's folder), config.pretrained (a"
      " model's folder) or config.generations (a file of completions)"
    )
  bare = ConfigDict(config.bare.to_dict())
  bare.update(mesh=config.mesh, cpu_devices=config.cpu_devices)
  bare.model.pretrained = config.pretrained
  with input_checked():
    experiment = build(bare, None)
    trainable = experiment.weights.start(experiment.weights.base_dtype)
  home = Path("runs") / "eval"
  return Subject(config.pretrained, home, experiment, trainable, experiment.weights.frozen, fingerprint(trainable))


def _checkpoint(home: Folder, config: ConfigDict) -> Subject:
  checkpoints, step = Checkpoints(home.parent), int(home.name)
  best = checkpoints.best_step()
  if "split" in config and config.split == "test" and step != best and not config.chosen_beforehand:
    raise RunError(
      f"{home} meets the test split, but validation chose checkpoint {best}: a choice among test results would be"
      " part of them. Give the work directory, or use --config.split=validation; if the choice was made before any"
      " result was seen (always the last one, say), --config.chosen_beforehand=True"
    )
  metadata = checkpoints.metadata(step)
  trained = of_checkpoint(metadata["config"], config)
  workdir = home.parent.parent.parent
  with input_checked():
    experiment = build(trained, read_tokenizer(workdir))
  section = trained[home.parent.name]
  abstract = experiment.weights.abstract_state(experiment.optimizer(section, section.steps))
  trainable = checkpoints.restore(step, abstract).state.trainable
  with input_checked():
    check_base(experiment.weights, metadata)
  return Subject(str(home), workdir / "eval", experiment, trainable, experiment.weights.frozen, fingerprint(trainable))
