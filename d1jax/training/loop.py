"""The loop that every stage shares: resume, step, validate, save, report, stop.

All processes run this loop together. A stop signal, which only one of them may see, is first shared with all.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from d1jax.errors import NotFiniteError
from d1jax.optimizer import evaluated
from d1jax.parallel import multihost
from d1jax.run.checkpoint import Checkpoints, Restored
from d1jax.run.interrupts import Interrupts
from d1jax.run.metrics import MetricsWriter, Progress, read_records
from d1jax.run.trackers import Run, Trackers
from d1jax.run.workdir import Folder, run_identity
from d1jax.state import Params, TrainState
from d1jax.telemetry import ledger
from d1jax.telemetry.alarms import Limits, alarms
from d1jax.telemetry.profile import Profile

log = logging.getLogger(__name__)

SPEED, HELD_OUT = "tokens_per_second", "held_out_loss"
"""Names of figures that the progress line shows in another way."""


class Cadence(NamedTuple):
  """When a stage validates, saves and ends.

  Attributes:
    validate_every: iterations between validations; the last iteration also validates.
    save_every: iterations between checkpoints; the last iteration also saves. In between, a validated state is saved
      only if no checkpoint has a better score. None: every validation saves.
    max_skipped_steps: the largest number of iterations in a row whose loss or gradient is not finite; one more ends
      the run.
    patience: the stage ends after this many validations in a row without a better score; None: it never ends early.
    seconds: the stage ends with the first iteration that ends after this time, earlier attempts included; None: never.
  """

  validate_every: int
  save_every: int | None = None
  max_skipped_steps: int = 0
  patience: int | None = None
  seconds: float | None = None

  def saves(self, iteration: int, score: float | None, best: float | None) -> bool:
    """Whether an iteration before the last one saves.

    Args:
      iteration: counted from 1.
      score: the score of its validation; None if it does not validate.
      best: the best score of a checkpoint; None if there is no score.
    """
    if self.save_every is None:
      return score is not None
    return iteration % self.save_every == 0 or (score is not None and (best is None or score >= best))


class Counts(NamedTuple):
  """Counters of a stage that checkpoints carry from one attempt to the next.

  Attributes:
    skipped_in_a_row: the latest iterations in a row whose loss or gradient was not finite.
    skipped: all such iterations of the stage.
    stale: the latest validations in a row without a better score.
  """

  skipped_in_a_row: int = 0
  skipped: int = 0
  stale: int = 0

  def after(self, finite: bool) -> "Counts":
    """The counters after one more iteration."""
    if finite:
      return self._replace(skipped_in_a_row=0)
    return self._replace(skipped_in_a_row=self.skipped_in_a_row + 1, skipped=self.skipped + 1)


def counts_of(metadata: Mapping[str, Any]) -> Counts:
  """The counters in the metadata of a checkpoint; a missing one, as in older checkpoints, is 0."""
  found = metadata.get("counts")
  found = found if isinstance(found, Mapping) else {}
  return Counts(**{name: n for name, n in found.items() if name in Counts._fields and isinstance(n, int)})


def is_over(
  step: int, metadata: Mapping[str, Any], iterations: int, patience: int | None, seconds: float | None = None
) -> bool:
  """Whether a stage ended with a checkpoint: after all its iterations, or its `patience` or its `seconds` were up."""
  late = seconds is not None and float(metadata.get("seconds", 0.0)) >= seconds
  return step >= iterations or late or (patience is not None and counts_of(metadata).stale >= patience)


class Scored(NamedTuple):
  """The result of a validation.

  Attributes:
    score: higher is better.
    figures: further values of the iteration's record.
    lines: what is printed below the progress line.
  """

  score: float
  figures: Mapping[str, float] = {}
  lines: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of training.

  Attributes:
    name: `sft`, `dpo` or `grpo`; it names folders and records.
    iterations: the number of all iterations.
    advance: `(state, iteration) -> (state, metrics)` runs one iteration; metrics are host numbers, among them `finite`,
      `tokens` (of completions) and those of `ledger.entry`.
    validate: `(params, iteration) -> Scored` scores the evaluated weights after an iteration, counted from 1.
    all_finite: whether every weight and moment of a state is finite; checked before a state is saved.
    cadence: when the stage validates and saves.
    rates: the learning rate of each optimiser step.
    trackers: the trackers besides `metrics.jsonl`, see `trackers.entries`.
    shown: the metrics on the progress line.
    metadata: the metadata of its checkpoints.
    began: the start of the stage's preparation (`time.perf_counter`).
    profile: the profile of some iterations.
    draw: is called when the record of a validation is written.
    later: what the run does after this stage, in validations of this one; for the eta of the run.
    carried: gives what a checkpoint's metadata holds of its own iteration.
    waiting: what checkpoints hold beside the state, see `Checkpoints.save`.
  """

  name: str
  iterations: int
  advance: Callable[[TrainState, int], tuple[TrainState, dict[str, float]]]
  validate: Callable[[Params, int], Scored]
  all_finite: Callable[[TrainState], Any]
  cadence: Cadence
  rates: Float[np.ndarray, "optimiser_steps"]
  trackers: Sequence[str]
  shown: tuple[str, ...]
  metadata: Mapping[str, Any]
  began: float
  profile: Profile
  draw: Callable[[], object] = lambda: None
  later: float = 0.0
  carried: Callable[[], Mapping[str, Any]] = dict
  waiting: Callable[[], Any] = lambda: None


def run(stage: Stage, start: Restored, checkpoints: Checkpoints, workdir: Folder, interrupts: Interrupts) -> float:
  """Runs a stage from `start` to its end; `checkpoints` then holds the last and the best state.

  Returns:
    The seconds that the stage has taken, including earlier attempts.

  Raises:
    NotFiniteError: losses or gradients were not finite in more iterations in a row than allowed; these steps were
      skipped, and the state is saved. Or a step made weights that are not finite; that state is not saved.
    PreemptedError, InterruptedRunError: the run received a stop signal; the state is saved.
  """
  state, began = start.state, time.monotonic() - float(start.metadata.get("seconds", 0.0))
  writer, trackers = MetricsWriter(workdir, stage.name, start.step), _trackers(stage, start.step, workdir)
  left = None if stage.cadence.seconds is None else stage.cadence.seconds - (time.monotonic() - began)
  progress = Progress(stage.name, stage.iterations, start.step, left=left)
  history = [r for r in read_records(workdir / "metrics.jsonl") if r["stage"] == stage.name]
  sounded: dict[str, str] = {}
  clock, best, cadence = ledger.Clock(stage.began), checkpoints.best_score(), stage.cadence
  counts = counts_of(start.metadata)
  try:
    for iteration in range(start.step + 1, stage.iterations + 1):
      with stage.profile.iteration(iteration):
        state, metrics = stage.advance(state, iteration - 1)
      finite, tokens = bool(metrics.pop("finite")), metrics.pop("tokens")
      metrics["learning_rate"] = float(stage.rates[max(int(state.step) - 1, 0)])  # the rate of the last step taken
      # With max_skipped_steps=2, the steps of two iterations in a row may be skipped, and a third one ends the run. It
      # saves the last finite state with the count 0, so that the same command can try again with the next batch.
      counts = counts.after(finite)
      refused = counts.skipped_in_a_row > cadence.max_skipped_steps
      if counts.skipped:
        metrics["skipped_steps"] = float(counts.skipped)
      if not finite and not refused:
        _warn_of_skip(stage, iteration, counts)
      score: float | None = None
      lines: Sequence[str] = ()
      last = iteration == stage.iterations or _is_late(cadence, time.monotonic() - began)
      # The last weights are validated even if the last step was skipped, so that the same command then ends the stage.
      if last or (not refused and iteration % cadence.validate_every == 0):
        _check_finite(stage, iteration, state, checkpoints)
        with clock.outside("validation"):
          asked = time.monotonic()
          score, figures, lines = stage.validate(evaluated(state), iteration)
          progress.expect(stage.later * (time.monotonic() - asked))
        metrics |= {"validation": score, **figures}
        is_better = not math.isnan(score) and (best is None or score > best)
        counts = counts._replace(stale=0 if is_better else counts.stale + 1)
        last = last or is_over(iteration, {"counts": counts._asdict()}, stage.iterations, cadence.patience)
      metrics = clock.close(metrics)
      metrics[SPEED] = tokens / metrics["seconds"]
      metrics["elapsed"] = time.monotonic() - began
      history.append(metrics)
      raised = alarms(history, Limits()) if iteration % Limits.window == 0 else sounded
      for name in raised.keys() - sounded.keys():
        log.warning("%s iteration %d: %s", stage.name, iteration, raised[name])
      sounded = raised
      # The record comes before the checkpoint: after a kill between the two, the resumed run drops the surplus record.
      # In the other order, iteration 100 could have a checkpoint but no record, which nothing would make again.
      writer.log(iteration, {**metrics, "alarms": list(sounded)} if sounded else metrics)
      trackers.log(iteration, metrics)
      progress.update(iteration, _shown(stage, metrics) | ({"alarm": " ".join(sounded)} if sounded else {}), lines)
      stop = interrupts.pending()
      if last or stop or refused or cadence.saves(iteration, score, best):
        if score is None:
          _check_finite(stage, iteration, state, checkpoints)
        metadata = {
          **stage.metadata,
          **stage.carried(),
          "data": {"next_index": iteration},
          "seconds": time.monotonic() - began,
          "counts": (counts._replace(skipped_in_a_row=0) if refused else counts)._asdict(),
        }
        with clock.outside("saving"):
          writer.keep()
          checkpoints.save(iteration, state, metadata, score, stage.waiting())
        best = max((x for x in (best, score) if x is not None and not math.isnan(x)), default=None)
      if score is not None:
        with clock.outside("saving"):
          stage.draw()
      if refused:
        checkpoints.wait()
        raise NotFiniteError(
          f"{stage.name} iteration {iteration}: loss or gradient is not finite (loss {metrics['loss']}). The step was"
          f" left out, and the weights without it are saved in {checkpoints.folder}/{iteration}"
          f"{_after_the_last(stage, checkpoints) if last else _after_another(stage, checkpoints)}"
        )
      if stop and not last:
        checkpoints.wait()
        raise interrupts.error(f"{stage.name} iteration {iteration}")
      if last:
        if iteration < stage.iterations:
          print(f"{stage.name}: ends at iteration {iteration}, {_reason(cadence, counts)}")
        break
  finally:
    stage.profile.close()
    progress.close()
    writer.close()
    trackers.close()
  checkpoints.wait()
  return time.monotonic() - began


def _is_late(cadence: Cadence, elapsed: float) -> bool:
  """Whether the time of a stage is up for any process; all of them must call this together."""
  return cadence.seconds is not None and multihost.largest(int(elapsed >= cadence.seconds)) > 0


def _reason(cadence: Cadence, counts: Counts) -> str:
  """Why a stage ended before its last iteration."""
  if cadence.patience is not None and counts.stale >= cadence.patience:
    return f"{counts.stale} validations without a better score"
  return f"whose {cadence.seconds:g} seconds are up"


def _shown(stage: Stage, metrics: Mapping[str, float]) -> dict[str, float | str]:
  """The values on the progress line. A validation that is minus a loss is shown as the loss."""
  shown: dict[str, float | str] = {name: metrics[name] for name in stage.shown if name in metrics}
  if SPEED in shown:
    shown["tokens/s"] = f"{shown.pop(SPEED):,.0f}"
  name = HELD_OUT if HELD_OUT in metrics else "validation"
  return shown | ({name: metrics[name]} if name in metrics else {})


def _trackers(stage: Stage, start: int, workdir: Folder) -> Trackers:
  """The trackers of a stage; only process 0 has any."""
  names = stage.trackers if multihost.is_main() else ()
  identity = run_identity(workdir) if names else ""
  return Trackers(names, Run(workdir, workdir.name, identity, stage.name, start, stage.metadata["config"]))


def _warn_of_skip(stage: Stage, iteration: int, counts: Counts) -> None:
  log.warning(
    "%s iteration %d: loss or gradient is not finite; the step is left out (%d in a row, of at most %d)",
    *(stage.name, iteration, counts.skipped_in_a_row, stage.cadence.max_skipped_steps),
  )


def _check_finite(stage: Stage, iteration: int, state: TrainState, checkpoints: Checkpoints) -> None:
  """Raises a NotFiniteError if a step with a finite loss made weights that are not finite; they are never saved."""
  if not bool(stage.all_finite(state)):
    checkpoints.wait()
    raise NotFiniteError(
      f"{stage.name} iteration {iteration}: a step made weights that are not finite. They are not saved; the"
      f" same command would end the same way. To go on, {_remedy(stage, checkpoints)}"
    )


def _after_another(stage: Stage, checkpoints: Checkpoints) -> str:
  """Advice for continuing after a skipped step."""
  return f": the same command goes on with the next batch. If it ends so again, {_remedy(stage, checkpoints)}"


def _after_the_last(stage: Stage, checkpoints: Checkpoints) -> str:
  """Advice after the last step of a stage was skipped: only an earlier checkpoint lets the run take it again."""
  return (
    f". It was the last of {stage.name}: the same command goes on with what follows {stage.name}. To take it again,"
    f" {_earlier(checkpoints)}, and {_gentler(stage)}"
  )


def _remedy(stage: Stage, checkpoints: Checkpoints) -> str:
  """Advice for numbers that are not finite; all of it works in the same folder."""
  return f"{_gentler(stage)}, or {_earlier(checkpoints)}"


def _gentler(stage: Stage) -> str:
  return f"lower --config.{stage.name}.learning_rate or --config.{stage.name}.max_grad_norm, which may change here"


def _earlier(checkpoints: Checkpoints) -> str:
  return f"delete the newest checkpoints in {checkpoints.folder} to go on from an earlier one"
