"""d1's whole recipe: masked SFT, then diffu-GRPO, then one evaluation on the held-out split. Also SFT alone."""

import functools
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from d1jax import keys, report
from d1jax import optimizer as optimizers
from d1jax.completer import Completer
from d1jax.errors import RunError, explained, input_checked, smaller_batches
from d1jax.evaluation.evaluator import Evaluation, Evaluator
from d1jax.fingerprint import fingerprint
from d1jax.page import samples
from d1jax.page.writer import Page
from d1jax.parallel import multihost
from d1jax.results import Outcome, finished_results, write_results
from d1jax.rl.curriculum import Curriculum
from d1jax.rl.prompts import Prompts
from d1jax.run import compiled, fields, parts, run_tokenizer, trackers
from d1jax.run import experiment as experiments
from d1jax.run.checkpoint import Checkpoints, Restored
from d1jax.run.identity import check_splits, holds_run, record_changes
from d1jax.run.interrupts import Interrupts
from d1jax.run.lock import locked
from d1jax.run.metrics import STAGES, warn_of_lost
from d1jax.run.workdir import Folder, claim, folder
from d1jax.state import Params, TrainState, all_finite
from d1jax.tasks import split_hash
from d1jax.telemetry import profile
from d1jax.training import configured, grpo, loop, sft
from d1jax.training.ahead import Ahead, abstract_waiting
from d1jax.training.held_out_loss import HeldOutLoss
from d1jax.weights import check_base

VALIDATION_METRIC = "solved"
"""The metric on the validation split by which checkpoints are chosen."""

Advancer = Callable[[Restored], Callable[[TrainState, int], tuple[TrainState, dict[str, float]]]]
"""Takes what to start from, and returns the function that runs one iteration of a stage."""


class Validation(NamedTuple):
  """The validation of a stage.

  Attributes:
    compile: compiles everything that `score` needs.
    score: scores the weights of an iteration; higher is better.
    remedy: advice for the case that device memory runs out.
  """

  compile: Callable[[], None]
  score: Callable[[Params, int], float]
  remedy: str


class Recipe:
  """The stages of one work directory."""

  def __init__(self, config: ConfigDict, workdir: Folder, interrupts: Interrupts):
    """Builds and checks everything that may be wrong; nothing is written or trained yet."""
    multihost.check_same("the configuration", config.to_dict() | {"distributed": {}})
    self._held = multihost.from_main(lambda: holds_run(workdir, config.to_dict()))
    self.experiment = experiments.build(config, run_tokenizer.kept_in(workdir) if self._held else None)
    self._model = self.experiment.model
    experiments.check_batches(config, self._model.ways)
    experiments.check_lengths(config, self._model.length_ways)
    experiments.check_start(config)
    multihost.from_main(lambda: trackers.check(config.trackers))
    self.page = Page(workdir, config.report.compare)
    multihost.from_main(lambda: self.page.check(config.mode))
    self.config, self.workdir, self._interrupts = config, workdir, interrupts
    self._profiled = profile.iterations(config.profile_steps, config[config.mode].steps)
    self._completer = Completer.of(self._model, keys.Purpose.EVALUATION)
    self._test = self._evaluator(self.experiment.prompts("test"))
    self._validations: dict[str, Validation] = {}
    self._optimizers: dict[str, optax.GradientTransformation] = {}
    self._rates: dict[str, np.ndarray] = {}
    if config.sft.steps:
      self._fine_tuning = configured.fine_tuning(config)
      self._fine_tuning.check(self._model.denoiser.block)
      self._demonstrations, held_out = configured.demonstrations(self.experiment)
      self._optimizers["sft"] = self._optimizer("sft", config.sft.steps)
      self._validations["sft"] = self._by_loss(held_out) if held_out else self._by_accuracy("sft")
    if config.mode == "grpo":
      self._optimizers["grpo"] = self._optimizer("grpo", config.grpo.steps * config.grpo.num_iterations)
      self._programs = configured.programs(self.experiment, self._optimizers["grpo"])
      self._grading = configured.grading(self.experiment)
      self._curriculum = configured.curriculum(self.experiment, self._grading.prompts)
      self._validations["grpo"] = self._by_accuracy("grpo")

  def _optimizer(self, name: str, steps: int) -> optax.GradientTransformation:
    """The optimiser of a stage that takes `steps` steps."""
    section = self.config[name]
    rate, warmup_steps = section.learning_rate, section.warmup_steps
    optimizers.warn_of_warm_up(name, learning_rate=rate, steps=steps, warmup_steps=warmup_steps)
    self._rates[name] = optimizers.rates(rate, steps, warmup_steps, section.decay)
    return self.experiment.optimizer(section, steps)

  def splits(self) -> dict[str, Any]:
    """The number of questions in each split in use, and a hash of their records."""
    task = self.experiment.task
    names = ["test", "validation", *(["train"] if self.config.mode == "grpo" else [])]
    if self.config.sft.steps and not self.config.sft.data:
      names.append("demonstrations")
    found = {name: task.records(name) for name in names}
    if self.config.sft.steps and self.config.sft.data:
      found["sft.data"] = [{"prompt": a, "answer": b} for a, b in zip(*self._demonstrations, strict=True)]
    return {name: {"n": len(records), "sha256": split_hash(records)} for name, records in found.items()}

  def _evaluator(self, prompts: Prompts, traced: Collection[int] = ()) -> Evaluator:
    """A greedy evaluation under published weights; it uses no cache, even if rollouts do."""
    sampler = self.experiment.sampler.greedy()
    return Evaluator(self._completer, prompts, sampler, self.config.evaluation.batch_size, traced)

  @property
  def _smaller_batches(self) -> str:
    """Advice for an evaluation that does not fit into memory."""
    return smaller_batches("evaluation.batch_size", self.config.evaluation.batch_size)

  def _by_accuracy(self, stage: str) -> Validation:
    prompts = self.experiment.prompts("validation")
    evaluator = self._evaluator(prompts, samples.places(len(prompts.records)))

    def score(trainable: Params, iteration: int) -> float:
      found = evaluator(self._published(trainable))
      self.page.keep(stage, iteration, found, prompts)
      return found.share(VALIDATION_METRIC).value

    return Validation(evaluator.compile, score, self._smaller_batches)

  def _by_loss(self, held_out: sft.Demonstrations) -> Validation:
    loss = HeldOutLoss(self._model, held_out, self._fine_tuning)
    remedy = self._smaller_parts("sft")
    return Validation(loss.compile, lambda trainable, _: loss(trainable, self.experiment.model.weights.frozen), remedy)

  def _published(self, trainable: Params) -> Params:
    """Trained weights in the form that rollouts take."""
    return self._model.publisher(trainable, self._model.frozen.base)

  def _smaller_parts(self, stage: str) -> str:
    """Advice for training that does not fit into memory."""
    return experiments.smaller_parts(self.config, stage, self._model.ways)

  def read_base(self) -> None:
    """Reads the base of the adapters before this run claims the folder: with a smaller base it is another run."""
    smaller = self.config.lora.rank and self.config.model.quantize != "nf4" and not self._held
    with explained("reading the base", "--config.model.quantize=nf4, or more devices" if smaller else "more devices"):
      _ = self.experiment.model.weights.base_fingerprint

  def compile(self) -> None:
    """Compiles validations and the final evaluation, so that their compilation cannot fail after hours of training."""
    for name, validation in self._validations.items():
      with explained(f"{name}: validation", validation.remedy):
        validation.compile()
    with explained("the final evaluation", self._smaller_batches):
      self._test.compile()
      self._model.publisher.compile()

  def _train_stage(
    self,
    name: str,
    section: ConfigDict,
    fresh: Callable[[], TrainState],
    advancer: Advancer,
    shown: tuple[str, ...],
    checkpoints: Checkpoints,
    curriculum: Curriculum | None,
  ) -> None:
    """Runs a stage from its last good checkpoint to its end; afterwards the state is no longer in memory."""
    weights, validation, optimizer = self.experiment.model.weights, self._validations[name], self._optimizers[name]
    began, abstract = time.perf_counter(), weights.abstract_state(optimizer)
    waiting = functools.partial(self._waiting, checkpoints) if name == "grpo" else lambda step: None
    start = checkpoints.restore_latest(abstract, waiting)
    if start:
      with input_checked():
        check_base(weights, start.metadata)
    if start and loop.is_over(start.step, start.metadata, section.steps, section.patience):
      return
    start = start or Restored(0, fresh(), {})
    if curriculum:
      curriculum.restore(start.metadata)
    for tree in (start.state, start.state.trainable):
      fingerprint(tree)  # compiles the program that each checkpoint uses
    finite = jax.jit(all_finite, in_shardings=(weights.state_placement(optimizer),), out_shardings=weights.replicated)

    def validate(trainable: Params, iteration: int) -> float:
      with explained(f"{name}: validation", validation.remedy):
        return validation.score(trainable, iteration)

    advance = advancer(start)
    stage = loop.Stage(
      name,
      section.steps,
      advance,
      validate,
      finite.lower(abstract).compile(),
      loop.Cadence(section.validate_every, section.save_every, section.max_skipped_steps, section.patience),
      self._rates[name],
      trackers.entries(self.config.trackers),
      shown,
      self.experiment.metadata(),
      began,
      profile.Profile(self._profiled if name == self.config.mode else range(0), name, self.workdir / "profile"),
      self.page.draw,
      curriculum.state if curriculum else dict,
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
    curriculum: Curriculum | None = None,
  ) -> Outcome:
    """Runs or resumes a stage. Nothing is computed twice; from a finished stage only the best weights are read."""
    home, weights = self.workdir / "checkpoints" / name, self.experiment.model.weights
    checkpoints, abstract = Checkpoints(home, writes=True), weights.abstract_state(self._optimizers[name])

    def last() -> tuple[int, bool]:
      """The last saved step, and whether the stage ended with it."""
      step = max(checkpoints.steps(), default=0)
      return step, step > 0 and loop.is_over(step, checkpoints.metadata(step), section.steps, section.patience)

    found = lambda: multihost.from_main(last)
    with explained(name, self._smaller_parts(name)):
      step: int | None = None
      while step is None or not found()[1]:  # a damaged last checkpoint has been set aside and is made again
        if not found()[1]:
          self._train_stage(name, section, fresh, advancer, shown, checkpoints, curriculum)
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

  def sft(self) -> Outcome:
    """Masked supervised fine-tuning from the run's start."""
    experiment, optimizer = self.experiment, self._optimizers["sft"]

    def advancer(start: Restored) -> Any:
      return sft.advancer(
        experiment.model,
        self._demonstrations,
        self._fine_tuning,
        optimizer,
        start.step,
        seed=self.config.seed,
        steps=self.config.sft.steps,
      )

    fresh = functools.partial(experiment.model.weights.fresh_state, optimizer)
    return self._run_stage("sft", self.config.sft, fresh, advancer, ("loss", "masked_ce"))

  def _waiting(self, checkpoints: Checkpoints, step: int) -> Any:
    """What the checkpoint of an iteration of diffu-GRPO holds beside the state: shapes, types and placements."""
    if not self._programs.shape.off_policy_steps:
      return None
    if self._curriculum:
      self._curriculum.restore(multihost.from_main(lambda: checkpoints.metadata(step)))
    return abstract_waiting(self._programs, self._grading, self.config.seed, step, self._curriculum)

  def grpo(self, start: Callable[[], Params]) -> Outcome:
    """diffu-GRPO from the weights that `start` reads; they are the reference policy, if there is one."""
    experiment, optimizer = self.experiment, self._optimizers["grpo"]
    stays = self._programs.method.scores_reference and experiment.model.weights.lora is None
    start = functools.cache(start) if stays else start

    def advancer(begin: Restored) -> Any:
      self._programs.compile()
      frozen = experiment.model.weights.frozen
      frozen = frozen._replace(reference=start()) if stays else frozen
      shared = (self._programs, self._grading, frozen, begin.step, self.workdir)
      section = self.config.grpo
      options = dict(seed=self.config.seed, gap_every=section.validate_every, dump_every=section.dump_every)
      if section.off_policy_steps:
        return Ahead(*shared, **options, curriculum=self._curriculum, waiting=begin.waiting or ())
      return grpo.advancer(*shared, **options, curriculum=self._curriculum)

    def fresh() -> TrainState:
      return experiment.model.weights.state_from(start(), optimizer, donate=not stays)

    with self._grading.grader:
      return self._run_stage("grpo", self.config.grpo, fresh, advancer, grpo.SHOWN, self._curriculum)

  def _evaluate(self, read: Callable[[], Params]) -> Evaluation:
    """The final evaluation of the weights that `read` reads; afterwards they are no longer in memory."""

    def pause() -> None:
      if self._interrupts.pending():
        raise self._interrupts.error("the end of training, before the final evaluation was done")

    with explained("the final evaluation", self._smaller_batches):
      return self._test(self._published(read()), pause)

  def run(self) -> tuple[dict[str, Outcome], dict[str, Evaluation]]:
    """Runs the stages, then evaluates once on the held-out split.

    Returns:
      The stages' outcomes, and the evaluations `before` diffu-GRPO (without SFT: of the start) and `after` it.
    """
    self.compile()
    outcomes: dict[str, Outcome] = {}
    start: Callable[[], Params] = self.experiment.model.weights.start
    if self.config.sft.steps:
      outcomes["sft"] = self.sft()
      start = functools.partial(self.best, "sft")
    if self.config.mode == "sft":
      return outcomes, {"after": self._evaluate(start)}
    outcomes["grpo"] = self.grpo(start)
    best = functools.partial(self.best, "grpo")
    return outcomes, {"before": self._evaluate(start), "after": self._evaluate(best)}


def run(config: ConfigDict) -> dict[str, Any]:
  """Runs or resumes the job of a configuration; if it is finished, prints its table again.

  Returns:
    The content of `results.json`: `before` and `after` (with `grpo`) or only `after`, `task`, `baseline`,
    `params_fingerprint`, `seconds` by stage, `cost` (see `ledger.total`), `splits`, `config`, `versions`, `revision`,
    `checkpoint`.
  """
  workdir = folder(config.workdir)
  fields.complete(config)
  parts.complete(config)
  finished = multihost.from_main(lambda: finished_results(workdir, config))
  if finished and multihost.from_main(lambda: run_tokenizer.is_whole(workdir)):
    if config.report.compare:
      page = Page(workdir, config.report.compare)
      multihost.from_main(lambda: page.check(config.mode))
      page.draw()
    return report.reprint(finished, workdir)
  began = time.monotonic()
  with locked(workdir), compiled.kept(workdir), Interrupts() as interrupts, explained("run", "more devices"):
    with input_checked():
      recipe = Recipe(config, workdir, interrupts)
      splits = recipe.splits()
    multihost.check_same("the data", splits)
    recipe.read_base()
    multihost.from_main(lambda: _claim(recipe, splits))
    if finished:  # only its tokenizer was damaged, and has been repaired
      return report.reprint(finished, workdir)
    outcomes, evaluations = recipe.run()
    fingerprints = {
      "params_fingerprint": outcomes[config.mode].fingerprint,
      "base_fingerprint": recipe.experiment.model.weights.base_fingerprint,
    }
    rest = fingerprints | {"splits": splits}
    results = multihost.from_main(lambda: write_results(recipe.experiment, workdir, outcomes, evaluations, began, rest))
    recipe.page.draw()
  print(report.summary(results, workdir))
  return results


def _claim(recipe: Recipe, splits: dict[str, Any]) -> None:
  config = recipe.config.to_dict()
  check_splits(recipe.workdir, config, splits)
  record_changes(recipe.workdir, config)
  claim(recipe.workdir, config, recipe.experiment.tokenizer.files, splits)
  newest = {stage: Checkpoints(recipe.workdir / "checkpoints" / stage).newest() for stage in STAGES}
  warn_of_lost(recipe.workdir / "metrics.jsonl", {stage: step for stage, step in newest.items() if step})
