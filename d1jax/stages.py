"""Runs or resumes one stage of a work directory: its checkpoints, its loop, its best weights."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from d1jax.errors import RunError, explained, input_checked
from d1jax.fingerprint import fingerprint
from d1jax.page.writer import Page
from d1jax.parallel import multihost
from d1jax.results import Outcome
from d1jax.run import experiment as experiments
from d1jax.run import opening, trackers
from d1jax.run.checkpoint import Checkpoints, Restored
from d1jax.run.experiment import Experiment
from d1jax.run.interrupts import Interrupts
from d1jax.run.workdir import Folder
from d1jax.state import Params, TrainState, all_finite
from d1jax.telemetry import profile
from d1jax.training import loop
from d1jax.training.ahead import Ahead
from d1jax.weights import check_base

Advancer = Callable[[Restored], Callable[[TrainState, int], tuple[TrainState, dict[str, float]]]]
"""Takes what to start from, and returns the function that runs one iteration of a stage."""


class Carried(Protocol):
  """What a stage carries from one iteration to the next beside its state: a curriculum."""

  def state(self) -> dict[str, Any]:
    """What the metadata of a checkpoint holds of it."""
    ...

  def restore(self, metadata: Mapping[str, Any]) -> None:
    """Takes what a checkpoint holds; one that has nothing begins anew."""
    ...


class Validation(NamedTuple):
  """The validation of a stage.

  Attributes:
    compile: compiles everything that `score` needs.
    score: scores the weights of an iteration; higher is better.
    remedy: advice for the case that device memory runs out.
    questions: how many prompts are completed; 0: none, it is a loss.
  """

  compile: Callable[[], None]
  score: Callable[[Params, int], loop.Scored]
  remedy: str
  questions: int = 0


class Stages:
  """The stages of one work directory: what each needs to run, by its name."""

  def __init__(self, experiment: Experiment, workdir: Folder, interrupts: Interrupts):
    """Keeps the arguments; who adds a stage fills the tables."""
    self.experiment, self.workdir, self._interrupts = experiment, workdir, interrupts
    self.page = Page(workdir, experiment.config.report.compare)
    self.config, self._model = experiment.config, experiment.model
    self._profiled = profile.iterations(self.config.profile_steps, self.config[self.config.mode].steps)
    self._validations: dict[str, Validation] = {}
    self._optimizers: dict[str, optax.GradientTransformation] = {}
    self._rates: dict[str, np.ndarray] = {}

  def _smaller_parts(self, stage: str) -> str:
    """Advice for training that does not fit into memory."""
    return experiments.smaller_parts(self.config, stage, self._model.ways)

  def later(self, name: str) -> float:
    """What the run does after a stage, in validations of the stage, for its eta; 0: nobody knows."""
    return 0.0

  def waiting(self, name: str, checkpoints: Checkpoints, step: int) -> Any:
    """What the checkpoint of an iteration holds beside the state: shapes, types and placements; None: nothing."""
    return None

  def _train_stage(
    self,
    name: str,
    section: ConfigDict,
    fresh: Callable[[], TrainState],
    advancer: Advancer,
    shown: tuple[str, ...],
    checkpoints: Checkpoints,
    more: dict[str, str],
    before: float,
    carried: Sequence[Carried],
  ) -> None:
    """Runs a stage from its last good checkpoint to its end; afterwards the state is no longer in memory."""
    weights, validation, optimizer = self.experiment.model.weights, self._validations[name], self._optimizers[name]
    began, abstract = time.perf_counter(), weights.abstract_state(optimizer)
    start = checkpoints.restore_latest(abstract, functools.partial(self.waiting, name, checkpoints))
    if start:
      with input_checked():
        check_base(weights, start.metadata)
        _check_pairs(more, start.metadata, self.workdir)
    if start and loop.is_over(start.step, start.metadata, section.steps, section.patience, section.seconds):
      return
    if start:
      print(f"{name}: goes on from iteration {start.step} of {section.steps}")
    if not start:
      with opening.timed(f"reading the weights for {name}"):
        start = Restored(0, fresh(), {"seconds": before})
    for one in carried:
      one.restore(start.metadata)
    with opening.timed(f"compiling the iterations of {name}"):
      for tree in (start.state, start.state.trainable):
        fingerprint(tree)  # compiles the program that each checkpoint uses
      placement = (weights.state_placement(optimizer),)
      finite = jax.jit(all_finite, in_shardings=placement, out_shardings=weights.replicated).lower(abstract).compile()
      advance = advancer(start)

    def validate(trainable: Params, iteration: int) -> loop.Scored:
      with explained(f"{name}: validation", validation.remedy):
        return validation.score(trainable, iteration)

    stage = loop.Stage(
      name,
      section.steps,
      advance,
      validate,
      finite,
      loop.Cadence(
        section.validate_every, section.save_every, section.max_skipped_steps, section.patience, section.seconds
      ),
      self._rates[name],
      trackers.entries(self.config.trackers),
      shown,
      self.experiment.metadata() | more,
      began,
      profile.Profile(self._profiled if name == self.config.mode else range(0), name, self.workdir / "profile"),
      self.page.draw,
      self.later(name),
      lambda: {name: value for one in carried for name, value in one.state().items()},
      advance.waiting if isinstance(advance, Ahead) else lambda: None,
    )
    loop.run(stage, start, checkpoints, self.workdir, self._interrupts)

  def _run_stage(
    self,
    name: str,
    section: ConfigDict,
    fresh: Callable[[], TrainState],
    advancer: Advancer,
    shown: tuple[str, ...],
    more: dict[str, str] | None = None,
    before: float = 0.0,
    carried: Sequence[Carried] = (),
  ) -> Outcome:
    """Runs or resumes a stage. Nothing is computed twice; from a finished stage only the best weights are read.

    Its checkpoints have `more` metadata, and the state of what is `carried`; its seconds begin at `before`.
    """
    home, weights = self.workdir / "checkpoints" / name, self.experiment.model.weights
    checkpoints, abstract = Checkpoints(home, writes=True), weights.abstract_state(self._optimizers[name])

    def last() -> tuple[int, bool]:
      """The last saved step, and whether the stage ended with it."""
      step = max(checkpoints.steps(), default=0)
      over = lambda: loop.is_over(step, checkpoints.metadata(step), section.steps, section.patience, section.seconds)
      return step, step > 0 and over()

    found = lambda: multihost.from_main(last)
    with explained(name, self._smaller_parts(name)):
      step: int | None = None
      while step is None or not found()[1]:  # a damaged last checkpoint has been set aside and is made again
        if not found()[1]:
          self._train_stage(name, section, fresh, advancer, shown, checkpoints, more or {}, before, carried)
        best = checkpoints.best_evaluated(abstract)
        if best is None:
          raise RunError(f"{home} lost its checkpoints while the stage ran; run the same command again")
        step = best[0]
        del best  # this read only proved that the weights are good; they are read again when needed
      with input_checked():
        check_base(weights, checkpoints.metadata(step))
      end = checkpoints.metadata(found()[0])
      trained = end.get("trainable") or fingerprint(checkpoints.restore_evaluated(found()[0], abstract))
      checkpoints.close()
    return Outcome(step, trained, float(end["seconds"]), home / str(step))

  def best(self, name: str) -> Params:
    """The best weights of a finished stage."""
    checkpoints = Checkpoints(self.workdir / "checkpoints" / name)
    found = checkpoints.best_evaluated(self.experiment.model.weights.abstract_state(self._optimizers[name]))
    checkpoints.close()
    if found is None:
      raise RunError(f"{checkpoints.folder} lost its checkpoints while the run went on; run the same command again")
    return found[1]


def _check_pairs(now: dict[str, str], saved: Mapping[str, Any], workdir: Folder) -> None:
  """Raises a ValueError if the pairs are not those that a checkpoint was trained on."""
  if now.get("pairs") != saved.get("pairs"):
    raise ValueError(
      f"the pairs are not those that the checkpoints in {workdir} were trained on: put the file of pairs back, or use"
      " --config.workdir=... for a new run"
    )
