"""d1's whole recipe: masked SFT, then diffu-GRPO, then one evaluation on the held-out split.

Also SFT alone, and preference tuning in place of diffu-GRPO.
"""

import functools
import time
from collections.abc import Callable, Collection
from typing import Any

import optax
from ml_collections import ConfigDict

from d1jax import keys, report
from d1jax import optimizer as optimizers
from d1jax.completer import Completer
from d1jax.errors import explained, input_checked, smaller_batches
from d1jax.evaluation.evaluator import Evaluation, Evaluator
from d1jax.evaluation.samples import Samples
from d1jax.page import samples
from d1jax.page.writer import Page
from d1jax.parallel import multihost
from d1jax.preferences import Preferences
from d1jax.results import Outcome, finished_results, write_results
from d1jax.rl.prompts import Prompts
from d1jax.run import compiled, fields, opening, parts, run_tokenizer, trackers
from d1jax.run import experiment as experiments
from d1jax.run.checkpoint import Checkpoints, Restored
from d1jax.run.identity import check_splits, holds_run, record_changes
from d1jax.run.interrupts import Interrupts
from d1jax.run.lock import locked
from d1jax.run.metrics import STAGES, warn_of_lost
from d1jax.run.workdir import Folder, claim, folder
from d1jax.stages import Stages, Validation
from d1jax.state import Frozen, Params, TrainState
from d1jax.tasks import split_hash
from d1jax.training import configured, dpo, grpo, loop, sft, sft_data
from d1jax.training.ahead import Ahead, abstract_waiting
from d1jax.training.dpo import HeldOutPairs
from d1jax.training.held_out_loss import HeldOutLoss

VALIDATION_METRIC = "solved"
"""The metric on the validation split by which checkpoints are chosen."""


class Recipe(Stages):
  """The stages of one work directory."""

  def __init__(self, config: ConfigDict, workdir: Folder, interrupts: Interrupts):
    """Builds and checks everything that may be wrong; nothing is written or trained yet."""
    multihost.check_same("the configuration", config.to_dict() | {"distributed": {}})
    experiments.check_data(config)
    self._held = multihost.from_main(lambda: holds_run(workdir, config.to_dict()))
    kept = run_tokenizer.kept_in(workdir) if self._held else None
    super().__init__(experiments.build(config, kept, trains=True), workdir, interrupts)
    if self._model.weights.source is not None and (start := self._model.weights.source.as_start()):
      print(start)
    experiments.check_batches(config, self._model.ways)
    experiments.check_lengths(config, self._model.length_ways)
    experiments.check_start(config)
    multihost.from_main(lambda: trackers.check(config.trackers))
    multihost.from_main(lambda: self.page.check(config.mode))
    self._completer = Completer.of(self._model, keys.Purpose.EVALUATION)
    self._test = self._evaluator(self.experiment.prompts("test")) if self.experiment.has_task else None
    if config.sft.steps:
      self._fine_tuning = configured.fine_tuning(config)
      self._fine_tuning.check(self._model.denoiser.block)
      self._demonstrations, held_out = configured.demonstrations(self.experiment)
      self._optimizers["sft"] = self._optimizer("sft", config.sft.steps)
      self._validations["sft"] = self._by_loss(held_out) if held_out else self._by_accuracy("sft")
    if config.mode == "dpo":
      self._optimizers["dpo"] = self._optimizer("dpo", config.dpo.steps)
      self._tuning = configured.preferences(config)
      self._preferences = Preferences(self.experiment, self._tuning, workdir)
      self._validations["dpo"] = self._by_preference()
    if config.mode == "grpo":
      self._optimizers["grpo"] = self._optimizer("grpo", config.grpo.steps * config.grpo.num_iterations)
      self._programs = configured.programs(self.experiment, self._optimizers["grpo"])
      self._lengths = configured.lengths(self.experiment, self._optimizers["grpo"], self._programs)
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
    from_file = self.config.mode == "dpo" and self._preferences.is_file
    names = ["test", "validation"] * self.experiment.has_task
    names += ["train"] * (self.config.mode != "sft" and not from_file)
    if self.config.sft.steps and not self.config.sft.data:
      names.append("demonstrations")
    found = {name: task.records(name) for name in names}
    if self.config.sft.steps and self.config.sft.data:
      found["sft.data"] = [{"prompt": a, "answer": b} for a, b in zip(*self._demonstrations, strict=True)]
    hashes = {name: {"n": len(records), "sha256": split_hash(records)} for name, records in found.items()}
    if from_file:
      hashes["pairs.file"] = {"n": self._preferences.count, "sha256": self._preferences.hash()}
    return hashes

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

    def score(trainable: Params, iteration: int) -> loop.Scored:
      found = evaluator(self._published(trainable))
      self.page.keep(stage, iteration, found, prompts)
      return loop.Scored(found.share(VALIDATION_METRIC).value)

    return Validation(evaluator.compile, score, self._smaller_batches, len(evaluator.prompts.records))

  def _by_loss(self, held_out: sft_data.Demonstrations) -> Validation:
    loss, count = HeldOutLoss(self._model, held_out, self._fine_tuning), self.config.sft.samples
    shown = Samples.of(self._completer, self.experiment, *held_out, count) if count else None

    def compile() -> None:
      loss.compile()
      if shown is not None:
        shown.compile()
        self._model.publisher.compile()

    def score(trainable: Params, iteration: int) -> loop.Scored:
      found = loss(trainable, self.experiment.model.weights.frozen)
      lines = [report.by_level(found.figures)]
      if shown is not None:
        lines += shown.write(self._published(trainable), self.workdir / "samples" / f"{iteration}.jsonl")
      return loop.Scored(-found.loss, found.figures, lines)

    return Validation(compile, score, self._smaller_parts("sft"))

  def _by_preference(self) -> Validation:
    """The share of solved questions, and figures of held-out pairs; minus their loss decides if a file has them."""
    graded, judge, pairs = self._by_accuracy("dpo"), HeldOutPairs(self._model, self._tuning), self._preferences

    def score(trainable: Params, iteration: int) -> loop.Scored:
      found = graded.score(trainable, iteration)
      if pairs.held_out is None:
        return found
      judged = {f"held_out/{name}": x for name, x in judge(pairs.held_out, trainable, self._with_reference()).items()}
      if pairs.is_file:
        return loop.Scored(-judged["held_out/loss"], judged | {VALIDATION_METRIC: found.score})
      return found._replace(figures=judged)

    def compile() -> None:
      graded.compile()
      judge.compile()
      pairs.compile()

    return Validation(compile, score, graded.remedy, graded.questions)

  def _published(self, trainable: Params) -> Params:
    """Trained weights in the form that rollouts take."""
    return self._model.publisher(trainable, self._model.frozen.base)

  def read_base(self) -> None:
    """Reads the base of the adapters before this run claims the folder: with a smaller base it is another run."""
    smaller = self.config.lora.rank and self.config.model.quantize != "nf4" and not self._held
    remedy = "--config.model.quantize=nf4, or more devices" if smaller else "more devices"
    with explained("reading the base", remedy):
      _ = self.experiment.model.weights.base_fingerprint

  def compile(self) -> None:
    """Compiles validations and the final evaluation, so that their compilation cannot fail after hours of training."""
    for name, validation in self._validations.items():
      with explained(f"{name}: validation", validation.remedy), opening.timed(f"compiling the validation of {name}"):
        validation.compile()
    if self._test is not None:
      with explained("the final evaluation", self._smaller_batches), opening.timed("compiling the final evaluation"):
        self._test.compile()
        self._model.publisher.compile()

  def later(self, name: str) -> float:
    """What the run does after a stage, in validations of the stage; 0 if its validation completes no prompts.

    A completion counts 1, and a pass of an update 3 of its steps: forward, backward and what is computed twice.
    """
    config, questions = self.config, self._validations[name].questions
    if not questions or self._test is None:
      return 0.0
    rows = len(self._test.prompts.records) * (2 if config.mode == "grpo" else 1)
    if name == "sft" and config.mode == "grpo":
      updated = config.grpo.prompts_per_iteration * config.grpo.num_generations
      steps = config.rollout.diffusion_steps
      rows += config.grpo.steps * updated * (config.grpo.oversample + 3 * config.grpo.num_iterations / steps)
    return rows / questions

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
        iterations=self.config.sft.steps,
      )

    fresh = functools.partial(experiment.model.weights.fresh_state, optimizer)
    shown = ("loss", "masked_ce", *([loop.SPEED] if self.config.sft.data else []))
    return self._run_stage("sft", self.config.sft, fresh, advancer, shown)

  def dpo(self, start: Callable[[], Params]) -> Outcome:
    """Preference tuning from the weights that `start` reads; a copy of them is the reference."""
    experiment, optimizer, pairs = self.experiment, self._optimizers["dpo"], self._preferences
    self._start = start = functools.cache(start)
    with explained("dpo: rollouts for pairs", self._smaller_batches):
      pause = self._pause("the start of dpo, before its pairs were made")
      pairs.prepare(lambda: self._published(start()), pause)

    def advancer(at: Restored) -> Any:
      frozen = self._with_reference()
      return dpo.advancer(
        experiment.model, pairs.train, self._tuning, optimizer, frozen, at.step, seed=self.config.seed
      )

    fresh = lambda: experiment.model.weights.state_from(start(), optimizer)
    more = {"pairs": pairs.hash()}
    return self._run_stage("dpo", self.config.dpo, fresh, advancer, dpo.SHOWN, more, pairs.seconds)

  def _with_reference(self) -> Frozen:
    """The frozen weights, with the start of preference tuning as their reference."""
    return self.experiment.model.weights.frozen._replace(reference=self._start())

  def waiting(self, name: str, checkpoints: Checkpoints, step: int) -> Any:
    """What the checkpoint of an iteration holds beside the state: shapes, types and placements; None: nothing."""
    if name != "grpo" or not self._programs.shape.ahead:
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
      (self._lengths or self._programs).compile()
      frozen = experiment.model.weights.frozen
      frozen = frozen._replace(reference=start()) if stays else frozen
      shared = (self._programs, self._grading, frozen, begin.step, self.workdir)
      section = self.config.grpo
      options = dict(seed=self.config.seed, gap_every=section.validate_every, dump_every=section.dump_every)
      if self._programs.shape.ahead:
        return Ahead(*shared, **options, curriculum=self._curriculum, waiting=begin.waiting or ())
      return grpo.advancer(*shared, **options, curriculum=self._curriculum, lengths=self._lengths)

    def fresh() -> TrainState:
      return experiment.model.weights.state_from(start(), optimizer, donate=not stays)

    carried = [one for one in (self._curriculum, self._lengths) if one is not None]
    with self._grading.grader:
      return self._run_stage("grpo", self.config.grpo, fresh, advancer, grpo.SHOWN, carried=carried)

  def _evaluate(self, **arms: Callable[[], Params]) -> dict[str, Evaluation]:
    """The final evaluation of each arm's weights, which its function reads; there is none without a task."""
    return {name: self._tested(self._test, read) for name, read in arms.items()} if self._test else {}

  def _tested(self, test: Evaluator, read: Callable[[], Params]) -> Evaluation:
    """The final evaluation of the weights that `read` reads; afterwards they are no longer in memory."""
    with explained("the final evaluation", self._smaller_batches):
      return test(self._published(read()), self._pause("the end of training, before the final evaluation was done"))

  def _pause(self, reached: str) -> Callable[[], None]:
    """What stops the run if a signal asks for it."""

    def pause() -> None:
      if self._interrupts.pending():
        raise self._interrupts.error(reached)

    return pause

  def run(self) -> tuple[dict[str, Outcome], dict[str, Evaluation]]:
    """Runs the stages, then evaluates once on the held-out split.

    Returns:
      The stages' outcomes, and the evaluations `before` the stage after SFT (without SFT: of the start) and `after` it;
      without a task there are none.
    """
    self.compile()
    outcomes: dict[str, Outcome] = {}
    start: Callable[[], Params] = self.experiment.model.weights.start
    if self.config.sft.steps:
      outcomes["sft"] = self.sft()
      start = functools.partial(self.best, "sft")
    if self.config.mode == "sft":
      return outcomes, self._evaluate(after=start)
    mode = self.config.mode
    outcomes[mode] = self.dpo(start) if mode == "dpo" else self.grpo(start)
    best = functools.partial(self.best, mode)
    return outcomes, self._evaluate(before=start, after=best)


def run(config: ConfigDict) -> dict[str, Any]:
  """Runs or resumes the job of a configuration; if it is finished, prints its table again.

  Returns:
    The content of `results.json`: `before` and `after` (with `grpo` and `dpo`) or only `after`, `task`, `baseline`
    (without a task `held_out` in their place),
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
    opening.say(recipe.experiment.model, workdir)
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
    recipe.page.close()
  print(report.summary(results, workdir))
  return results


def _claim(recipe: Recipe, splits: dict[str, Any]) -> None:
  config = recipe.config.to_dict()
  check_splits(recipe.workdir, config, splits)
  record_changes(recipe.workdir, config)
  claim(recipe.workdir, config, recipe.experiment.tokenizer.files, splits)
  newest = {stage: Checkpoints(recipe.workdir / "checkpoints" / stage).newest() for stage in STAGES}
  warn_of_lost(recipe.workdir / "metrics.jsonl", {stage: step for stage, step in newest.items() if step})
