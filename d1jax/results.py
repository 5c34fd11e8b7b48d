"""The results of a finished run: its table, completions and curves, and the file that says it is finished."""

import dataclasses
import json
import logging
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from d1jax import report
from d1jax.errors import RunError
from d1jax.evaluation.evaluator import Evaluation, baseline
from d1jax.files import FileError, read_json
from d1jax.run.experiment import Experiment
from d1jax.run.identity import flatten, holds_run
from d1jax.run.metrics import read_records
from d1jax.run.workdir import Folder, revision, versions, write_json
from d1jax.telemetry import ledger

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a stage leaves behind.

  Weights are on disk and no longer in memory: `Recipe.best` reads them when they are needed.

  Attributes:
    best_step: the iteration with the best validation.
    fingerprint: of the weights at the end.
    seconds: that the stage took, earlier attempts included.
    checkpoint: the folder of the best weights.
  """

  best_step: int
  fingerprint: str
  seconds: float
  checkpoint: Folder


def finished_results(workdir: Folder, config: ConfigDict) -> dict[str, Any] | None:
  """The results of the run in a folder, None where it is not finished or where they are damaged, which is said.

  Raises:
    RunError: a folder is in the place of the file, or the folder holds a run of another configuration.
  """
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


def _totals(config: dict[str, Any]) -> list[Any]:
  flat = flatten(json.loads(json.dumps(config)))
  return [flat.get(f"{stage}.{name}") for stage in ("sft", "grpo") for name in ("steps", "patience")]


def write_results(
  experiment: Experiment,
  workdir: Folder,
  outcomes: dict[str, Outcome],
  evaluated: dict[str, Evaluation],
  began: float,
  rest: dict[str, Any],
) -> dict[str, Any]:
  """Collects the results and writes them, the completions and the learning curves.

  Args:
    experiment: of the run.
    workdir: of the run.
    outcomes: by stage.
    evaluated: `before` and `after`.
    began: when this attempt began (`time.monotonic`).
    rest: what else the results say.
  """
  config = experiment.config
  final = outcomes[config.mode]
  for name, found in evaluated.items():
    found.write(workdir / "completions" / f"{name}.jsonl")
  report.plot_learning_curves(workdir)
  task, records = experiment.task, evaluated["after"].records
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
