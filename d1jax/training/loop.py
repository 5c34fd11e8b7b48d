"""The loop that every stage shares: resume, step, validate, save, report, stop.

With several processes all run it side by side: what one of them alone knows, a stop signal, is asked of all.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from d1jax.errors import NotFiniteError
from d1jax.state import Params, TrainState
from d1jax.training import ledger
from d1jax.training.alarms import Limits, alarms
from d1jax.training.checkpoint import Checkpoints, Restored
from d1jax.training.interrupts import Interrupts
from d1jax.training.metrics import MetricsWriter, Progress, read_records
from d1jax.training.profile import Profile
from d1jax.training.workdir import Folder

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of training.

  Attributes:
    name: `sft` or `grpo`; names folders and records.
    iterations: how many, in all.
    advance: `(state, iteration) -> (state, metrics)`, one iteration; metrics are host numbers, among them `finite`,
      `tokens` (of completions) and what `ledger.entry` says.
    validate: `params -> score`, higher is better.
    all_finite: whether every weight and moment of a state is finite; asked before a state is saved.
    validate_every: iterations between validations; a checkpoint is written at each, and at the end.
    shown: the metrics on the progress line.
    metadata: what a checkpoint says beside the state.
    began: when the stage began to be made ready (`time.perf_counter`).
    profile: of some iterations.
  """

  name: str
  iterations: int
  advance: Callable[[TrainState, int], tuple[TrainState, dict[str, float]]]
  validate: Callable[[Params], float]
  all_finite: Callable[[TrainState], Any]
  validate_every: int
  shown: tuple[str, ...]
  metadata: Mapping[str, Any]
  began: float
  profile: Profile


def run(stage: Stage, start: Restored, checkpoints: Checkpoints, workdir: Folder, interrupts: Interrupts) -> float:
  """Runs a stage from `start` to its end; every state worth keeping is in `checkpoints` afterwards.

  Returns:
    The seconds that the stage has taken, earlier attempts included.

  Raises:
    NotFiniteError: a loss or gradient was not finite, and the step was left out; the state is saved. Or a step made
      weights that are not finite; that state is not saved.
    PreemptedError, InterruptedRunError: a stop was asked for; the state is saved.
  """
  state, began = start.state, time.monotonic() - float(start.metadata.get("seconds", 0.0))
  writer = MetricsWriter(workdir, stage.name, start.step)
  progress = Progress(stage.name, stage.iterations, start.step)
  history = [r for r in read_records(workdir / "metrics.jsonl") if r["stage"] == stage.name]
  sounded: dict[str, str] = {}
  clock = ledger.Clock(stage.began)
  try:
    for iteration in range(start.step + 1, stage.iterations + 1):
      with stage.profile.iteration(iteration):
        state, metrics = stage.advance(state, iteration - 1)
      finite, tokens = bool(metrics.pop("finite")), metrics.pop("tokens")
      score: float | None = None
      last = iteration == stage.iterations
      # The last weights are validated even where the last step was left out: the same command then ends the stage.
      if last or (finite and iteration % stage.validate_every == 0):
        _check_finite(stage, iteration, state, checkpoints)
        with clock.outside("validation"):
          score = metrics["validation"] = stage.validate(state.trainable)
      metrics = clock.close(metrics)
      metrics["tokens_per_second"] = tokens / metrics["seconds"]
      metrics["elapsed"] = time.monotonic() - began
      history.append(metrics)
      raised = alarms(history, Limits()) if iteration % Limits.window == 0 else sounded
      for name in raised.keys() - sounded.keys():
        log.warning("%s iteration %d: %s", stage.name, iteration, raised[name])
      sounded = raised
      writer.write(iteration, {**metrics, "alarms": list(sounded)} if sounded else metrics)
      shown = {name: metrics[name] for name in (*stage.shown, "validation") if name in metrics}
      progress.update(iteration, shown | ({"alarm": " ".join(sounded)} if sounded else {}))
      stop = interrupts.pending()
      if score is not None or stop or not finite:
        if score is None:
          _check_finite(stage, iteration, state, checkpoints)
        metadata = {
          **stage.metadata,
          "data": {"next_index": iteration},
          "seconds": time.monotonic() - began,
        }
        with clock.outside("saving"):
          writer.keep()
          checkpoints.save(iteration, state, metadata, score)
      if not finite:
        checkpoints.wait()
        raise NotFiniteError(
          f"{stage.name} iteration {iteration}: loss or gradient is not finite (loss {metrics['loss']}). The step was"
          f" left out, and the weights without it are saved in {checkpoints.folder}/{iteration}"
          f"{_after_the_last(stage, checkpoints) if last else _after_another(stage, checkpoints)}"
        )
      if stop and not last:
        checkpoints.wait()
        raise interrupts.error(f"{stage.name} iteration {iteration}")
  finally:
    stage.profile.close()
    progress.close()
    writer.close()
  checkpoints.wait()
  return time.monotonic() - began


def _check_finite(stage: Stage, iteration: int, state: TrainState, checkpoints: Checkpoints) -> None:
  """Raises a NotFiniteError where a step from a finite loss made weights that are not: they are never saved."""
  if not bool(stage.all_finite(state)):
    checkpoints.wait()
    raise NotFiniteError(
      f"{stage.name} iteration {iteration}: a step made weights that are not finite. They are not saved; the"
      f" same command would end the same way. To go on, {_remedy(stage, checkpoints)}"
    )


def _after_another(stage: Stage, checkpoints: Checkpoints) -> str:
  """How to go on behind a step that was left out."""
  return f": the same command goes on with the next batch. If it ends so again, {_remedy(stage, checkpoints)}"


def _after_the_last(stage: Stage, checkpoints: Checkpoints) -> str:
  """The same of the last step of a stage, behind which there is no other: nothing but going back takes it again."""
  return (
    f". It was the last of {stage.name}: the same command goes on with what follows {stage.name}. To take it again,"
    f" {_earlier(checkpoints)}, and {_gentler(stage)}"
  )


def _remedy(stage: Stage, checkpoints: Checkpoints) -> str:
  """What may help when numbers are not finite; all of it works in this folder."""
  return f"{_gentler(stage)}, or {_earlier(checkpoints)}"


def _gentler(stage: Stage) -> str:
  return f"lower --config.{stage.name}.learning_rate or --config.{stage.name}.max_grad_norm, which may change here"


def _earlier(checkpoints: Checkpoints) -> str:
  return f"delete the newest checkpoints in {checkpoints.folder} to go on from an earlier one"
