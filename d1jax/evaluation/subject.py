"""The evaluated model: a checkpoint of a run, or a model folder that was downloaded or exported."""

import contextlib
import dataclasses
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from d1jax import generation_config
from d1jax.errors import RunError, harmless, input_checked
from d1jax.fingerprint import fingerprint
from d1jax.parallel import multihost
from d1jax.publish import Publisher
from d1jax.run import experiment as experiments
from d1jax.run import opening, run_tokenizer
from d1jax.run.checkpoint import Checkpoints, is_step
from d1jax.run.experiment import Experiment
from d1jax.run.identity import STAGES
from d1jax.run.workdir import Folder, folder, is_workdir
from d1jax.source import fetch
from d1jax.state import Frozen, Params, TrainState, merge_for_rollout
from d1jax.weights import check_base


def saying(what: str) -> AbstractContextManager[None]:
  """Says on standard error what takes long, and how long it took; standard output is for results."""
  return opening.timed(harmless(what), on_stderr=True) if multihost.is_main() else contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Subject:
  """The evaluated weights, with their experiment.

  Attributes:
    name: the folder of the weights.
    home: the default folder of evaluations.
    experiment: network, tokenizer, mesh, and the task of training.
    trainable: the trained weights.
    frozen: their base.
    fingerprint: the fingerprint of `trainable`.
  """

  name: str
  home: Folder
  experiment: Experiment
  trainable: Any
  frozen: Frozen
  fingerprint: str

  def params(self) -> Params:
    """The published weights. Call this only once, because the merge of adapters donates a float base."""
    weights = self.experiment.model.weights
    if not weights.merges:
      shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.trainable)
      return Publisher(weights, shapes)(self.trainable, self.frozen.base)
    placements = (weights.trainable_placement, weights.frozen_placement())
    program = jax.jit(
      merge_for_rollout, in_shardings=placements, out_shardings=weights.base_placement, donate_argnums=1
    )
    return program(self.trainable, self.frozen)


@dataclasses.dataclass(frozen=True)
class Found:
  """A readable checkpoint.

  Attributes:
    home: its folder; if it was not named and is damaged, another checkpoint of the stage is used instead.
    checkpoints: the checkpoints of its stage.
    named: whether the user named exactly this checkpoint.
  """

  home: Folder
  checkpoints: Checkpoints
  named: bool

  @property
  def metadata(self) -> dict[str, Any]:
    """The metadata of the checkpoint."""
    return self.checkpoints.metadata(int(self.home.name))

  @property
  def workdir(self) -> Folder:
    """The work directory of its run."""
    return self.home.parent.parent.parent

  def trainable(self, abstract: TrainState) -> tuple[Folder, Params]:
    """The checkpoint that was read, and its weights.

    Raises:
      RunError: no checkpoint could be read.
    """
    if self.named:
      return self.home, self.checkpoints.restore_evaluated(int(self.home.name), abstract)
    found = self.checkpoints.best_evaluated(abstract)
    if found is None:
      raise RunError(f"the checkpoints of {self.home.parent} are gone; run the same command again")
    return self.home.parent / str(found[0]), found[1]


def find_checkpoint(path: Folder) -> Found:
  """Finds a checkpoint: `path` itself, or the best one of the last stage in the work directory `path`.

  Nothing is written. A work directory is recognised by its content, not by its name.

  Raises:
    RunError: there is no checkpoint, or all are damaged.
  """
  stage, step, named = multihost.from_main(lambda: _choose(path))
  home = path.parent if named else path / "checkpoints" / stage
  return Found(home / str(step), Checkpoints(home), named)


def _choose(path: Folder) -> tuple[str, int, bool]:
  """The stage, the step, and whether the user named them."""
  if is_workdir(path):
    for stage in STAGES:
      checkpoints = Checkpoints(path / "checkpoints" / stage)
      if (best := checkpoints.best_step()) is not None:
        return stage, best, False
      if checkpoints.passed:
        raise RunError(f"every checkpoint in {checkpoints.folder} is damaged; name one of another stage or run")
  place = path.absolute() if isinstance(path, Path) else path
  if is_step(place.name) and place.parent.parent.name == "checkpoints" and place.is_dir():
    return place.parent.name, int(place.name), True
  raise RunError(
    f"no checkpoint in {path}: give a work directory of a run, or a folder like WORKDIR/checkpoints/grpo/400"
  )


def read_run(found: Found, config: ConfigDict) -> tuple[Folder, Experiment, Params]:
  """The checkpoint that was read, the experiment of its run, and its weights.

  No code that a checkpoint names is run: the task is left out. A folder that it names is opened, and this is logged.

  Args:
    found: the checkpoint.
    config: the command's configuration with `pretrained`, `mesh`, `cpu_devices`.

  Raises:
    RunError: something is damaged, or the checkpoint belongs to other weights.
  """
  with input_checked():
    metadata = found.metadata
    try:
      trained = experiments.of_checkpoint(metadata["config"], config)
      if trained.model.pretrained and config.pretrained is None and multihost.is_main():
        said = f"reading {trained.model.pretrained}, which the checkpoint names as its base"
        print(harmless(said), file=sys.stderr)
      if trained.model.pretrained:  # what a checkpoint names is not downloaded
        trained.model.pretrained = str(fetch(trained.model.pretrained, cached=config.pretrained is None))
      experiment = experiments.build(trained, run_tokenizer.kept(found.workdir, metadata), with_task=False)
      section = experiment.config[found.home.parent.name]
      abstract = experiment.model.weights.abstract_state(experiment.optimizer(section, section.steps))
    except (AttributeError, KeyError, TypeError) as error:
      raise ValueError(f"the configuration in checkpoint {found.home} is not that of a run ({error})") from error
  with saying(f"reading {found.home}"):
    home, trainable = found.trainable(abstract)
  with input_checked():
    check_base(experiment.model.weights, metadata)
  return home, experiment, trainable


def of_run(found: Found, config: ConfigDict) -> Subject:
  """The weights of a run's checkpoint with their experiment, which has no task; see `read_run`."""
  home, experiment, trainable = read_run(found, config)
  place = found.workdir / "eval"
  return Subject(str(home), place, experiment, trainable, experiment.model.weights.frozen, fingerprint(trainable))


def of_folder(bare: ConfigDict) -> Subject:
  """The weights of the model's folder `bare.model.pretrained` with their experiment, which has no task.

  Raises:
    ValueError: a field is wrong, or the folder cannot be read.
  """
  experiment = experiments.build(bare, None, with_task=False)
  weights = experiment.model.weights
  if weights.source is not None and (start := weights.source.as_start()) and multihost.is_main():
    print(harmless(start), file=sys.stderr)
  with saying(f"reading {bare.model.pretrained}"):
    trainable = weights.start(weights.base_dtype)
    jax.block_until_ready(trainable)
  home = Path("runs") / "eval"
  return Subject(bare.model.pretrained, home, experiment, trainable, weights.frozen, fingerprint(trainable))


def load(config: ConfigDict) -> Subject:
  """Reads the checkpoint `config.checkpoint`, or else the folder `config.pretrained`.

  Raises:
    RunError: no model is named, it cannot be read, or a checkpoint that validation did not choose would be evaluated
      on the test split.
  """
  if config.checkpoint is not None:
    if config.bare.model.get("block") is not None:
      raise RunError("model.block is for a folder (config.pretrained); a checkpoint samples with the blocks of its run")
    return _checkpoint(find_checkpoint(folder(config.checkpoint)), config)
  if not config.pretrained:
    raise RunError(
      "nothing to evaluate: set config.checkpoint (a work directory or a checkpoint's folder), config.pretrained (a"
      " model's folder) or config.generations (a file of completions)"
    )
  bare = ConfigDict(config.bare.to_dict())
  bare.update(mesh=config.mesh, cpu_devices=config.cpu_devices)
  bare.model.pretrained = config.pretrained
  with input_checked():
    found = of_folder(bare)
    experiment, source = found.experiment, found.experiment.model.weights.source
    own = generation_config.read_sampler(source.folder) if source else None
    if own is not None and multihost.is_main():
      said = f"{own.completion_length} tokens, blocks of {own.block_length}, {own.diffusion_steps} steps"
      print(harmless(f"{config.pretrained}/{generation_config.FILE} says how it samples: {said}"), file=sys.stderr)
    sampler = (own or experiment.sampler).for_block(experiment.model.denoiser.block)
  return dataclasses.replace(found, experiment=dataclasses.replace(experiment, sampler=sampler))


def _checkpoint(found: Found, config: ConfigDict) -> Subject:
  best = multihost.from_main(found.checkpoints.best_step)
  is_test = "split" in config and config.split == "test" and config.perplexity is None
  if is_test and int(found.home.name) != best and not config.chosen_beforehand:
    raise RunError(
      f"{found.home} meets the test split, but validation chose checkpoint {best}: a choice among test results would be"
      " part of them. Give the work directory, or use --config.split=validation; if the choice was made before any"
      " result was seen (always the last one, say), --config.chosen_beforehand=True"
    )
  return of_run(found, config)
