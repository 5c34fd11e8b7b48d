"""The pairs of a run: those of its file, or of graded rollouts, which are made once, before the stage begins."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from d1jax.data import demonstrations
from d1jax.data import pairs as pair_files
from d1jax.data.pairs import Pair, PairTokens
from d1jax.errors import input_checked, reworded
from d1jax.evaluation import rollout_answers, rollout_pairs, subject
from d1jax.evaluation.evaluator import Evaluator
from d1jax.files import FileError, parse_json, read_text
from d1jax.parallel import multihost
from d1jax.rl.prompts import Prompts
from d1jax.run.experiment import Experiment
from d1jax.run.workdir import Folder, folder, write_atomically
from d1jax.state import Params
from d1jax.tasks import held_out, split_hash
from d1jax.training.dpo import Options

log = logging.getLogger(__name__)


class Preferences:
  """The pairs of a run, and where they come from.

  Attributes:
    config: the run's configuration.
    train: the pairs that are trained on.
    held_out: the pairs that validate; None if none are held out.
    seconds: what making them took in this attempt.
  """

  train: PairTokens
  held_out: PairTokens | None

  def __init__(self, experiment: Experiment, options: Options, workdir: Folder):
    """Reads the file of `pairs.file`, or prepares the questions of rollouts.

    Raises:
      ValueError: a field or a row of the file is wrong.
      RunError: there is no checkpoint where `pairs.checkpoint` says.
    """
    self._experiment, self._options, self.seconds = experiment, options, 0.0
    self.config, section = experiment.config, experiment.config.pairs
    self.path: Any = workdir / "pairs.jsonl"
    if section.file:
      if section.checkpoint:
        raise ValueError(f"pairs.file={section.file} and pairs.checkpoint={section.checkpoint}: name one of them")
      self.path = Path(experiment.config.data.root or "") / section.file
      self._take(_leak_free(pair_files.read(self.path), self.path))
      return
    self._evaluator: Evaluator | None = None
    if section.checkpoint is None:
      self._evaluator = self._asking(experiment)
    elif not multihost.from_main(self._has_made):
      subject.find_checkpoint(folder(section.checkpoint))

  @property
  def is_file(self) -> bool:
    """Whether the pairs are those of a file."""
    return bool(self.config.pairs.file)

  @property
  def count(self) -> int:
    """The number of all pairs."""
    return len(self.train.prompts) + (len(self.held_out.prompts) if self.held_out else 0)

  def hash(self) -> str:
    """A hash of all pairs."""
    sides = [self.train, *([self.held_out] if self.held_out else [])]
    return split_hash([{"pair": list(pair)} for side in sides for pair in zip(*side, strict=True)])

  def compile(self) -> None:
    """Compiles the rollouts of the policy itself."""
    if not self.is_file and self._evaluator is not None:
      self._evaluator.compile()

  def prepare(self, policy: Callable[[], Params], pause: Callable[[], None]) -> None:
    """Makes the pairs, or reads those that were made.

    Args:
      policy: the published weights at the start of the stage, which sample if no checkpoint is named.
      pause: is called between two batches, and may raise an exception to stop.

    Raises:
      RunError: there are no pairs, or too few; the message says which fields may change.
    """
    if self.is_file:
      return
    if not multihost.from_main(self._has_made):
      began = time.perf_counter()
      rows = self._rollouts(policy, pause)
      with input_checked():
        self._check(rows)
      text = "".join(json.dumps(row) + "\n" for row in rows)
      multihost.from_main(lambda: write_atomically(self.path, text.encode()))
      self.seconds = time.perf_counter() - began
      questions = len({row["made"]["question"] for row in rows})
      print(f"{self.path}: {len(rows)} pairs of {questions} questions, made in {self.seconds:.0f} s")
    with input_checked():
      self._take(pair_files.read(self.path))

  def _settings(self) -> dict[str, Any]:
    """What the rows of this run's pairs say about their origin."""
    config, section = self.config, self.config.pairs
    return {
      "by": section.checkpoint or "the start of the run",
      "task": config.task.name,
      "questions": section.questions,
      "answers": section.samples,
      "temperature": config.rollout.temperature,
    }

  def _has_made(self) -> bool:
    """Whether the work directory has the pairs of these settings."""
    try:
      first = parse_json(read_text(self.path).split("\n", 1)[0], self.path, dict) if self.path.exists() else {}
    except FileError:
      return False
    made = first.get("made")
    return isinstance(made, dict) and all(made.get(name) == value for name, value in self._settings().items())

  def _asking(self, experiment: Experiment) -> Evaluator:
    """The first questions of the training split, asked by the model of an experiment."""
    own, model = self._experiment, experiment.model
    if experiment is own:
      prompts = own.prompts("train")
    else:
      style, buckets = self.config.task.style, tuple(self.config.data.prompt_buckets)
      prompts = Prompts.of(own.task, experiment.tokenizer, "train", style=style, buckets=buckets)
    count, rows = self.config.pairs.questions, self.config.evaluation.batch_size
    return rollout_answers.asking(model, prompts, own.sampler, count, rows)

  def _rollouts(self, policy: Callable[[], Params], pause: Callable[[], None]) -> list[dict[str, Any]]:
    config, made = self.config, self._settings()
    if self._evaluator is not None:
      evaluator, params = self._evaluator, policy()
    else:
      place = ConfigDict({"pretrained": None, "mesh": config.mesh, "cpu_devices": config.cpu_devices})
      sampled = subject.of_run(subject.find_checkpoint(folder(self.config.pairs.checkpoint)), place)
      made |= {"checkpoint": sampled.name, "weights": sampled.fingerprint}
      with input_checked():
        evaluator = self._asking(sampled.experiment)
      params = sampled.params()
    print(f"pairs: {len(evaluator.prompts.records)} questions, {self.config.pairs.samples} answers to each", flush=True)
    samples = self.config.pairs.samples
    answers = rollout_answers.sample(evaluator, params, samples=samples, seed=config.seed, pause=pause)
    return rollout_pairs.rows(evaluator.prompts, answers, made)

  def _check(self, rows: list[dict[str, Any]]) -> None:
    section = self.config.pairs
    if not rows:
      raise ValueError(
        f"no question got a right and a wrong answer: raise pairs.samples={section.samples} or"
        f" pairs.questions={section.questions}, or start from a policy that solves some"
      )
    self._take(
      [
        Pair(row["messages"], row.get("prefill", ""), row["chosen"], row["rejected"], i + 1)
        for i, row in enumerate(rows)
      ]
    )

  def _take(self, found: list[Pair]) -> None:
    """Tokenises and parts the pairs; those that fit no bucket are left out and counted."""
    options = self._options
    tokens = pair_files.tokenised(found, self._experiment.tokenizer, self.path)
    kept = pair_files.fitting(tokens, options.prompt_buckets, options.completion_buckets)
    if len(kept) < len(found):
      first = next(pair.line for i, pair in enumerate(found) if i not in set(kept))
      long = (
        f"{len(found) - len(kept)} of {len(found)} pairs (the first is line {first}) are longer than"
        f" dpo.prompt_buckets={options.prompt_buckets} or dpo.completion_buckets={options.completion_buckets}"
      )
      if not kept:
        raise ValueError(f"{self.path}: {long}: raise them")
      print(f"{self.path}: left out: {long}")
    rows = [found[i] for i in kept]
    with reworded("pairs."):
      train, validating = demonstrations.split(rows, self.config.pairs.held_out, "pairs")
    tokenised = lambda side: pair_files.tokenised(side, self._experiment.tokenizer, self.path)
    self.train, self.held_out = tokenised(train), tokenised(validating) if validating else None


def _leak_free(found: list[Pair], path: Path) -> list[Pair]:
  """The pairs without those that ask questions of the tasks' test splits, which are counted."""
  kept = [pair for pair in found if not held_out.is_listed(pair.question)]
  if len(kept) < len(found):
    print(f"{path}: left out {len(found) - len(kept)} of {len(found)} pairs, which ask test questions")
  if not kept:
    raise ValueError(f"{path}: all pairs ask test questions; give others")
  return kept
