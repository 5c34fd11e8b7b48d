"""Finished runs that the tests of a session share; who changes one copies it first."""

import json
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from d1jax import recipe
from d1jax.run import parts
from d1jax.run.metrics import read_records
from tests import jobs
from tests.session import shared

CHANGES = {"sft__steps": 30, "sft__validate_every": 10, "grpo__dump_every": 1, "grpo__steps": 4}


def finished() -> tuple[Path, ConfigDict, dict[str, Any]]:
  """The recipe from a fresh model, supervised fine-tuning first: its folder, configuration and results."""
  workdir, results = shared("finished", lambda workdir: recipe.run(jobs.small(workdir, **CHANGES)))
  config = jobs.small(workdir, **CHANGES)
  parts.complete(config)
  return workdir, config, results


def undisturbed(count: int = 1) -> tuple[Path, list[tuple[int, str, str]], float]:
  """`jobs.BRIEF` in one go as some real processes, which have two devices together.

  Returns:
    Its folder, what `jobs.finish_processes` found, and its seconds.
  """

  def make(workdir: Path) -> tuple[list[tuple[int, str, str]], float]:
    began, flags = time.monotonic(), jobs.flags(workdir, **jobs.BRIEF)
    processes = [jobs.start(*flags)] if count == 1 else jobs.start_processes(count, *flags, devices=2 // count)
    found = jobs.finish_processes(processes)
    assert [code for code, _, _ in found] == [0] * count, found
    return found, time.monotonic() - began

  workdir, (found, seconds) = shared(f"undisturbed-{count}", make)
  return workdir, found, seconds


def check_same_end(workdir: Path, expected: Path) -> None:
  """A job ended with the bits and the records of another one of as many processes."""
  results = [json.loads((folder / "results.json").read_text()) for folder in (workdir, expected)]
  for name in ("params_fingerprint", "before", "after", "samples", "best_iteration"):
    assert results[0][name] == results[1][name], name
  records = [read_records(folder / "metrics.jsonl") for folder in (workdir, expected)]
  seen = [[(r["stage"], r["iteration"], r["loss"], r.get("reward")) for r in one] for one in records]
  assert seen[0] == seen[1]
