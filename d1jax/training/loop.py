"""The loop that every stage shares: resume, step, validate, save, report, stop."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from d1jax.errors import NotFiniteError
from d1jax.state import Params, TrainState
from d1jax.training.alarms import Limits, alarms
from d1jax.training.checkpoint import Checkpoints, Restored
from d1jax.training.interrupts import Interrupts
from d1jax.training.metrics import MetricsWriter, Progress, read_records

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of training.

  Attributes:
    name: `sft` or `grpo`; names folders and records.
    iterations: how many, in all.
    advance: `(state, iteration) -> (state, metrics)`, one iteration; metrics are host numbers, `finite` among them.
    validate: `params -> score`, higher is better.
    validate_every: iterations between validations; a checkpoint is written at each, and at the end.
    shown: the metrics on the progress line.
    metadata: what a checkpoint says beside the state.
  """

  name: str
  iterations: int
  advance: Callable[[TrainState, int], tuple[TrainState, dict[str, float]]]
  validate: Callable[[Params], float]
  validate_every: int
  shown: tuple[str, ...]
  metadata: Mapping[str, Any]


def run(stage: Stage, start: Restored, checkpoints: Checkpoints, workdir: Path, interrupts: Interrupts) -> float:
  """Runs a stage from `start` to its end; every state worth keeping is in `checkpoints` afterwards.

  Returns:
    The seconds that the stage has taken, earlier attempts included.

  Raises:
    NotFiniteError: a loss or gradient was not finite; the last finite state is saved.
    PreemptedError, InterruptedRunError: a stop was asked for; the state is saved.
  """
  state, began = start.state, time.monotonic() - float(start.metadata.get("seconds", 0.0))
  writer = MetricsWriter(workdir, stage.name, start.step)
  progress = Progress(stage.name, stage.iterations, start.step)
  history = [r for r in read_records(workdir / "metrics.jsonl") if r["stage"] == stage.name]
  sounded: list[str] = []
  try:
    for iteration in range(start.step + 1, stage.iterations + 1):
      state, metrics = stage.advance(state, iteration - 1)
      finite = bool(metrics.pop("finite"))
      score: float | None = None
      last = iteration == stage.iterations
      if finite and (last or iteration % stage.validate_every == 0):
        score = stage.validate(state.trainable)
        metrics["validation"] = score
      metrics["elapsed"] = time.monotonic() - began
      history.append(metrics)
      raised = alarms(history, Limits()) if iteration % Limits.window == 0 else sounded
      for alarm in raised:
        if alarm.split()[0] not in {a.split()[0] for a in sounded}:
          log.warning("%s iteration %d: %s", stage.name, iteration, alarm)
      sounded = raised
      writer.write(iteration, {**metrics, "alarms": sounded} if sounded else metrics)
      shown = {name: metrics[name] for name in (*stage.shown, "validation") if name in metrics}
      progress.update(iteration, shown | ({"alarm": sounded[0].split(":")[0]} if sounded else {}))
      if score is not None or interrupts.pending or not finite:
        metadata = {
          **stage.metadata,
          "data": {"next_index": iteration},
          "seconds": time.monotonic() - began,
        }
        checkpoints.save(iteration, state, metadata, score)
      if not finite:
        checkpoints.wait()
        raise NotFiniteError(
          f"{stage.name} iteration {iteration}: loss or gradient is not finite (loss {metrics['loss']}); the last"
          f" finite state is saved in {checkpoints.folder}. Lower the learning rate; do not retry as is"
        )
      if interrupts.pending and not last:
        checkpoints.wait()
        raise interrupts.error(f"{stage.name} iteration {iteration}")
  finally:
    progress.close()
    writer.close()
  checkpoints.wait()
  return time.monotonic() - began
