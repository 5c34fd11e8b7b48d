"""Finished runs that the tests of a session share; who changes one copies it first."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from d1jax.training import recipe
from tests import jobs
from tests.session import shared

CHANGES = {"grpo__dump_every": 1, "grpo__steps": 4}


def finished() -> tuple[Path, ConfigDict, dict[str, Any]]:
  """The recipe from a fresh model, supervised fine-tuning first: its folder, configuration and results."""
  workdir, results = shared("finished", lambda workdir: recipe.run(jobs.small(workdir, **CHANGES)))
  return workdir, jobs.small(workdir, **CHANGES), results
