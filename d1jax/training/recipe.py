"""d1's whole recipe: masked SFT, then diffu-GRPO, then one look at the held-out split. Also SFT alone."""

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from d1jax import report
from d1jax.errors import RunError, explained, input_checked
from d1jax.evaluation.evaluator import Completer, Evaluation, Evaluator, baseline
from d1jax.files import FileError, read_json
from d1jax.fingerprint import fingerprint
from d1jax.parallel import multihost
from d1jax.state import Params, TrainState
from d1jax.tasks import split_hash
from d1jax.training import experiment as experiments
from d1jax.training import grpo, ledger, loop, profile, sft
from d1jax.training.checkpoint import Checkpoints, Restored
from d1jax.training.held_out import HeldOutLoss
from d1jax.training.identity import check_splits, flatten, holds_run, record_changes
from d1jax.training.interrupts import Interrupts
from d1jax.training.lock import locked
from d1jax.training.metrics import read_records
from d1jax.training.weights import check_base
from d1jax.training.workdir import Folder, claim, folder, read_tokenizer, revision, versions, write_json

log = logging.getLogger(__name__)
VALIDATION_METRIC = "solved"
"""What checkpoints are chosen by, on the validation split."""


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a stage leaves behind.

  Attributes:
    best: the weights with the best validation.
    best_step: their iteration.
    last: the weights at the end.
    seconds: that the stage took, earlier attempts included.
    checkpoint: the folder of the best weights.
  """

  best: Params
  best_step: int
  last: Params
  seconds: float
  checkpoint: Folder


class Recipe:
  """The stages of one work directory."""

  def __init__(self, config: ConfigDict, workdir: Folder, interrupts: Interrupts):
    """Builds everything that can be found wrong; nothing is written or trained yet."""
    multihost.check_same("the configuration", config.to_dict() | {"distributed": {}})
    held = multihost.from_main(lambda: holds_run(workdir, config.to_dict()))
    self.experiment = experiments.build(config, read_tokenizer(workdir) if held else None)
    experiments.check_batches(config, self.experiment.ways)
    experiments.check_lengths(config, self.experiment.length_ways)
    experiments.check_start(config)
    self.config, self.workdir, self._interrupts = config, workdir, interrupts
    self._profiled = profile.iterations(config.profile_steps, config[config.mode].steps)
    self._test = self.experiment.texts("test")
    self._completer = Completer(self.experiment)
    self._validators: dict[str, Callable[[Params], float]] = {}
    if config.sft.steps:
      self._demonstrations, held_out = sft.demonstrations(self.experiment)
      self._sft_optimizer = self.experiment.optimizer(config.sft, config.sft.steps)
      experiments.warn_of_warm_up("sft", config.sft, config.sft.steps)
      self._validators["sft"] = self._by_loss(held_out) if held_out else self._by_accuracy()
    if config.mode == "grpo":
      optimiser_steps = config.grpo.steps * config.grpo.num_iterations
      self._grpo_optimizer = self.experiment.optimizer(config.grpo, optimiser_steps)
      experiments.warn_of_warm_up("grpo", config.grpo, optimiser_steps)
      self._programs = grpo.Programs(self.experiment, self._grpo_optimizer)
      self._train = self.experiment.texts("train")
      self._validators["grpo"] = self._by_accuracy()

  def splits(self) -> dict[str, Any]:
    """How many questions each split in use has, and a hash of their records."""
    task = self.experiment.task
    names = ["test", "validation", *(["train"] if self.config.mode == "grpo" else [])]
    if self.config.sft.steps and not self.config.sft.data:
      names.append("demonstrations")
    found = {name: task.records(name) for name in names}
    if self.config.sft.steps and self.config.sft.data:
      found["sft.data"] = [{"prompt": a, "answer": b} for a, b in zip(*self._demonstrations, strict=True)]
    return {name: {"n": len(records), "sha256": split_hash(records)} for name, records in found.items()}

  def evaluator(self, texts: experiments.Texts) -> Callable[[Params], Evaluation]:
    """A greedy evaluation of what is trained, together with its frozen base; exact, also where rollouts are cached."""
    sampler = dataclasses.replace(self.experiment.sampler.with_cache("none"), temperature=0.0)
    evaluator = Evaluator(self._completer, self.experiment, texts, sampler, self.config.evaluation.batch_size)
    return lambda trainable: evaluator(trainable, self.experiment.weights.frozen)

  def _by_accuracy(self) -> Callable[[Params], float]:
    evaluate = self.evaluator(self.experiment.texts("validation"))
    return lambda trainable: evaluate(trainable).share(VALIDATION_METRIC).value

  def _by_loss(self, held_out: sft.Demonstrations) -> Callable[[Params], float]:
    loss = HeldOutLoss(self.experiment, held_out)
    return lambda trainable: loss(trainable, self.experiment.weights.frozen)

  def _run_stage(
    self,
    name: str,
    section: ConfigDict,
    optimizer: optax.GradientTransformation,
    fresh: Callable[[], TrainState],
    advancer: Callable[[int], Callable[[TrainState, int], tuple[TrainState, dict[str, float]]]],
    shown: tuple[str, ...],
  ) -> Outcome:
    """Runs or resumes a stage; nothing is computed twice."""
    began = time.perf_counter()
    home = self.workdir / "checkpoints" / name
    checkpoints = Checkpoints(home, writes=True)
    abstract = self.experiment.weights.abstract_state(optimizer)
    with explained("reading the base", "--config.model.quantize=nf4, or more devices"):
      metadata = {"config": self.config.to_dict(), "base": self.experiment.weights.base_fingerprint}
    with explained(name, f"smaller micro-batches: --config.{name}.accumulation={2 * section.accumulation}"):
      start = checkpoints.restore_latest(abstract)
      if start:
        with input_checked():
          check_base(self.experiment.weights, start.metadata)
      seconds = float(start.metadata["seconds"]) if start else 0.0
      if start is None or start.step < section.steps:
        start = start or Restored(0, fresh(), {})
        stage = loop.Stage(
          name,
          section.steps,
          advancer(start.step),
          self._validators[name],
          section.validate_every,
          shown,
          metadata,
          began,
          profile.Profile(self._profiled if name == self.config.mode else range(0), name, self.workdir / "profile"),
        )
        seconds = loop.run(stage, start, checkpoints, self.workdir, self._interrupts)
      last, best = checkpoints.restore_latest(abstract), checkpoints.restore_best(abstract)
      checkpoints.close()
    if last is None or best is None:
      raise RunError(f"{home} lost its checkpoints while the stage ran; run the same command again")
    return Outcome(best.state.trainable, best.step, last.state.trainable, seconds, home / str(best.step))

  def sft(self) -> Outcome:
    """Masked supervised fine-tuning from the run's start."""
    experiment, optimizer = self.experiment, self._sft_optimizer

    def advancer(position: int) -> Any:
      return sft.advancer(experiment, self._demonstrations, optimizer, position)

    fresh = functools.partial(experiment.weights.fresh_state, optimizer)
    return self._run_stage("sft", self.config.sft, optimizer, fresh, advancer, ("loss", "masked_ce"))

  def grpo(self, start: Params) -> Outcome:
    """diffu-GRPO from given weights, which stay the reference."""
    experiment, optimizer = self.experiment, self._grpo_optimizer
    frozen = experiment.weights.frozen
    if self._programs.needs_reference and experiment.weights.lora is None:
      frozen = frozen._replace(reference=start)

    def advancer(position: int) -> Any:
      self._programs.compile()
      return grpo.advancer(experiment, self._train, frozen, self._programs, position, self.workdir)

    fresh = functools.partial(experiment.weights.state_from, start, optimizer)
    with self._programs.grader:
      return self._run_stage("grpo", self.config.grpo, optimizer, fresh, advancer, grpo.SHOWN)

  def run(self) -> tuple[dict[str, Outcome], dict[str, Evaluation]]:
    """Runs the stages, then looks at the held-out split once.

    Returns:
      The stages' outcomes, and the evaluations `before` diffu-GRPO (of the start where there is no SFT) and `after`.
    """
    outcomes: dict[str, Outcome] = {}
    if self.config.sft.steps:
      outcomes["sft"] = self.sft()
    evaluate = self.evaluator(self._test)
    if self.config.mode == "sft":
      return outcomes, {"after": evaluate(outcomes["sft"].best)}
    start = outcomes["sft"].best if outcomes else self.experiment.weights.start()
    outcomes["grpo"] = self.grpo(start)
    return outcomes, {"before": evaluate(start), "after": evaluate(outcomes["grpo"].best)}


def run(config: ConfigDict) -> dict[str, Any]:
  """Runs the job that the configuration describes, or goes on with it, or reprints its table when it is finished.

  Returns:
    What `results.json` holds: `before` and `after` (with `grpo`) or `after` alone, `task`, `baseline`,
    `params_fingerprint`, `seconds` by stage, `cost` (see `ledger.total`), `splits`, `config`, `versions`, `revision`,
    `checkpoint`.
  """
  workdir = folder(config.workdir)
  finished = multihost.from_main(lambda: _finished(workdir, config))
  if finished:
    print(f"{workdir} is finished; this is its result again.\n")
    print(report.summary(finished, workdir))
    return finished
  began = time.monotonic()
  with (
    locked(workdir),
    Interrupts() as interrupts,
    explained("run", "smaller batches: --config.evaluation.batch_size=64"),
  ):
    with input_checked():
      recipe = Recipe(config, workdir, interrupts)
      splits = recipe.splits()
    multihost.check_same("the data", splits)
    multihost.from_main(lambda: _claim(recipe, splits))
    outcomes, evaluations = recipe.run()
    fingerprints = {
      "params_fingerprint": fingerprint(outcomes[config.mode].last),
      "base_fingerprint": recipe.experiment.weights.base_fingerprint,
    }
    rest = fingerprints | {"splits": splits}
    results = multihost.from_main(lambda: _write_results(recipe, outcomes, evaluations, began, rest))
  print(report.summary(results, workdir))
  return results


def _finished(workdir: Folder, config: ConfigDict) -> dict[str, Any] | None:
  """The results of this run, if it is finished."""
  path = workdir / "results.json"
  if not holds_run(workdir, config.to_dict()) or not path.exists():
    return None
  if path.is_dir():
    raise RunError(f"{path} is a folder, expected a file: move it away")
  try:
    results = read_json(path, dict)
    if _totals(results["config"]) != _totals(config.to_dict()):
      return None
    report.summary(results, workdir)
  except (FileError, LookupError, TypeError, ValueError, AttributeError) as error:
    log.warning("%s is damaged (%s); it is written anew", path, error)
    return None
  return results


def _claim(recipe: Recipe, splits: dict[str, Any]) -> None:
  config = recipe.config.to_dict()
  check_splits(recipe.workdir, config, splits)
  record_changes(recipe.workdir, config)
  claim(recipe.workdir, config, recipe.experiment.tokenizer.files, splits)


def _totals(config: dict[str, Any]) -> list[Any]:
  flat = flatten(json.loads(json.dumps(config)))
  return [flat.get("sft.steps"), flat.get("grpo.steps")]


def _write_results(
  recipe: Recipe,
  outcomes: dict[str, Outcome],
  evaluated: dict[str, Evaluation],
  began: float,
  rest: dict[str, Any],
) -> dict[str, Any]:
  """Collects the results and writes them, the completions and the learning curves."""
  config, workdir = recipe.config, recipe.workdir
  final = outcomes[config.mode]
  for name, found in evaluated.items():
    found.write(workdir / "completions" / f"{name}.jsonl")
  report.plot_learning_curves(workdir)
  task, records = recipe.experiment.task, evaluated["after"].records
  constant = baseline(task, records, config.task.style)
  total = time.monotonic() - began
  seconds = {stage: round(outcome.seconds, 2) for stage, outcome in outcomes.items()}
  results = {
    **{name: found.summary() for name, found in evaluated.items()},
    "task": task.name,
    "baseline": constant.summary(),
    "samples": report.samples(evaluated["after"]),
    "best_iteration": {stage: outcome.best_step for stage, outcome in outcomes.items()},
    "checkpoint": str(final.checkpoint),
    "seconds": seconds | {"this_invocation": round(total, 2)},
    "cost": ledger.total(
      read_records(workdir / "metrics.jsonl"), {stage: outcome.seconds for stage, outcome in outcomes.items()}
    ),
    "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
    "config": config.to_dict(),
    "versions": versions(),
    "revision": revision(),
    **rest,
  }
  write_json(workdir / "results.json", results)
  return results
