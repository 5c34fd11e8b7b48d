"""The results of a finished run: its table, completions and curves, and `results.json`, which marks it as finished."""

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
from d1jax.files import FileError, json_lines, read_json, read_text
from d1jax.run.experiment import Experiment
from d1jax.run.identity import flatten, holds_run
from d1jax.run.metrics import STAGES, read_records
from d1jax.run.workdir import Folder, revision, versions, write_json
from d1jax.telemetry import ledger

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The result of a stage.

  The weights are on disk, no longer in memory: `Recipe.best` reads them when they are needed.

  Attributes:
    best_step: the iteration with the best validation.
    fingerprint: the fingerprint of the last weights.
    seconds: the time that the stage took, including earlier attempts.
    checkpoint: the folder of the best weights.
  """

  best_step: int
  fingerprint: str
  seconds: float
  checkpoint: Folder


def finished_results(workdir: Folder, config: ConfigDict) -> dict[str, Any] | None:
  """The results of the run in a folder; None if it is not finished, or if they are damaged, which is logged.

  Raises:
    RunError: `results.json` is a folder, or the work directory holds a run of another configuration.
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
  return [flat.get(f"{stage}.{name}") for stage in STAGES for name in ("steps", "patience")]


def _graded(experiment: Experiment, evaluated: dict[str, Evaluation]) -> dict[str, Any]:
  """The part of the results that a task gives."""
  constant = baseline(experiment.task, evaluated["after"].records, experiment.config.task.style)
  found = {name: one.summary() for name, one in evaluated.items()}
  return {**found, "baseline": constant.summary(), "samples": report.samples(evaluated["after"])}


def _held_out(workdir: Folder, iteration: int) -> dict[str, Any]:
  """The part of the results of a run without a task: what its best validation found."""
  records = [r for r in read_records(workdir / "metrics.jsonl") if r["stage"] == "sft" and r["iteration"] == iteration]
  path = workdir / "samples" / f"{iteration}.jsonl"
  lines = json_lines(read_text(path), path) if path.exists() else ()
  figures = {name: value for record in records for name, value in record.items() if name.startswith("held_out_")}
  return {"held_out": figures, "samples": [row for _, _, row in lines if isinstance(row, dict)]}


def write_results(
  experiment: Experiment,
  workdir: Folder,
  outcomes: dict[str, Outcome],
  evaluated: dict[str, Evaluation],
  began: float,
  rest: dict[str, Any],
) -> dict[str, Any]:
  """Collects the results, and writes them together with completions.

  `evaluated` are the evaluations `before` and `after`, none without a task. `began` is the start of this attempt
  (`time.monotonic`), and `rest` has further fields of the results.
  """
  config = experiment.config
  final = outcomes[config.mode]
  for name, found in evaluated.items():
    found.write(workdir / "completions" / f"{name}.jsonl")
  total = time.monotonic() - began
  seconds = {stage: round(outcome.seconds, 2) for stage, outcome in outcomes.items()}
  results = {
    **(_graded(experiment, evaluated) if evaluated else _held_out(workdir, final.best_step)),
    "task": experiment.task.name,
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
